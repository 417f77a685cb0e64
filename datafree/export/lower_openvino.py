"""From markers to what OpenVINO makes integer kernels of: FakeQuantize of 256 levels, and weights as products of integers and scales."""

from collections import Counter
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from datafree.export.grids import Grid
from datafree.export.integers import Integers
from datafree.export.names import node_name
from datafree.export.rewrite import (
    alive,
    array,
    biased,
    codes_of_marker,
    drop_points,
    float_weight,
    fold_norms,
    laid_out,
    layer_of,
    marked,
    put_behind,
    readers_of,
    replace_by,
    share_points,
    tidy,
    unclamped,
)
from datafree.export.unpack import Pen

OPENVINO = "org.openvinotoolkit"  # operations that only OpenVINO's reader knows


def lower_openvino(
    model: ir.Model, weights: Mapping[str, Integers], grids: Mapping[str, Grid], float_kernels: bool = False
) -> dict[str, Integers]:
    """Turn the markers of ``model`` into operations, in place; returns the weights as the layers take them.

    The integers of a weight become an input of the graph, :func:`weight_name`: ONNX has no constants of every width, so that these come
    in when OpenVINO has read the graph. With ``float_kernels`` activations are not rounded.
    """
    graph = model.graph
    weights = fold_norms(graph, laid_out(graph, weights))
    if float_kernels:
        drop_points(graph)
    share_points(graph, grids)
    guard(graph)
    _lower_points(graph, grids)
    common.RemoveUnusedNodesPass()(model)
    calls: Counter[str] = Counter()
    for node in list(graph):
        if (name := layer_of(node)) is not None:
            calls[name] += 1
            node.name = node_name(name, calls[name])
            _add_bias(graph, node, weights[name].codes.ndim)
    found = {name: alive(weights[name]) for name, readers in readers_of(graph).items() if readers}
    for name, weight in found.items():
        kind = ir.TensorType(ir.DataType.INT8 if weight.fits else ir.DataType.INT16)
        graph.inputs.append(ir.Value(name=weight_name(name), shape=ir.Shape(weight.codes.shape), type=kind))
    codes = {value.name: value for value in graph.inputs}
    for node in marked(graph, "Weight"):
        name = node.attributes.get_string("layer")
        replace_by(graph, node, float_weight(Pen(graph, node), codes[weight_name(name)], found[name], name))
    graph.opset_imports[OPENVINO] = 1
    tidy(model, found)
    return found


def weight_name(layer: str) -> str:
    """The input that stands for the integers of the layer's weight."""
    return f"{layer}.weight"


def guard(graph: ir.Graph) -> None:
    """Identities that OpenVINO (2026.4) does not see through, where its integer kernels would compute something else.

    Of a convolution, a quantizer, a sum and a quantizer it makes one kernel, in which the first quantizer does not round. A mean of
    codes it rounds to a code even where no quantizer follows, and reads memory it has not written when the batch is large.
    A layer that makes the output, without a bias, it would rename.
    """
    for node in list(graph):
        readers = node.outputs[0].consumers()
        mean = node.op_type in ("ReduceMean", "GlobalAveragePool")
        summed = (node.domain, node.op_type) == ("datafree", "Quantized") and readers and all(each.op_type == "Add" for each in readers)
        if mean or summed:
            pen = Pen(graph, node)
            node.replace_input_with(0, pen.op("PRelu", [node.inputs[0], pen.constant(np.ones(1, np.float32), "identity")]))
        elif layer_of(node) is not None and node.outputs[0].is_graph_output() and (node.op_type == "MatMul" or not biased(node)):
            put_behind(graph, node.outputs[0], "PRelu", [Pen(graph, node).constant(np.ones(1, np.float32), "identity")])


def _lower_points(graph: ir.Graph, grids: Mapping[str, Grid]) -> None:
    """Quantizers as FakeQuantize with 256 levels, the only number with integer kernels for all grids, behind a Clip to narrower ones."""
    for node in marked(graph, "Quantized"):
        point, pen = node.attributes.get_string("point"), Pen(graph, node)
        value, bounded = unclamped(node.inputs[0], grids[point])
        if (bounded.low, bounded.high) != (0, 255):
            value = pen.op("Clip", [value, *(pen.constant(bounded.value(end), "end") for end in (bounded.low, bounded.high))])
        ends = [pen.constant(bounded.value(end), "end") for end in (0, 255)]
        value = pen.op("FakeQuantize", [value, *ends, *ends], {"levels": 256}, domain=OPENVINO)
        value.name = codes_of_marker(node)
        replace_by(graph, node, value)


def _add_bias(graph: ir.Graph, layer: ir.Node, rank: int) -> None:
    """The bias as an addition: what OpenVINO's reader makes of a third input is several operations."""
    if layer.op_type == "MatMul" or not biased(layer):
        return
    bias = array(layer.inputs[2]).reshape([1, -1] + [1] * (rank - 2))
    layer.resize_inputs(2)
    put_behind(graph, layer.outputs[0], "Add", [Pen(graph, layer).constant(bias, f"{layer.name}.bias")])
