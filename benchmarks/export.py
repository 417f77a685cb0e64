"""Export students and run the files in their runtime: size, speed, kernels, and how far the file is from the student.

``python benchmarks/export.py [--networks ...] [--settings ...] [--forms ...]`` writes ``results/export-NETWORK-SETTING-FORM.json``, one
process for each, skipping what is there already. Trained networks are quantized by ``anchor`` and run on their whole data as well
(``../shared/data`` or ``$DATAFREE_DATA``); those of random weights by ``rtn``.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from bench import HERE, NETWORKS, RESULTS, commit, data_root

if TYPE_CHECKING:
    from torch import Tensor, nn

    from datafree.task import Task

SHAPES = {"resnet18": "imagenet_resnet", "resnet50": "imagenet_resnet", "mobilenet_v2": "imagenet_shapes", "densenet121": "imagenet_shapes"}
SETTINGS = {
    "w8a8": {"weight_bits": 8, "act_bits": 8},
    "w4a8": {"weight_bits": 4, "act_bits": 8},
    "w4a4": {"weight_bits": 4, "act_bits": 4},
    "2-6-a8": {"weight_bits": (2, 6), "act_bits": 8},
    "3-6-a8": {"weight_bits": (3, 6), "act_bits": 8},
    "w2a8": {"weight_bits": 2, "act_bits": 8},
}
FORMS = {
    "ort": {"to": "onnx", "packing": "ort"},
    "ort-portable": {"to": "onnx", "packing": "portable"},
    "ort-fastest": {"to": "onnx", "packing": "ort", "fastest": True},
    "openvino": {"to": "openvino"},
    "openvino-onnx": {"to": "onnx", "packing": "openvino-onnx"},
}


def network_of(name: str) -> tuple["nn.Module", "Task", Path | None]:
    """The network, its task, and where its labelled data lie."""
    from datafree.networks import load_network

    if name in SHAPES:
        module = __import__(f"zoo.{SHAPES[name]}", fromlist=[name])
        return *getattr(module, name)(), None
    if name == "digits":
        found = load_network("digits")
        return found.model, found.task, None
    place = NETWORKS[name]
    found = load_network(f"{HERE / 'zoo' / place.source}", data_root() / "weights" / place.weights)
    return found.model, found.task, data_root() / place.data


def batches(name: str, data: Path | None, task: "Task") -> Iterator[tuple["Tensor", "Tensor"]]:
    """What measures the answers: the network's data, or nothing for random weights."""
    from datafree.measure.data import batches_of, open_data
    from datafree.zoo.digits import held_out

    if data is not None:
        yield from batches_of(open_data(data, task), task)
    elif name == "digits":
        yield from batches_of(held_out(), task)


def measure(name: str, setting: str, form: str, threads: int) -> dict[str, object]:
    import torch

    import datafree
    from datafree.export.runtime import open_file

    torch.set_num_threads(1)
    model, task, data = network_of(name)
    method = "rtn" if name in SHAPES else "anchor"
    result = datafree.quantize(model, task, method=method, target=datafree.Target(**SETTINGS[setting]))
    runtime = {"runtime": "openvino"} if form == "openvino-onnx" else {}  # else the file's suffix tells
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / ("model.xml" if FORMS[form]["to"] == "openvino" else "model.onnx")
        result.export(file, **FORMS[form])
        found = datafree.verify(file, result.student, task, threads=threads, **runtime).to_json()
        loaded = open_file(file, threads, **runtime)
        right = {"student": 0, "file": 0}
        same = total = 0
        for images, labels in batches(name, data, task):
            with torch.no_grad():
                own = task.run(result.student, images).argmax(1)
            given = torch.from_numpy(loaded.run(images.numpy())["output"]).argmax(1)
            right["student"] += int((own == labels).sum())
            right["file"] += int((given == labels).sum())
            same, total = same + int((own == given).sum()), total + len(labels)
    return {
        "export": form, "network": name, "setting": setting, "method": method, "commit": commit(), "torch": torch.__version__,
        "threads": threads, "packed_bytes": result.run["packed_bytes"], "float_bytes": result.run["float_bytes"], "images": total,
        "student_top1": 100 * right["student"] / total if total else None, "file_top1": 100 * right["file"] / total if total else None,
        "same_top1_on_images": 100 * same / total if total else None, **found,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["digits", *SHAPES, *NETWORKS])
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--forms", nargs="+", default=["ort", "openvino"], choices=FORMS)
    parser.add_argument("--threads", type=int, default=2, help="of the runtime")
    parser.add_argument("--again", action="store_true", help="measure again what is there already")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    todo = [(name, setting, form) for name in options.networks for setting in options.settings for form in options.forms]
    if options.one:
        print(json.dumps(measure(*todo[0], options.threads)))
        return
    RESULTS.mkdir(exist_ok=True)
    failed = 0
    for name, setting, form in todo:
        path = RESULTS / f"export-{name}-{setting}-{form}.json"
        if path.exists() and not options.again:
            continue
        given = ["--networks", name, "--settings", setting, "--forms", form, "--threads", str(options.threads)]
        done = subprocess.run([sys.executable, __file__, "--one", *given], capture_output=True, text=True)
        if done.returncode:
            failed += 1
            print(f"{path.name}: {(done.stderr.strip() or 'killed').splitlines()[-1]}", file=sys.stderr, flush=True)
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        path.write_text(json.dumps(found, indent=1) + "\n")
        over = 100 * (found["file_bytes"] / found["packed_bytes"] - 1)
        print(
            f"{path.name}: {found['file_bytes'] / 1000:.0f} kB ({over:+.1f} %), {found['speedup']:.2f} times as fast, loaded in "
            f"{found['load_seconds']:.2f} s, student {found['student_top1']}, file {found['file_top1']}, {found['failures']}",
            flush=True,
        )
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
