"""ONNX files with weights at their true size, whose quantized layers run on integer kernels.

``prepare`` traces a student once; ``export_onnx`` writes it in a style, ``export_float_onnx`` as the float network that it is compared
with. The batch is dynamic, batch norms are folded, and the metadata say what made the file. Weights that one protobuf message cannot hold
stand in a second file beside it (ONNX calls that external data).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir
from torch import nn

from datafree.errors import ExportError
from datafree.export.files import external_data, whole_files, write_whole
from datafree.export.grids import Grid, grid
from datafree.export.header import header
from datafree.export.integers import Integers, integers
from datafree.export.lower import Style, integer_layers, lower, lower_float
from datafree.export.rewrite import readers_of
from datafree.export.trace import trace
from datafree.plan import Plan
from datafree.quant.freeze import freeze
from datafree.quant.insert import plan_of, quantizers
from datafree.task import Task

_TWO_BITS = frozenset((ir.DataType.INT2, ir.DataType.UINT2))
LIMIT = 2**31  # bytes: what one protobuf message holds


@dataclass(frozen=True, eq=False)
class Prepared:
    """A student read for export.

    Args:
        graph: with markers for weights and activations, see ``export.trace``; nobody may change it.
        weights: of the quantized layers, by name.
        grids: of the quantized activations, by point.
        plan: of the student.
        integer: the layers whose weight and input are quantized, which are to run on integer kernels.
        layers: the layers with quantized weights that take part in what the network returns.
        limit: of the bytes of a file; beyond it the weights stand in a second one.
    """

    graph: ir.Model
    weights: Mapping[str, Integers]
    grids: Mapping[str, Grid]
    plan: Plan
    integer: tuple[str, ...]
    layers: tuple[str, ...]
    limit: int = LIMIT


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
    plan = plan_of(student)
    layers = tuple(name for name, readers in readers_of(model.graph).items() if readers)
    return Prepared(model, weights, grids, plan, integer_layers(model.graph, plan), layers)


def export_onnx(prepared: Prepared, path: str | Path, style: Style | None = None, made_by: Mapping[str, object] | None = None) -> Path:
    """Write the file, whole or not at all; where it would pass ``prepared.limit``, its weights go to ``path`` with ``.data`` behind.

    ``made_by`` (method, hash of the source weights, ...) goes into its metadata beside plan and versions.

    Raises OutputError where it cannot be written.
    """
    model, style = prepared.graph.clone(), style or Style()
    reasons = lower(model, prepared.weights, prepared.grids, style)
    kinds = {value.const_value.dtype for value in model.graph.initializers.values() if value.const_value is not None}
    if kinds & _TWO_BITS:
        model.graph.opset_imports[""], model.ir_version = 25, 13  # the first with 2-bit integers
    model.producer_name, model.producer_version = "datafree", version("datafree")
    reasons = {} if style.float_kernels else {name: reasons[name] for name in prepared.integer if name in reasons}
    model.metadata_props["datafree"] = header(prepared.plan, style.float_kernels, made_by, reasons)
    return write_model(model, path, prepared.limit)


def export_float_onnx(prepared: Prepared, path: str | Path) -> Path:
    """Write the float network of the student's quantized weights: what the quantized file is compared with in speed and size."""
    model = prepared.graph.clone()
    lower_float(model, prepared.weights)
    return write_model(model, path, prepared.limit)


def write_model(model: ir.Model, path: str | Path, limit: int = LIMIT) -> Path:
    """Write a graph as one file, or as two where one would take ``limit`` bytes: both or none. Raises OutputError."""
    file = Path(path)
    tensors = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    if sum(tensor.nbytes for tensor in tensors) < limit - limit // 16:  # the rest is for the graph
        proto = ir.to_proto(model)
        if proto.ByteSize() < limit:
            return write_whole(file, proto.SerializeToString())
    with whole_files(file) as folder:
        ir.save(model, folder / file.name, external_data=external_data(file).name)
    return file


def _out_axis(layer: nn.Module) -> int:
    return 1 if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)) else 0
