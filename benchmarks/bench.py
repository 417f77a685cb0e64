"""Measure methods on real networks: one process and one result file for every (network, method, setting, seed).

``python benchmarks/bench.py GRID.json [--again]`` runs the grid, skipping results that are there already. The images only
measure: they are opened after quantization. Data and weights are looked for in ``../shared/data`` or ``$DATAFREE_DATA``.

A grid is ``{"networks": [...], "methods": {label: {"method": ..., "fields": {...}}}, "settings": {label: {...}}, "seeds": [...],
"skip": [[method label, setting label], ...], "unseen": N, "untrained": true}``; a setting holds the arguments of ``Target``, ``max_bytes``
perhaps by network. ``networks`` may be ``{network: [setting label, ...]}``. With ``unseen`` the divergence from the network's answers is
measured too, on so many pictures that no method has seen; with ``untrained`` each method a second time, before its steps.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from datafree.networks import Network as Float

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
UNTRAINED = "-untrained"  # ends the label of what is measured before its training


@dataclass(frozen=True)
class Network:
    """Where a network, its weights and its labelled data lie; an embedded one has both with it."""

    source: str
    weights: str = ""
    data: str = ""


NETWORKS = {
    "digits": Network("digits"),
    "resnet20": Network("cifar_resnet.py:resnet20", "cifar10_resnet20.safetensors", "cifar10.npz"),
    "resnet56": Network("cifar_resnet.py:resnet56", "cifar10_resnet56.safetensors", "cifar10.npz"),
    "mobilenetv1_025": Network("mobilenet_v1.py:mobilenet_v1_025", "imagenet_mobilenetv1_025.safetensors", "imagenet_val_500.zip"),
}


def data_root() -> Path:
    return Path(os.environ.get("DATAFREE_DATA", HERE.parent.parent / "shared" / "data"))


def peak_since(reset: bool) -> int:
    """Peak resident bytes of this process since the last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS" if reset else "VmHWM"))) * 1024


def measure(job: dict[str, object]) -> dict[str, object]:
    """Quantize, then measure; everything that is needed to repeat it stands in the result."""
    import torch

    import datafree
    from datafree.measure.accuracy import compare
    from datafree.measure.data import open_data
    from datafree.networks import load_network
    from datafree.zoo.digits import held_out

    torch.set_num_threads(1)
    place = NETWORKS[str(job["network"])]
    if place.weights:
        network = load_network(f"{HERE / 'zoo' / place.source}", data_root() / "weights" / place.weights)
    else:
        network = load_network(place.source)
    setting = dict(job["setting_fields"])
    if isinstance(setting.get("weight_bits"), list):
        setting["weight_bits"] = tuple(setting["weight_bits"])
    if isinstance(setting.get("max_bytes"), dict):
        setting["max_bytes"] = setting["max_bytes"][job["network"]]
    method = datafree.methods()[str(job["method"])](**job["fields"])
    before = peak_since(reset=True)
    result = datafree.quantize(network.model, network.task, method=method, target=datafree.Target(**setting), seed=int(job["seed"]))
    peak = peak_since(reset=False) - before
    data = open_data(data_root() / place.data, network.task) if place.data else held_out()
    found = compare(network.model, result.student, network.task, data)
    return {
        **{key: job[key] for key in ("network", "label", "setting", "seed", "commit")},
        "run": {**result.run, "peak_memory_bytes": peak},
        "total": found.paired.total,
        "float_top1": found.teacher.top1,
        "top1": found.student.top1,
        "paired": asdict(found.paired),
        **({"divergence": on_pictures(network, result.student, job)} if job.get("unseen") else {}),
    }


def on_pictures(network: "Float", student: "nn.Module", job: dict[str, object]) -> float:
    """Divergence from the network's answers, in nats, on dead leaves of a seed of their own, anchored to the network."""
    import torch

    from datafree.closed.regress import divergence
    from datafree.graph.taps import anchored_alike
    from datafree.synth.prior import pictures

    unseen = pictures("leaves", int(job["unseen"]), network.task, torch.Generator().manual_seed(1000 + int(job["seed"])))
    with anchored_alike(network.model, student):
        found = [divergence(network.model, student, network.task, part) for part in torch.split(unseen, 64)]
    return sum(found) / len(found)


def commit() -> str:
    """The commit the working tree stands at, marked where the package differs from it."""
    head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, cwd=HERE).stdout.strip()
    dirty = subprocess.run(["git", "status", "--porcelain", "datafree"], capture_output=True, text=True, cwd=HERE.parent).stdout.strip()
    return head + ("+changes" if dirty else "")


def jobs(grid: dict[str, object]) -> list[dict[str, object]]:
    skip = {tuple(each) for each in grid.get("skip", ())}
    shared = {"unseen": grid.get("unseen", 0)}
    methods = dict(grid["methods"])
    if grid.get("untrained"):
        methods |= {f"{label}{UNTRAINED}": {**each, "fields": {**each["fields"], "steps": 0}} for label, each in methods.items()}
    networks = grid["networks"] if isinstance(grid["networks"], dict) else dict.fromkeys(grid["networks"], grid["settings"])
    return [
        {"network": network, "label": label, "setting": setting, "seed": seed, "setting_fields": fields, "fields": {}, **shared, **method}
        for network, settings in networks.items()
        for setting, fields in grid["settings"].items()
        for label, method in methods.items()
        for seed in (grid["seeds"] if method.get("random") else [0])
        if setting in settings and (label, setting) not in skip
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path, nargs="+", help="grid files, or one job as JSON with --one")
    parser.add_argument("--again", action="store_true", help="measure again what is there already")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(json.loads(str(options.grid[0])))))
        return
    RESULTS.mkdir(exist_ok=True)
    todo = [job for grid in options.grid for job in jobs(json.loads(grid.read_text()))]
    failed = 0
    for number, job in enumerate(todo, 1):
        name = f"{job['network']}-{job['label']}-{job['setting']}-s{job['seed']}.json"
        if (RESULTS / name).exists() and not options.again:
            continue
        done = subprocess.run([sys.executable, __file__, "--one", json.dumps({**job, "commit": commit()})], capture_output=True, text=True)
        if done.returncode:
            failed += 1
            print(f"{name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            continue
        result = json.loads(done.stdout.splitlines()[-1])
        (RESULTS / name).write_text(json.dumps(result, indent=1) + "\n")
        print(
            f"[{number}/{len(todo)}] {name}: {result['float_top1']:.2f} -> {result['top1']:.2f} in {result['run']['seconds']:.1f} s",
            flush=True,
        )
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
