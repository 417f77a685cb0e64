"""ONNX files with weights at their true size, whose quantized layers run on integer kernels.

``prepare`` traces a student once; ``onnx_bytes`` writes it in a style, ``float_onnx_bytes`` as the float network that it is compared with.
The batch is dynamic, batch norms are folded, and the metadata say what made the file.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir
from torch import nn

from datafree.errors import ExportError
from datafree.export.files import write_whole
from datafree.export.grids import Grid, grid
from datafree.export.header import header
from datafree.export.integers import Integers, integers
from datafree.export.lower import Style, integer_layers, lower, lower_float
from datafree.export.trace import trace
from datafree.plan import Plan
from datafree.quant.freeze import freeze
from datafree.quant.insert import plan_of, quantizers
from datafree.task import Task

_TWO_BITS = frozenset((ir.DataType.INT2, ir.DataType.UINT2))
_LIMIT = 2**31  # bytes: what one protobuf message holds


@dataclass(frozen=True, eq=False)
class Prepared:
    """A student read for export.

    Args:
        graph: with markers for weights and activations, see ``export.trace``; nobody may change it.
        weights: of the quantized layers, by name.
        grids: of the quantized activations, by point.
        plan: of the student.
        integer: the layers whose weight and input are quantized, which are to run on integer kernels.
    """

    graph: ir.Model
    weights: Mapping[str, Integers]
    grids: Mapping[str, Grid]
    plan: Plan
    integer: tuple[str, ...]


def prepare(student: nn.Module, task: Task) -> Prepared:
    """Trace ``student``, which stays as it is.

    Raises ExportError where an operation or a grid has no form in ONNX, naming its layer; MissingExtraError without onnx.
    """
    unset = [point for point, quantizer in quantizers(student).items() if not quantizer.ready]
    if unset:
        raise ExportError(f"activations without a range: {', '.join(unset[:5])}: observe them before exporting")
    model = trace(student, task)
    weights = {name: integers(frozen, _out_axis(student.get_submodule(name))) for name, frozen in freeze(student).items()}
    grids = {point: grid(point, quantizer) for point, quantizer in quantizers(student).items()}
    return Prepared(model, weights, grids, plan_of(student), integer_layers(model.graph))


def onnx_bytes(prepared: Prepared, style: Style | None = None, made_by: Mapping[str, object] | None = None) -> bytes:
    """The file; ``made_by`` (method, hash of the source weights, ...) goes into its metadata beside plan and versions."""
    model, style = prepared.graph.clone(), style or Style()
    lower(model, prepared.weights, prepared.grids, style)
    kinds = {value.const_value.dtype for value in model.graph.initializers.values() if value.const_value is not None}
    if kinds & _TWO_BITS:
        model.graph.opset_imports[""], model.ir_version = 25, 13  # the first with 2-bit integers
    model.producer_name, model.producer_version = "datafree", version("datafree")
    model.metadata_props["datafree"] = header(prepared.plan, style.float_kernels, made_by)
    return _serialised(model)


def float_onnx_bytes(prepared: Prepared) -> bytes:
    """The float network of the student's quantized weights: what the quantized file is compared with in speed and size."""
    model = prepared.graph.clone()
    lower_float(model, prepared.weights)
    return _serialised(model)


def export_onnx(prepared: Prepared, path: str | Path, style: Style | None = None, made_by: Mapping[str, object] | None = None) -> Path:
    """Write the file, whole or not at all. Raises OutputError where it cannot be written."""
    return write_whole(path, onnx_bytes(prepared, style, made_by))


def _serialised(model: ir.Model) -> bytes:
    proto = ir.to_proto(model)
    if proto.ByteSize() >= _LIMIT:
        raise ExportError(f"the network takes {proto.ByteSize()} bytes, one ONNX file holds less than {_LIMIT}: choose fewer bits")
    data: bytes = proto.SerializeToString()
    return data


def _out_axis(layer: nn.Module) -> int:
    return 1 if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)) else 0
