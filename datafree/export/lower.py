"""From markers to operations of ONNX: QuantizeLinear, DequantizeLinear, integer convolutions.

After what :mod:`datafree.export.rewrite` does for every runtime, DequantizeLinear moves behind what only moves values; then every layer
gets its weight.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from datafree.export.grids import Grid
from datafree.export.integers import Array, Integers
from datafree.export.lower_openvino import guard
from datafree.export.rewrite import (
    alive,
    array,
    biased,
    codes_name,
    drop_points,
    float_weight,
    fold_norms,
    halve_norms,
    laid_out,
    layer_of,
    marked,
    out_axis,
    readers_of,
    replace_by,
    share_points,
    tidy,
    unclamped,
)
from datafree.export.unpack import Packing, Pen, unpacked

_MOVES = ("MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity")  # input 0 is moved, nothing else


@dataclass(frozen=True)
class Style:
    """What the file is for.

    Args:
        packing: how codes are stored.
        integer_outputs: a layer whose output is not quantized becomes ``ConvInteger`` or ``MatMulInteger``: ONNX Runtime has no other
            integer kernel for it. Else it stands between dequantizers, which OpenVINO takes.
        float_kernels: weights are packed, but all kernels work in float and activations are not rounded.
    """

    packing: Packing = "ort"
    integer_outputs: bool = True
    float_kernels: bool = False

    def integer(self, layer: ir.Node) -> bool:
        """Whether there is an integer kernel for the layer: ONNX Runtime has none for transposed convolutions."""
        return layer.op_type != "ConvTranspose" or not self.integer_outputs


def lower(model: ir.Model, weights: Mapping[str, Integers], grids: Mapping[str, Grid], style: Style) -> None:
    """Turn the markers of ``model`` into operations, in place."""
    graph = model.graph
    weights = fold_norms(graph, laid_out(graph, weights))
    halve_norms(graph)
    if style.float_kernels:
        drop_points(graph)
    share_points(graph, grids)
    if style.packing == "openvino-onnx":
        guard(graph)
    lower_points(graph, grids)
    common.RemoveUnusedNodesPass()(model)  # clamps that nobody reads any more would read what layers put out
    sink_dequantizers(graph)
    lower_layers(graph, weights, style)
    if style.integer_outputs:
        guard_float_layers(graph)
    tidy(model, weights)


def lower_float(model: ir.Model, weights: Mapping[str, Integers]) -> None:
    """Turn the markers of ``model`` into the float network with the quantized weights, in place."""
    graph = model.graph
    for node in marked(graph, "Quantized"):
        replace_by(graph, node, node.inputs[0])
    for node in marked(graph, "Weight"):
        name = node.attributes.get_string("layer")
        replace_by(graph, node, Pen(graph, node).constant(weights[name].values(), f"{name}.weight"))
    tidy(model, weights)


def lower_points(graph: ir.Graph, grids: Mapping[str, Grid]) -> None:
    """Quantizers as QuantizeLinear, Clip of the codes where they do not fill uint8, DequantizeLinear."""
    calls: dict[str, int] = {}
    for node in marked(graph, "Quantized"):
        point, pen = node.attributes.get_string("point"), Pen(graph, node)
        calls[point] = calls.get(point, 0) + 1
        value, bounded = unclamped(node.inputs[0], grids[point])
        scale = pen.constant(np.float32(bounded.scale), f"{point}.scale")
        zero = pen.constant(np.uint8(bounded.zero), f"code {bounded.zero}")
        codes = pen.op("QuantizeLinear", [value, scale, zero])
        if (bounded.low, bounded.high) != (0, 255):
            codes = pen.op("Clip", [codes, *(pen.constant(np.uint8(end), f"code {end}") for end in (bounded.low, bounded.high))])
        codes.name = codes_name(point, calls[point])
        replace_by(graph, node, pen.op("DequantizeLinear", [codes, scale, zero]))


def sink_dequantizers(graph: ir.Graph) -> None:
    """Let operations that only move values move codes."""
    for node in list(graph):
        maker = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        if maker is None or maker.op_type != "DequantizeLinear" or len(maker.inputs) != 3:
            continue
        if node.op_type in _MOVES and not node.outputs[0].is_graph_output():
            codes, *rest = maker.inputs
            node.replace_input_with(0, codes)
            moved = node.outputs[0]
            moved.type = ir.TensorType(ir.DataType.UINT8)
            behind = ir.node("DequantizeLinear", [moved, *rest])
            graph.insert_after(node, behind)
            for use in tuple(moved.uses()):
                if use.node is not behind:
                    use.node.replace_input_with(use.idx, behind.outputs[0])


def integer_layers(graph: ir.Graph) -> tuple[str, ...]:
    """The layers of a graph with markers whose weight and input are quantized: those that integer kernels can serve."""
    found: dict[str, bool] = {}
    for name, readers in readers_of(graph).items():
        users = [use for node in readers for use in (node.outputs[0].consumers() if node.op_type == "Transpose" else (node,))]
        makers = [_source(user.inputs[0]) for user in users]
        found[name] = all(maker is not None and maker.op_type == "Quantized" for maker in makers)
    return tuple(name for name, integer in found.items() if integer)


def _source(value: ir.Value) -> ir.Node | None:
    """What made the value, behind all that only moves values."""
    maker = value.producer()
    return _source(maker.inputs[0]) if maker is not None and maker.op_type in _MOVES else maker


def lower_layers(graph: ir.Graph, weights: Mapping[str, Integers], style: Style) -> None:
    """Give every layer its weight; those with an integer input and an integer weight become integer."""
    packed: dict[str, ir.Value] = {}
    for node in marked(graph, "Weight"):
        if (name := node.attributes.get_string("layer")) not in packed:
            packed[name] = unpacked(Pen(graph, node), weights[name], name, style.packing)
    for node in list(graph):
        if (name := layer_of(node)) is None:
            continue
        weight, pen, data = weights[name], Pen(graph, node), node.inputs[0].producer()
        node.name = name
        if data is None or data.op_type != "DequantizeLinear" or not style.integer(node) or not _multiplies(node, weight):
            node.replace_input_with(1, float_weight(pen, packed[name], weight, name))
            continue
        held = not biased(node) or _bias(node, data, alive(weight)) is not None
        if style.integer_outputs and (node.op_type == "MatMul" or node.op_type == "Conv" and not (held and _quantized(node.outputs[0]))):
            replace_by(graph, node, _integer_product(pen, node, data, packed[name], weight))
        elif held:
            _between_dequantizers(pen, node, data, packed[name], alive(weight))
        else:
            node.replace_input_with(1, float_weight(pen, packed[name], weight, name))
    for node in marked(graph, "Weight"):  # what is left is read by others than layers
        if node.outputs[0].uses():
            name = node.attributes.get_string("layer")
            replace_by(graph, node, float_weight(Pen(graph, node), packed[name], weights[name], name))


def _multiplies(node: ir.Node, weight: Integers) -> bool:
    """Whether an integer kernel can multiply by this weight: its integers are bytes, its scales those of output channels."""
    return weight.fits and weight.axis == out_axis(node)


def _bias(node: ir.Node, data: ir.Node, weight: Integers) -> tuple[Array, Array] | None:
    """The bias in steps of the accumulator, int32, and these steps, float32, (channels,) both; None where int32 does not hold it."""
    bias = array(node.inputs[2]).astype(np.float64)
    step = np.resize(weight.scale * np.float32(array(data.inputs[1])), len(bias))  # groups share the scales of transposed convolutions
    if not (step > 0).all() or np.abs(steps := np.round(bias / step)).max(initial=0) >= 2**31:
        return None
    return steps.astype(np.int32), step


def _quantized(value: ir.Value) -> bool:
    """Whether one quantizer is all that reads it."""
    readers = value.consumers()
    return len(readers) == 1 and readers[0].op_type == "QuantizeLinear" and not value.is_graph_output()


def _integer_product(pen: Pen, node: ir.Node, data: ir.Node, codes: ir.Value, weight: Integers) -> ir.Value:
    """The layer as an integer product, then its scale and bias in float: for outputs that are not quantized."""
    shape = [-1] if node.op_type == "MatMul" else [1, -1] + [1] * (weight.codes.ndim - 2)
    scale = weight.scale * np.float32(array(data.inputs[1]))
    value = pen.op(f"{node.op_type}Integer", [data.inputs[0], codes, data.inputs[2]], dict(node.attributes), name=node.name)
    value = pen.op("Cast", [value], {"to": ir.DataType.FLOAT})
    value = pen.op("Mul", [value, pen.constant(scale.reshape(shape), f"{node.name}.scale")])
    if biased(node):
        value = pen.op("Add", [value, pen.constant(array(node.inputs[2]).reshape(shape), f"{node.name}.bias")])
    return value


def _between_dequantizers(pen: Pen, node: ir.Node, data: ir.Node, codes: ir.Value, weight: Integers) -> None:
    """The layer as a float operation on dequantized tensors, which runtimes fuse to an integer kernel."""
    name = node.name
    inputs = [codes, pen.constant(weight.scale, f"{name}.weight.scale")]
    if node.op_type == "Gemm":  # fused by ONNX Runtime only where a zero point is given
        inputs.append(pen.constant(np.zeros(len(weight.scale), np.int8), f"zeros.{len(weight.scale)}"))
    node.replace_input_with(1, pen.op("DequantizeLinear", inputs, {"axis": weight.axis}))
    if biased(node):
        bias = _bias(node, data, weight)
        assert bias is not None
        stored = [pen.constant(each, f"{name}.{what}") for each, what in zip(bias, ("bias", "bias.scale"), strict=True)]
        node.replace_input_with(2, pen.op("DequantizeLinear", stored, {"axis": 0}))


def guard_float_layers(graph: ir.Graph) -> None:
    """Keep ONNX Runtime from rounding float weights to 8 bits and one scale, as it does between a dequantizer and a quantizer.

    It leaves them where the bias is not in the file as such: here it comes out of a DequantizeLinear in steps of 2^-30 of its largest.
    """
    for node in [node for node in graph if node.op_type in ("Conv", "ConvTranspose", "Gemm")]:
        data, weight = node.inputs[0].producer(), node.inputs[1]
        if data is None or data.op_type != "DequantizeLinear" or weight.shape is None or _made_by(weight, "DequantizeLinear"):
            continue
        if not biased(node):
            groups = node.attributes.get_int("group", 1) if node.op_type == "ConvTranspose" else 1
            bias = np.zeros(groups * weight.shape.numpy()[out_axis(node)])
        elif (tensor := ir.convenience.get_const_tensor(node.inputs[2])) is not None:
            bias = tensor.numpy().astype(np.float64)
        else:
            continue
        step = np.float32(np.abs(bias).max(initial=0) * 2.0**-30) or np.float32(1)
        pen = Pen(graph, node)
        stored = [pen.constant(np.round(bias / step).astype(np.int32), "bias"), pen.constant(step, "bias.step")]
        node.resize_inputs(3)
        node.replace_input_with(2, pen.op("DequantizeLinear", stored))


def _made_by(value: ir.Value, kind: str) -> bool:
    maker = value.producer()
    return maker is not None and maker.op_type == kind
