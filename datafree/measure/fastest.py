"""Whether integers make a network faster on this machine: small ones, and those of depthwise layers, they may slow down."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from datafree.export.integers import Array
from datafree.export.lower import Style
from datafree.export.onnx import Prepared, export_onnx
from datafree.export.runtime import RuntimeName, open_file
from datafree.measure.speed import Latency, interleaved
from datafree.task import Task


def fastest_style(prepared: Prepared, task: Task, style: Style, openvino: bool = False, threads: int = 0) -> Style:
    """``style`` with integer or float kernels, whichever file runs faster here on one input; the two are timed in turns.

    ``openvino``: the file is to be one of OpenVINO's own; ONNX files packed for it are timed in it as well.

    Float kernels run as fast as those of the float network, on weights as small as their bits.
    """
    choices = [replace(style, float_kernels=False), replace(style, float_kernels=True)]
    integer, full = _timed(prepared, choices, task.noise(1, torch.Generator().manual_seed(0)).numpy(), openvino, threads)
    return choices[0] if integer.median <= full.median else choices[1]


def _timed(prepared: Prepared, styles: Sequence[Style], x: Array, openvino: bool, threads: int) -> list[Latency]:
    with tempfile.TemporaryDirectory(prefix="datafree-") as folder:
        files = [_write(prepared, style, Path(folder) / str(number), openvino) for number, style in enumerate(styles)]
        runtime: RuntimeName = "openvino" if openvino or styles[0].packing == "openvino-onnx" else "ort"
        return interleaved([open_file(file, threads, runtime=runtime) for file in files], x)


def _write(prepared: Prepared, style: Style, path: Path, openvino: bool) -> Path:
    if not openvino:
        return export_onnx(prepared, path.with_suffix(".onnx"), style)
    from datafree.export.openvino import export_openvino

    return export_openvino(prepared, path.with_suffix(".xml"), float_kernels=style.float_kernels)
