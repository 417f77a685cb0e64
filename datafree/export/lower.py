"""From markers to operations of ONNX: QuantizeLinear, DequantizeLinear, integer convolutions.

After what :mod:`datafree.export.rewrite` does for every runtime, DequantizeLinear moves behind what only moves values; then every layer
gets its weight.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from datafree.export.grids import Grid
from datafree.export.integers import Array, Integers
from datafree.export.lower_openvino import guard
from datafree.export.moves import moved_inputs, moved_outputs, sources, worth_moving
from datafree.export.names import layer_name, node_name
from datafree.export.rewrite import (
    alive,
    array,
    biased,
    codes_of_marker,
    drop_points,
    float_weight,
    fold_norms,
    halve_norms,
    laid_out,
    layer_of,
    marked,
    out_axis,
    put_behind,
    readers_of,
    replace_by,
    share_points,
    tidy,
    unclamped,
)
from datafree.export.unpack import Packing, Pen, unpacked
from datafree.plan import Plan


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


def lower(model: ir.Model, weights: Mapping[str, Integers], grids: Mapping[str, Grid], style: Style) -> dict[str, str]:
    """Turn the markers of ``model`` into operations, in place; returns why layers compute in float, by name."""
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
    reasons = lower_layers(graph, weights, style)
    if style.integer_outputs:
        guard_float_layers(graph)
    tidy(model, weights)
    return reasons


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
    for node in marked(graph, "Quantized"):
        point, pen = node.attributes.get_string("point"), Pen(graph, node)
        value, bounded = unclamped(node.inputs[0], grids[point])
        scale = pen.constant(np.float32(bounded.scale), f"{point}.scale")
        zero = pen.constant(np.uint8(bounded.zero), f"code {bounded.zero}")
        codes = pen.op("QuantizeLinear", [value, scale, zero])
        if (bounded.low, bounded.high) != (0, 255):
            codes = pen.op("Clip", [codes, *(pen.constant(np.uint8(end), f"code {end}") for end in (bounded.low, bounded.high))])
        codes.name = codes_of_marker(node)
        replace_by(graph, node, pen.op("DequantizeLinear", [codes, scale, zero]))


def sink_dequantizers(graph: ir.Graph) -> None:
    """Let operations that only move values move codes."""
    for node in list(graph):
        makers = [value.producer() for value in moved_inputs(node)]
        if not makers or not worth_moving(node) or not _on_one_grid(makers) or not _pads_with_a_code(graph, node):
            continue
        _, *grid = makers[0].inputs
        for place, maker in enumerate(makers):
            node.replace_input_with(place, maker.inputs[0])
        for moved in moved_outputs(node):
            put_behind(graph, moved, "DequantizeLinear", grid)
            moved.type = ir.TensorType(ir.DataType.UINT8)


def _on_one_grid(makers: Sequence[ir.Node | None]) -> TypeGuard[list[ir.Node]]:
    """Whether all are dequantizers of activations with the same scale and zero point."""
    if any(maker is None or maker.op_type != "DequantizeLinear" or len(maker.inputs) != 3 for maker in makers):
        return False
    return len({tuple(array(value).item() for value in maker.inputs[1:]) for maker in makers if maker is not None}) == 1


def _pads_with_a_code(graph: ir.Graph, node: ir.Node) -> bool:
    """Whether a Pad fills in a value that has a code, which it takes then; True for other operations."""
    if node.op_type != "Pad" or node.attributes.get_string("mode", "constant") != "constant":
        return True
    given = node.inputs[2] if len(node.inputs) > 2 else None
    number = None if given is None else ir.convenience.get_const_tensor(given)
    if given is not None and number is None:
        return False
    data = node.inputs[0].producer()
    scale, zero = (array(value) for value in data.inputs[1:])
    value = np.float32(0 if number is None else number.numpy().item())
    code = np.round(value / scale) + int(zero)
    if not 0 <= code <= 255 or np.float32(scale) * np.float32(code - int(zero)) != value:
        return False
    node.resize_inputs(max(3, len(node.inputs)))
    node.replace_input_with(2, Pen(graph, node).constant(np.uint8(code), f"code {int(code)}"))
    return True


def integer_layers(graph: ir.Graph, plan: Plan) -> tuple[str, ...]:
    """The layers of a graph with markers whose weight and input are quantized: those that integer kernels should serve."""
    found = []
    for name, readers in readers_of(graph).items():
        users = [use for node in readers for use in (node.outputs[0].consumers() if node.op_type == "Transpose" else (node,))]
        makers = [maker for user in users for maker in sources(user.inputs[0])]
        planned = name in plan.layers and plan.layers[name].input is not None
        if users and (planned or all(maker is not None and maker.op_type == "Quantized" for maker in makers)):
            found.append(name)
    return tuple(found)


def lower_layers(graph: ir.Graph, weights: Mapping[str, Integers], style: Style) -> dict[str, str]:
    """Give every layer its weight; those with an integer input and an integer weight become integer.

    Returns why the others compute in float, by name.
    """
    packed: dict[str, ir.Value] = {}
    reasons: dict[str, str] = {}
    calls: Counter[str] = Counter()
    for node in marked(graph, "Weight"):
        if (name := node.attributes.get_string("layer")) not in packed:
            packed[name] = unpacked(Pen(graph, node), weights[name], name, style.packing)
    for node in list(graph):
        if (name := layer_of(node)) is None:
            continue
        calls[name] += 1
        node.name = node_name(name, calls[name])
        weight, pen = weights[name], Pen(graph, node)
        if reason := _why_float(node, weight, style):
            reasons[name] = reason
            node.replace_input_with(1, float_weight(pen, packed[name], weight, name))
            continue
        data = node.inputs[0].producer()
        if style.integer_outputs and (node.op_type == "MatMul" or node.op_type == "Conv" and not _between_quantizers(node, data, weight)):
            replace_by(graph, node, _integer_product(pen, node, data, packed[name], weight))
        else:
            _between_dequantizers(pen, node, data, packed[name], alive(weight))
    for node in marked(graph, "Weight"):  # what is left is read by others than layers
        if node.outputs[0].uses():
            name = node.attributes.get_string("layer")
            reasons[name] = "an operation other than a layer uses its weight"
            replace_by(graph, node, float_weight(Pen(graph, node), packed[name], weights[name], name))
    return reasons


def _why_float(node: ir.Node, weight: Integers, style: Style) -> str:
    """Why no integer kernel can compute the layer; empty if one can."""
    data = node.inputs[0].producer()
    if data is None or data.op_type != "DequantizeLinear":
        return _why_no_codes(data)
    if not style.integer(node):
        return "ONNX Runtime has no integer kernel for transposed convolutions"
    if not weight.fits:
        return "its weights less their zero points do not fit int8"
    if weight.axis != out_axis(node):
        return f"its weights have a scale for each slice of axis {weight.axis}, integer kernels take one for each output channel"
    product = style.integer_outputs and node.op_type in ("MatMul", "Conv")  # these add the bias in float
    if not product and biased(node) and _bias(node, data, alive(weight)) is None:
        return "its bias does not fit int32 in steps of the product"
    return ""


def _why_no_codes(maker: ir.Node | None) -> str:
    if maker is not None and maker.op_type == "Concat":
        return "its input joins tensors on different grids"
    if maker is not None and maker.op_type == "Pad":
        return "its input is padded with a value that has no code"
    return "its input is not quantized"


def _between_quantizers(node: ir.Node, data: ir.Node, weight: Integers) -> bool:
    """Whether one quantizer is all that reads the layer, and int32 holds its bias."""
    value = node.outputs[0]
    readers = value.consumers()
    alone = len(readers) == 1 and readers[0].op_type == "QuantizeLinear" and not value.is_graph_output()
    return alone and (not biased(node) or _bias(node, data, alive(weight)) is not None)


def _bias(node: ir.Node, data: ir.Node, weight: Integers) -> tuple[Array, Array] | None:
    """The bias in steps of the accumulator, int32, and these steps, float32, (channels,) both; None where int32 does not hold it."""
    bias = array(node.inputs[2]).astype(np.float64)
    step = np.resize(weight.scale * np.float32(array(data.inputs[1])), len(bias))  # groups share the scales of transposed convolutions
    if not (step > 0).all() or np.abs(steps := np.round(bias / step)).max(initial=0) >= 2**31:
        return None
    return steps.astype(np.int32), step


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
    name = layer_name(node.name or "")
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
