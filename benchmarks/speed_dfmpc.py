"""How long DF-MPC takes on a network of ResNet-50's shape, beside one forward pass of it at batch 16, and its peak memory.

``python benchmarks/speed_dfmpc.py`` writes ``results/speed-dfmpc-resnet50.json``: medians of interleaved repeats.
"""

import json
import statistics
import time

import torch
from bench import RESULTS, commit, peak_since
from zoo.imagenet_resnet import resnet50

import datafree
from datafree.plan import Target


def main() -> None:
    torch.set_num_threads(2)
    model, task = resnet50()
    inputs = torch.randn(16, *task.shape, generator=torch.Generator().manual_seed(0))
    weights = sum(parameter.numel() * 4 for parameter in model.parameters())
    seconds: dict[str, list[float]] = {"dfmpc": [], "forward": []}
    peaks = []
    for _ in range(5):
        before = peak_since(reset=True)
        seconds["dfmpc"].append(float(str(datafree.quantize(model, task, target=Target((2, 6), protocol="dfmpc")).run["seconds"])))
        peaks.append(peak_since(reset=False) - before)
        start = time.perf_counter()
        with torch.no_grad():
            model(inputs)
        seconds["forward"].append(time.perf_counter() - start)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    result = {
        "commit": commit(),
        "torch": torch.__version__,
        "threads": 2,
        "seconds": seconds,
        "ratio_to_forward_at_batch_16": middle["dfmpc"] / middle["forward"],
        "model_bytes": weights,
        "peak_bytes_beyond_the_model": peaks,
        "peak_over_model": (max(peaks) + weights) / weights,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "speed-dfmpc-resnet50.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
