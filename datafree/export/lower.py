"""From markers to the operations of a runtime: QuantizeLinear, DequantizeLinear, integer convolutions.

What makes integer kernels possible, in this order: batch norms go into scales and biases; equal quantizers become one; a clamp that only
quantizers read becomes a bound of their codes; DequantizeLinear moves behind what only moves values. Then every layer gets its weight.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from datafree.errors import ExportError
from datafree.export.integers import Array, Integers
from datafree.export.unpack import Packing, Pen, unpacked
from datafree.quant.quantizer import Quantizer

CODES = ".codes"
_MOVES = ("MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity")  # input 0 is moved, nothing else


@dataclass(frozen=True)
class Grid:
    """Codes of an activation, uint8 in a runtime: ``value = scale * (code - zero)``, codes from ``low`` to ``high``."""

    scale: float
    zero: int
    low: int
    high: int

    def code(self, value: float) -> int:
        """The code of a value, clipped to the grid."""
        steps = np.round(np.float32(value) / np.float32(self.scale)) + self.zero
        return int(np.clip(steps, self.low, self.high))


def grid(point: str, quantizer: Quantizer) -> Grid:
    """The grid of an activation. Raises ExportError where it has a scale for each channel, which no runtime takes."""
    spec = quantizer.spec
    if spec.axis is not None:
        raise ExportError(f"{point} has a scale for each slice of axis {spec.axis}: runtimes take one for the tensor; use axis None")
    if spec.grid != "uniform":
        raise ExportError(f"{point} is on a {spec.grid} grid: runtimes take uniform ones for activations")
    low, high = spec.levels
    shift = 128 if low < 0 else 0  # uint8 throughout: the fastest kernels multiply uint8 by int8
    return Grid(float(quantizer.scale), int(quantizer.zero) + shift, low + shift, high + shift)


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
    weights = fold_norms(graph, _laid_out(graph, weights))
    if style.float_kernels:
        drop_points(graph)
    share_points(graph, grids)
    lower_points(graph, grids)
    common.RemoveUnusedNodesPass()(model)  # clamps that nobody reads any more would read what layers put out
    sink_dequantizers(graph)
    lower_layers(graph, weights, style)
    _tidy(model, weights)


def lower_float(model: ir.Model, weights: Mapping[str, Integers]) -> None:
    """Turn the markers of ``model`` into the float network with the quantized weights, in place."""
    graph = model.graph
    for node in _marked(graph, "Quantized"):
        _replace(graph, node, node.inputs[0])
    for node in _marked(graph, "Weight"):
        name = node.attributes.get_string("layer")
        _replace(graph, node, Pen(graph, node).constant(weights[name].values(), f"{name}.weight"))
    _tidy(model, weights)


def _tidy(model: ir.Model, layers: Collection[str]) -> None:
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    common.ClearMetadataAndDocStringPass()(model)
    common.NameFixPass()(model)
    _shorten(model.graph, layers)


def _shorten(graph: ir.Graph, layers: Collection[str]) -> None:
    """Names that say something stay: layers, codes of points, what goes in and out. The others would double small files."""
    told = {*graph.inputs, *graph.outputs}
    values = [value for node in graph for value in node.outputs if value not in told]
    for number, value in enumerate(values):
        if value.name is None or not value.name.endswith(CODES):
            value.name, value.type, value.shape = f"v{number}", None, None
    for number, value in enumerate(list(graph.initializers.values())):
        value.name = f"c{number}"
    for node in graph:
        if node.name not in layers:
            node.name = ""


def _marked(graph: ir.Graph, kind: str) -> list[ir.Node]:
    return [node for node in graph if node.domain == "datafree" and node.op_type == kind]


def _replace(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    ir.convenience.replace_all_uses_with(node.outputs[0], value, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def layer_of(node: ir.Node) -> str | None:
    """The layer whose weight the node takes as its second input, None if it takes none."""
    maker = node.inputs[1].producer() if len(node.inputs) > 1 and node.inputs[1] is not None else None
    if maker is not None and maker.op_type == "Transpose":
        maker = maker.inputs[0].producer()
    return maker.attributes.get_string("layer") if maker is not None and (maker.domain, maker.op_type) == ("datafree", "Weight") else None


def _laid_out(graph: ir.Graph, weights: Mapping[str, Integers]) -> dict[str, Integers]:
    """The weights with the transposition that linear layers put before their product."""
    found = dict(weights)
    for node in _marked(graph, "Weight"):
        for use in tuple(node.outputs[0].consumers()):
            if use.op_type == "Transpose":
                name = node.attributes.get_string("layer")
                order = tuple(use.attributes.get_ints("perm"))
                if found[name].codes.shape == weights[name].codes.shape and found[name] is weights[name]:
                    found[name] = weights[name].transposed(order)
                _replace(graph, use, node.outputs[0])
    return found


def fold_norms(graph: ir.Graph, weights: Mapping[str, Integers]) -> dict[str, Integers]:
    """Batch norms that alone follow a layer that is called once, as part of its scales and bias."""
    found = dict(weights)
    calls: dict[str, int] = {}
    for node in graph:
        if (name := layer_of(node)) is not None:
            calls[name] = calls.get(name, 0) + 1
    for norm in [node for node in graph if node.op_type == "BatchNormalization"]:
        layer = norm.inputs[0].producer()
        name = None if layer is None else layer_of(layer)
        if layer is None or name is None or calls[name] > 1 or len(layer.outputs[0].uses()) > 1 or layer.op_type == "MatMul":
            continue
        gamma, beta, mean, var = (_array(value) for value in norm.inputs[1:])
        if len(found[name].scale) != len(gamma):
            continue  # a grouped transposed convolution shares its scales among groups
        factor = gamma / np.sqrt(var + norm.attributes.get_float("epsilon", 1e-5))
        bias = _array(layer.inputs[2]) if len(layer.inputs) > 2 else np.zeros_like(mean)
        found[name] = found[name].scaled(factor)
        folded = Pen(graph, layer).constant((beta + factor * (bias - mean)).astype(np.float32), f"{name}.bias.folded")
        layer.resize_inputs(3)
        layer.replace_input_with(2, folded)
        _replace(graph, norm, layer.outputs[0])
    return found


def _array(value: ir.Value | None) -> Array:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    if tensor is None:
        raise ExportError(f"{value} is no constant, as the bias of a layer or the statistics of a norm have to be")
    return np.asarray(tensor.numpy())


def drop_points(graph: ir.Graph) -> None:
    """Take off all quantizers of activations: between them ONNX Runtime would round the float weights of a layer anew, its own way."""
    for node in _marked(graph, "Quantized"):
        _replace(graph, node, node.inputs[0])


def share_points(graph: ir.Graph, grids: Mapping[str, Grid]) -> None:
    """One quantizer where several quantize the same tensor to the same grid."""
    first: dict[tuple[ir.Value | None, Grid], ir.Node] = {}
    for node in _marked(graph, "Quantized"):
        key = (node.inputs[0], grids[node.attributes.get_string("point")])
        if key in first:
            _replace(graph, node, first[key].outputs[0])
        else:
            first[key] = node


def lower_points(graph: ir.Graph, grids: Mapping[str, Grid]) -> None:
    """Quantizers as QuantizeLinear, Clip of the codes where they do not fill uint8, DequantizeLinear."""
    calls: dict[str, int] = {}
    for node in _marked(graph, "Quantized"):
        point, pen = node.attributes.get_string("point"), Pen(graph, node)
        calls[point] = calls.get(point, 0) + 1
        value, bounded = _unclamped(node.inputs[0], grids[point])
        scale = pen.constant(np.float32(bounded.scale), f"{point}.scale")
        zero = pen.constant(np.uint8(bounded.zero), f"code {bounded.zero}")
        codes = pen.op("QuantizeLinear", [value, scale, zero])
        if (bounded.low, bounded.high) != (0, 255):
            codes = pen.op("Clip", [codes, *(pen.constant(np.uint8(end), f"code {end}") for end in (bounded.low, bounded.high))])
        codes.name = codes_name(point, calls[point])
        _replace(graph, node, pen.op("DequantizeLinear", [codes, scale, zero]))


def codes_name(point: str, call: int = 1) -> str:
    """The tensor in the file that holds the codes of a point; the second call of its module has its own, and so on."""
    return f"{point}{'' if call == 1 else f'.{call}'}{CODES}"


def _unclamped(value: ir.Value, found: Grid) -> tuple[ir.Value, Grid]:
    """The tensor before a clamp that only quantizers read, and the grid bounded by what the clamp would have let through."""
    maker = value.producer()
    if maker is None or any(use.op_type not in ("Quantized", "QuantizeLinear") for use in value.consumers()):
        return value, found
    if maker.op_type == "Relu":
        low, high = 0.0, np.inf
    elif maker.op_type == "Clip":
        ends = [None if end is None else ir.convenience.get_const_tensor(end) for end in (*maker.inputs[1:], None, None)[:2]]
        low, high = (float(limit if end is None else end.numpy()) for limit, end in zip((-np.inf, np.inf), ends, strict=True))
    else:
        return value, found
    return maker.inputs[0], replace(found, low=found.code(low), high=found.code(high))


def sink_dequantizers(graph: ir.Graph) -> None:
    """Let operations that only move values move codes."""
    for node in list(graph):
        maker = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        if node.op_type in _MOVES and maker is not None and maker.op_type == "DequantizeLinear" and len(maker.inputs) == 3:
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
    for node in graph:
        if (name := layer_of(node)) is not None:
            maker = node.inputs[0].producer()
            while maker is not None and maker.op_type in _MOVES:
                maker = maker.inputs[0].producer()
            found[name] = found.get(name, True) and maker is not None and maker.op_type == "Quantized"
    return tuple(name for name, integer in found.items() if integer)


def lower_layers(graph: ir.Graph, weights: Mapping[str, Integers], style: Style) -> None:
    """Give every layer its weight; those with an integer input and an integer weight become integer."""
    packed: dict[str, ir.Value] = {}
    for node in list(graph):
        if (name := layer_of(node)) is None:
            continue
        weight, pen = weights[name], Pen(graph, node)
        node.name = name
        if name not in packed:
            packed[name] = unpacked(pen, weight, name, style.packing)
        data = node.inputs[0].producer()
        if data is None or data.op_type != "DequantizeLinear" or not weight.fits or not style.integer(node):
            node.replace_input_with(1, _float_weight(pen, packed[name], weight, name))
        elif style.integer_outputs and (node.op_type == "MatMul" or node.op_type == "Conv" and not _quantized(node.outputs[0])):
            _replace(graph, node, _integer_product(pen, node, data, packed[name], weight))
        else:
            _between_dequantizers(pen, node, data, packed[name], _alive(weight))


def _quantized(value: ir.Value) -> bool:
    """Whether one quantizer is all that reads it."""
    readers = value.consumers()
    return len(readers) == 1 and readers[0].op_type == "QuantizeLinear" and not value.is_graph_output()


def _float_weight(pen: Pen, codes: ir.Value, weight: Integers, name: str) -> ir.Value:
    """A product that runtimes compute once, when they load the file."""
    value = pen.op("Cast", [codes], {"to": ir.DataType.FLOAT})
    return pen.op("Mul", [value, pen.constant(weight.along(weight.scale), f"{name}.weight.scale")])


def _integer_product(pen: Pen, node: ir.Node, data: ir.Node, codes: ir.Value, weight: Integers) -> ir.Value:
    """The layer as an integer product, then its scale and bias in float: for outputs that are not quantized."""
    shape = [-1] if node.op_type == "MatMul" else [1, -1] + [1] * (weight.codes.ndim - 2)
    scale = weight.scale * np.float32(_array(data.inputs[1]))
    value = pen.op(f"{node.op_type}Integer", [data.inputs[0], codes, data.inputs[2]], dict(node.attributes), name=node.name)
    value = pen.op("Cast", [value], {"to": ir.DataType.FLOAT})
    value = pen.op("Mul", [value, pen.constant(scale.reshape(shape), f"{node.name}.scale")])
    if len(node.inputs) > 2:
        value = pen.op("Add", [value, pen.constant(_array(node.inputs[2]).reshape(shape), f"{node.name}.bias")])
    return value


def _between_dequantizers(pen: Pen, node: ir.Node, data: ir.Node, codes: ir.Value, weight: Integers) -> None:
    """The layer as a float operation on dequantized tensors, which runtimes fuse to an integer kernel."""
    name, scale = node.name, weight.scale * np.float32(_array(data.inputs[1]))
    inputs = [codes, pen.constant(weight.scale, f"{name}.weight.scale")]
    if node.op_type == "Gemm":  # fused by ONNX Runtime only where a zero point is given
        inputs.append(pen.constant(np.zeros(len(scale), np.int8), f"zeros.{len(scale)}"))
    node.replace_input_with(1, pen.op("DequantizeLinear", inputs, {"axis": weight.axis}))
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = np.round(_array(node.inputs[2]).astype(np.float64) / scale)
        if np.abs(bias).max(initial=0) < 2**31:
            stored = [pen.constant(bias.astype(np.int32), f"{name}.bias"), pen.constant(scale, f"{name}.bias.scale")]
            node.replace_input_with(2, pen.op("DequantizeLinear", stored, {"axis": 0}))


def _alive(weight: Integers) -> Integers:
    """Channels that are 0 throughout take the largest scale of the others: theirs may be 0, and a bias is counted in it."""
    rest = tuple(axis for axis in range(weight.codes.ndim) if axis != weight.axis)
    dead = (weight.multiplied() == 0).all(axis=rest) | (weight.scale == 0)
    return replace(weight, scale=np.where(dead, weight.scale.max(initial=0) or 1.0, weight.scale).astype(np.float32))
