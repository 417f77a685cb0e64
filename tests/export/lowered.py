"""Graphs in the text form of ONNX, lowered and run in ONNX Runtime beside the reference.

Scales are powers of two and biases on the grid, so that the two agree to the last bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir

from datafree.export.grids import Grid
from datafree.export.integers import Array, Integers
from datafree.export.lower import Style, lower
from datafree.export.runtime import Kernel, OnnxRuntime
from tests.reference import markers

PLAIN = Grid(2**-5, 0, 0, 255)  # what a ReLU leaves at 8 bits


SIGNED = Grid(2**-4, 131, 0, 255)


FOUR = Grid(2**-1, 0, 0, 15)


def weight(*shape: int, axis: int = 0, bits: int = 4, seed: int = 0, scale: float = 2**-4) -> Integers:
    """Random codes of a symmetric grid, with a scale of 1, 2 or 4 times ``scale`` for each channel."""
    draw = np.random.default_rng(seed)
    half = 2 ** (bits - 1)
    scales = scale * 2.0 ** draw.integers(0, 3, shape[axis])
    codes = draw.integers(1 - half, half, shape).astype(np.int16)
    return Integers(codes, bits, True, 1, np.zeros(shape[axis], np.int16), scales.astype(np.float32), axis)


@dataclass(frozen=True)
class Lowered:
    """A file made from a graph in the text form of ONNX, opened."""

    proto: onnx.ModelProto
    runtime: OnnxRuntime
    kernels: dict[str, Kernel]
    answer: Array
    reference: Array

    @property
    def kinds(self) -> list[str]:
        return [node.op_type for node in self.proto.graph.node]

    def readers(self, name: str) -> list[str]:
        return [node.op_type for node in self.proto.graph.node if name in node.input]


class Maker:
    """Lowers graphs and runs them, beside the reference."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(
        self,
        text: str,
        weights: Mapping[str, Integers],
        grids: Mapping[str, Grid],
        style: Style | None = None,
        shape: tuple[int, ...] = (3, 8, 8),
    ) -> Lowered:
        sizes = ",".join(["batch", *map(str, shape)])
        source = onnx.parser.parse_model(
            f'<ir_version: 10, opset_import: ["" : 21, "datafree" : 1]> g (float[{sizes}] input) => (float[batch, other] output) {text}'
        )
        x = np.random.default_rng(1).normal(size=(2, *shape)).astype(np.float32) * 2
        reference = markers.run(source, weights, grids, x)
        model = ir.from_proto(source)  # shares its tensors
        for each in model.graph.outputs:
            each.shape = None
        lower(model, weights, grids, style or Style())
        onnx.save(ir.to_proto(model), self.folder / "model.onnx")
        runtime = OnnxRuntime(self.folder / "model.onnx", threads=1)
        proto = onnx.load(self.folder / "model.onnx")
        return Lowered(proto, runtime, runtime.kernels(weights), runtime.run(x)["output"], reference)


def same(found: Lowered, tolerance: float = 0.0) -> None:
    assert found.reference.std() > 0.1, "the test says nothing: the answer is constant"
    assert found.answer.shape == found.reference.shape and found.answer.dtype == np.float32
    assert np.abs(found.answer - found.reference).max() <= tolerance


def integer(found: Lowered) -> dict[str, str]:
    assert all(kernel.integer for kernel in found.kernels.values()), found.kernels
    return {name: kernel.name for name, kernel in found.kernels.items()}


BETWEEN = """{
    q = datafree.Quantized <point="a:input"> (input)
    w = datafree.Weight <layer="a"> ()
    y = Conv <pads=[1,1,1,1]> (q, w, b)
    %s
    output = datafree.Quantized <point="a:output"> (r)
}"""


BIAS = "<float[4] b = {1, -2, 0, 0.5}, float lo = {0}, float hi = {6}>"
