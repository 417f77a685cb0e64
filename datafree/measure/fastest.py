"""Which layers integers make faster on this machine: depthwise convolutions often lose, and small networks altogether."""

import tempfile
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import torch

from datafree.export.integers import Array
from datafree.export.lower import Style, layer_of
from datafree.export.onnx import Prepared, onnx_bytes
from datafree.export.runtime import RuntimeName, open_file
from datafree.measure.speed import Latency, interleaved
from datafree.task import Task


def fastest_layers(prepared: Prepared, task: Task, style: Style, threads: int = 0) -> frozenset[str]:
    """The layers to leave on float kernels: those of the fastest of a few whole files, timed in turns on one input.

    The candidates: all layers on integers; depthwise layers in float; depthwise and first and last layers in float; all in float. So the
    file is as fast as the float network at least, its weights as small as their bits.
    """
    choices = _choices(prepared)
    x = task.noise(1, torch.Generator().manual_seed(0)).numpy()
    latencies = _timed(prepared, style, choices, x, threads)
    best = min(range(len(choices)), key=lambda index: latencies[index].median)
    return choices[best]


def _choices(prepared: Prepared) -> list[frozenset[str]]:
    depthwise = frozenset(name for name in prepared.integer if _depthwise(prepared, name))
    ends = frozenset((prepared.integer[0], prepared.integer[-1])) if prepared.integer else frozenset()
    return list(dict.fromkeys((frozenset(), depthwise, depthwise | ends, frozenset(prepared.weights))))


def _depthwise(prepared: Prepared, name: str) -> bool:
    nodes: list[ir.Node] = [node for node in prepared.graph.graph if layer_of(node) == name]
    return all(node.attributes.get_int("group", 1) > 1 and prepared.weights[name].codes.shape[1] == 1 for node in nodes)


def _timed(prepared: Prepared, style: Style, choices: Collection[frozenset[str]], x: Array, threads: int) -> list[Latency]:
    runtime: RuntimeName = "onnxruntime" if style.integer_outputs else "openvino"
    with tempfile.TemporaryDirectory(prefix="datafree-") as folder:
        loaded = []
        for number, choice in enumerate(choices):
            file = Path(folder) / f"{number}.onnx"
            file.write_bytes(onnx_bytes(prepared, replace(style, float_layers=choice)))
            loaded.append(open_file(file, runtime, threads))
        return interleaved(loaded, x)
