"""Time and peak memory on networks of ResNet-18's, -50's and -152's shape, beside one forward pass of each at batch 16.

``python benchmarks/speed.py`` writes ``results/speed-SHAPE-LABEL.json``: one process for each, two threads, medians of repeats.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

from bench import RESULTS, commit, peak_since

SHAPES = ("resnet18", "resnet50", "resnet152")
MOMENTS = {"statistics": "moments", "own_inputs": False, "act_range": "moments", "recalibration": "none"}
METHODS = {"dfmpc": ("dfmpc", {}, 3), "anchor-moments": ("anchor", MOMENTS, 3), "anchor": ("anchor", {}, 1)}


def measure(shape: str, label: str) -> dict[str, object]:
    """Quantize to 4 bits, activations 8 (dfmpc: 2/6 and float), and run the network, in turns."""
    import torch
    from zoo import imagenet_resnet

    import datafree
    from datafree.plan import Target

    torch.set_num_threads(2)
    model, task = getattr(imagenet_resnet, shape)()
    name, fields, repeats = METHODS[label]
    target = Target((2, 6), protocol="dfmpc") if name == "dfmpc" else Target(4, 8, protocol="deploy")
    inputs = torch.randn(16, *task.shape, generator=torch.Generator().manual_seed(0))
    method = datafree.methods()[name](**fields)
    seconds: list[float] = []
    forward: list[float] = []
    peaks: list[int] = []
    for _ in range(repeats):
        before = peak_since(reset=True)
        seconds.append(float(str(datafree.quantize(model, task, method=method, target=target).run["seconds"])))
        peaks.append(peak_since(reset=False) - before)
        start = time.perf_counter()
        with torch.no_grad():
            model(inputs)
        forward.append(time.perf_counter() - start)
    weights = sum(parameter.numel() for parameter in model.parameters())
    return {
        "shape": shape,
        "label": label,
        "commit": commit(),
        "torch": torch.__version__,
        "threads": 2,
        "parameters": weights,
        "seconds": seconds,
        "seconds_of_a_forward_pass_at_batch_16": forward,
        "ratio": statistics.median(seconds) / statistics.median(forward),
        "peak_bytes_beyond_the_model": peaks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one)))
        return
    RESULTS.mkdir(exist_ok=True)
    for shape in SHAPES:
        for label in METHODS:
            done = subprocess.run([sys.executable, __file__, "--one", shape, label], capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{shape} {label}: {done.stderr.strip().splitlines()[-1]}")
            result = json.loads(done.stdout.splitlines()[-1])
            (RESULTS / f"speed-{shape}-{label}.json").write_text(json.dumps(result, indent=1) + "\n")
            peak = max(result["peak_bytes_beyond_the_model"]) / 1e9
            print(
                f"{shape} {label}: {statistics.median(result['seconds']):.1f} s, {result['ratio']:.1f} forward passes, {peak:.2f} GB",
                flush=True,
            )


if __name__ == "__main__":
    main()
