"""The meaning of a marked graph, worked out node by node by the reference of ONNX, with the quantizer's formula in float64."""

from collections.abc import Mapping

import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from datafree.export.grids import Grid
from datafree.export.integers import Array, Integers


def run(model: onnx.ModelProto, weights: Mapping[str, Integers], grids: Mapping[str, Grid], x: Array) -> Array:
    """The first output of the graph, in float32, for ``x``."""

    class Weight(OpRun):
        op_domain = "datafree"

        def _run(self, layer: str = "") -> tuple[Array]:
            return (weights[layer].values(),)

    class Quantized(OpRun):
        op_domain = "datafree"

        def _run(self, value: Array, point: str = "", call: int = 1) -> tuple[Array]:
            grid = grids[point]
            codes = np.clip(np.rint(value.astype(np.float64) / grid.scale) + grid.zero, grid.low, grid.high)
            return ((grid.scale * (codes - grid.zero)).astype(np.float32),)

    class ConvTranspose(OpRun):
        """That of ONNX does not know groups."""

        op_domain = ""

        def _run(self, x: Array, w: Array, b: Array | None = None, group: int = 1, strides: object = None, **_: object) -> tuple[Array]:
            x, w, b = (None if each is None else torch.from_numpy(np.asarray(each)) for each in (x, w, b))
            return (torch.nn.functional.conv_transpose2d(x, w, b, tuple(strides or (1, 1)), groups=group or 1).numpy(),)

    (name,) = (each.name for each in model.graph.input)
    answer: Array = ReferenceEvaluator(model, new_ops=[Weight, Quantized, ConvTranspose]).run(None, {name: x})[0]
    return answer
