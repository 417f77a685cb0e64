"""Does training help? Each method that trains, before and after its steps, on the embedded digits.

``python benchmarks/learns.py [--methods ...]`` writes ``results/learns-METHOD.json``: for each seed the top-1 on the held-out digits, and
the divergence from the network's answers on procedural pictures that no method has seen, of the student as training finds it (``steps``
0) and leaves it. Images measure only. Results that are there are kept.
"""

import argparse
import json
from pathlib import Path

import torch
from bench import commit

import datafree
from datafree.closed.regress import divergence
from datafree.graph.taps import anchored_alike
from datafree.synth.prior import pictures
from datafree.zoo.digits import digits, held_out

RESULTS = Path(__file__).resolve().parent / "results"
METHODS = ("gdfq", "qimera", "adadfq", "texq", "acq", "akt", "intraq", "hast", "zaq", "genie", "anchor-tuned")
TARGET = datafree.Target(2, 2, protocol="paper")  # at more bits little is lost that training could win back
SEEDS = (0, 1, 2)
UNSEEN = 256  # pictures


def measure(name: str, seed: int) -> dict[str, object]:
    """One seed of one method."""
    model, task = digits()
    unseen = pictures("leaves", UNSEEN, task, torch.Generator().manual_seed(1000 + seed))
    row: dict[str, object] = {"seed": seed}
    for when, fields in (("before", {"steps": 0}), ("after", {})):
        result = datafree.quantize(model, task, method=datafree.methods()[name](budget="smoke", **fields), target=TARGET, seed=seed)
        found = []
        for part in torch.split(unseen, 64):
            with anchored_alike(model, result.student):
                found.append(divergence(model, result.student, task, part))
        row[when] = {
            "top1": datafree.evaluate(result.student, task, held_out()).top1,
            "divergence": sum(found) / len(found),
            "seconds": result.run["seconds"],
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    torch.set_num_threads(1)
    for name in parser.parse_args().methods:
        path = RESULTS / f"learns-{name}.json"
        if path.exists():
            continue
        rows = [measure(name, seed) for seed in SEEDS]
        setting = {"method": name, "network": "digits", "budget": "smoke", "weight_bits": 2, "act_bits": 2, "protocol": "paper"}
        path.write_text(json.dumps({**setting, "commit": commit(), "rows": rows}, indent=1) + "\n")
        print(name, *(f"{row['before']['top1']:.2f} -> {row['after']['top1']:.2f}" for row in rows), flush=True)


if __name__ == "__main__":
    main()
