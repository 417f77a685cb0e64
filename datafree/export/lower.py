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
    if style.integer_outputs:
        guard_float_layers(graph)
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
        value.name, value.type, value.shape = f"c{number}", None, None
    for node in graph:
        if node.name not in layers:
            node.name = ""
        for key in [key for key, each in node.attributes.items() if _is_default(key, each.value)]:
            del node.attributes[key]


def _is_default(key: str, value: object) -> bool:
    """Whether ONNX takes the same where the attribute of a convolution is absent."""
    ends = {"auto_pad": {"NOTSET"}, "group": {1}, "dilations": {1}, "strides": {1}, "pads": {0}, "output_padding": {0}}
    return key in ends and set(value if isinstance(value, (tuple, list)) else (value,)) <= ends[key]


def _marked(graph: ir.Graph, kind: str) -> list[ir.Node]:
    return [node for node in graph if node.domain == "datafree" and node.op_type == kind]


def _replace(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Let ``value`` stand for what the node gives, under its name where that goes out of the graph."""
    old = node.outputs[0]
    if old.is_graph_output():
        value.name, value.type, value.shape = old.name, old.type, old.shape
    ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def layer_of(node: ir.Node) -> str | None:
    """The layer whose weight the node takes as its second input, None if it takes none."""
    maker = node.inputs[1].producer() if len(node.inputs) > 1 and node.inputs[1] is not None else None
    return maker.attributes.get_string("layer") if maker is not None and (maker.domain, maker.op_type) == ("datafree", "Weight") else None


def _readers(graph: ir.Graph) -> dict[str, list[ir.Node]]:
    """Who takes the weight of each layer: a node for each time."""
    found: dict[str, list[ir.Node]] = {}
    for node in _marked(graph, "Weight"):
        found.setdefault(node.attributes.get_string("layer"), []).extend(use.node for use in node.outputs[0].uses())
    return found


def _laid_out(graph: ir.Graph, weights: Mapping[str, Integers]) -> dict[str, Integers]:
    """The weights with the transposition that linear layers put before their product, where all who read a weight put the same."""
    found = dict(weights)
    for name, readers in _readers(graph).items():
        orders = {tuple(node.attributes.get_ints("perm")) if node.op_type == "Transpose" else () for node in readers}
        if len(orders) == 1 and (order := orders.pop()):
            found[name] = weights[name].transposed(order)
            for node in readers:
                value = node.inputs[0]
                assert value is not None
                _replace(graph, node, value)
    return found


def _out_axis(layer: ir.Node) -> int:
    """The axis of output channels in the weight of the layer."""
    first = layer.op_type == "Conv" or layer.op_type == "Gemm" and layer.attributes.get_int("transB", 0) == 1
    return 0 if first else 1


def fold_norms(graph: ir.Graph, weights: Mapping[str, Integers]) -> dict[str, Integers]:
    """Batch norms that alone follow a layer that is called once, as part of its scales and bias."""
    found = dict(weights)
    readers = _readers(graph)
    for norm in [node for node in graph if node.op_type == "BatchNormalization"]:
        layer = norm.inputs[0].producer()
        name = None if layer is None else layer_of(layer)
        if layer is None or name is None or len(readers[name]) > 1 or len(layer.outputs[0].uses()) > 1 or layer.op_type == "MatMul":
            continue
        gamma, beta, mean, var = (_array(value) for value in norm.inputs[1:])
        if len(found[name].scale) != len(gamma) or found[name].axis != _out_axis(layer):
            continue  # a grouped transposed convolution shares its scales among groups
        factor = gamma / np.sqrt(var + norm.attributes.get_float("epsilon", 1e-5))
        bias = _array(layer.inputs[2]) if _biased(layer) else np.zeros_like(mean)
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
    for name, readers in _readers(graph).items():
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
    for node in _marked(graph, "Weight"):
        if (name := node.attributes.get_string("layer")) not in packed:
            packed[name] = unpacked(Pen(graph, node), weights[name], name, style.packing)
    for node in list(graph):
        if (name := layer_of(node)) is None:
            continue
        weight, pen, data = weights[name], Pen(graph, node), node.inputs[0].producer()
        node.name = name
        if data is None or data.op_type != "DequantizeLinear" or not style.integer(node) or not _multiplies(node, weight):
            node.replace_input_with(1, _float_weight(pen, packed[name], weight, name))
            continue
        held = not _biased(node) or _bias(node, data, _alive(weight)) is not None
        if style.integer_outputs and (node.op_type == "MatMul" or node.op_type == "Conv" and not (held and _quantized(node.outputs[0]))):
            _replace(graph, node, _integer_product(pen, node, data, packed[name], weight))
        elif held:
            _between_dequantizers(pen, node, data, packed[name], _alive(weight))
        else:
            node.replace_input_with(1, _float_weight(pen, packed[name], weight, name))
    for node in _marked(graph, "Weight"):  # what is left is read by others than layers
        if node.outputs[0].uses():
            name = node.attributes.get_string("layer")
            _replace(graph, node, _float_weight(Pen(graph, node), packed[name], weights[name], name))


def _multiplies(node: ir.Node, weight: Integers) -> bool:
    """Whether an integer kernel can multiply by this weight: its integers are bytes, its scales those of output channels."""
    return weight.fits and weight.axis == _out_axis(node)


def _biased(node: ir.Node) -> bool:
    return len(node.inputs) > 2 and node.inputs[2] is not None


def _bias(node: ir.Node, data: ir.Node, weight: Integers) -> tuple[Array, Array] | None:
    """The bias in steps of the accumulator, int32, and these steps, float32, (channels,) both; None where int32 does not hold it."""
    bias = _array(node.inputs[2]).astype(np.float64)
    step = np.resize(weight.scale * np.float32(_array(data.inputs[1])), len(bias))  # groups share the scales of transposed convolutions
    if not (step > 0).all() or np.abs(steps := np.round(bias / step)).max(initial=0) >= 2**31:
        return None
    return steps.astype(np.int32), step


def _quantized(value: ir.Value) -> bool:
    """Whether one quantizer is all that reads it."""
    readers = value.consumers()
    return len(readers) == 1 and readers[0].op_type == "QuantizeLinear" and not value.is_graph_output()


def _float_weight(pen: Pen, codes: ir.Value, weight: Integers, name: str) -> ir.Value:
    """A product that runtimes compute once, when they load the file."""
    value = pen.op("Cast", [codes], {"to": ir.DataType.FLOAT})
    value = pen.op("Mul", [value, pen.constant(weight.along(weight.scale), f"{name}.weight.scale")])
    value.shape = ir.Shape(weight.codes.shape)
    return value


def _integer_product(pen: Pen, node: ir.Node, data: ir.Node, codes: ir.Value, weight: Integers) -> ir.Value:
    """The layer as an integer product, then its scale and bias in float: for outputs that are not quantized."""
    shape = [-1] if node.op_type == "MatMul" else [1, -1] + [1] * (weight.codes.ndim - 2)
    scale = weight.scale * np.float32(_array(data.inputs[1]))
    value = pen.op(f"{node.op_type}Integer", [data.inputs[0], codes, data.inputs[2]], dict(node.attributes), name=node.name)
    value = pen.op("Cast", [value], {"to": ir.DataType.FLOAT})
    value = pen.op("Mul", [value, pen.constant(scale.reshape(shape), f"{node.name}.scale")])
    if _biased(node):
        value = pen.op("Add", [value, pen.constant(_array(node.inputs[2]).reshape(shape), f"{node.name}.bias")])
    return value


def _between_dequantizers(pen: Pen, node: ir.Node, data: ir.Node, codes: ir.Value, weight: Integers) -> None:
    """The layer as a float operation on dequantized tensors, which runtimes fuse to an integer kernel."""
    name = node.name
    inputs = [codes, pen.constant(weight.scale, f"{name}.weight.scale")]
    if node.op_type == "Gemm":  # fused by ONNX Runtime only where a zero point is given
        inputs.append(pen.constant(np.zeros(len(weight.scale), np.int8), f"zeros.{len(weight.scale)}"))
    node.replace_input_with(1, pen.op("DequantizeLinear", inputs, {"axis": weight.axis}))
    if _biased(node):
        bias = _bias(node, data, weight)
        assert bias is not None
        stored = [pen.constant(each, f"{name}.{what}") for each, what in zip(bias, ("bias", "bias.scale"), strict=True)]
        node.replace_input_with(2, pen.op("DequantizeLinear", stored, {"axis": 0}))


def _alive(weight: Integers) -> Integers:
    """Channels that are 0 throughout take the largest scale of the others: theirs may be 0, and a bias is counted in it."""
    rest = tuple(axis for axis in range(weight.codes.ndim) if axis != weight.axis)
    dead = (weight.multiplied() == 0).all(axis=rest)
    largest = weight.scale[~dead].max(initial=0) or 1.0
    return replace(weight, scale=np.where(dead, largest, weight.scale).astype(np.float32))


def guard_float_layers(graph: ir.Graph) -> None:
    """Keep ONNX Runtime from rounding float weights to 8 bits and one scale, as it does between a dequantizer and a quantizer.

    It leaves them where the bias is not in the file as such: here it comes out of a DequantizeLinear in steps of 2^-30 of its largest.
    """
    for node in [node for node in graph if node.op_type in ("Conv", "ConvTranspose", "Gemm")]:
        data, weight = node.inputs[0].producer(), node.inputs[1]
        if data is None or data.op_type != "DequantizeLinear" or weight.shape is None or _made_by(weight, "DequantizeLinear"):
            continue
        if not _biased(node):
            groups = node.attributes.get_int("group", 1) if node.op_type == "ConvTranspose" else 1
            bias = np.zeros(groups * weight.shape.numpy()[_out_axis(node)])
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
