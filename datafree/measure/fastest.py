"""Whether integers make a network faster on this machine: small ones, and those of depthwise layers, they may slow down."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from datafree.export.integers import Array
from datafree.export.lower import Style
from datafree.export.onnx import Prepared, onnx_bytes
from datafree.export.runtime import open_file
from datafree.measure.speed import Latency, interleaved
from datafree.task import Task


def fastest_style(prepared: Prepared, task: Task, style: Style, threads: int = 0) -> Style:
    """``style`` with integer or float kernels, whichever file runs faster here on one input; the two are timed in turns.

    Float kernels run as fast as those of the float network, on weights as small as their bits.
    """
    choices = [replace(style, float_kernels=False), replace(style, float_kernels=True)]
    integer, full = _timed(prepared, choices, task.noise(1, torch.Generator().manual_seed(0)).numpy(), threads)
    return choices[0] if integer.median <= full.median else choices[1]


def _timed(prepared: Prepared, styles: Sequence[Style], x: Array, threads: int) -> list[Latency]:
    with tempfile.TemporaryDirectory(prefix="datafree-") as folder:
        loaded = []
        for number, style in enumerate(styles):
            file = Path(folder) / f"{number}.onnx"
            file.write_bytes(onnx_bytes(prepared, style))
            loaded.append(open_file(file, threads))
        return interleaved(loaded, x)
