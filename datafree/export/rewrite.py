"""What every runtime wants done to a marked graph, whatever operations stand for the markers in the end.

Batch norms go into scales and biases; equal quantizers become one; a clamp that only quantizers read becomes a bound of their codes.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from datafree.errors import ExportError
from datafree.export.grids import Grid
from datafree.export.integers import Array, Integers
from datafree.export.names import CODES, codes_name, layer_name
from datafree.export.unpack import Pen


def laid_out(graph: ir.Graph, weights: Mapping[str, Integers]) -> dict[str, Integers]:
    """The weights with the transposition that linear layers put before their product, where all who read a weight put the same."""
    found = dict(weights)
    for name, readers in readers_of(graph).items():
        orders = {tuple(node.attributes.get_ints("perm")) if node.op_type == "Transpose" else () for node in readers}
        if len(orders) == 1 and (order := orders.pop()):
            found[name] = weights[name].transposed(order)
            for node in readers:
                value = node.inputs[0]
                assert value is not None
                replace_by(graph, node, value)
    return found


def readers_of(graph: ir.Graph) -> dict[str, list[ir.Node]]:
    """Who takes the weight of each layer: a node for each time."""
    found: dict[str, list[ir.Node]] = {}
    for node in marked(graph, "Weight"):
        found.setdefault(node.attributes.get_string("layer"), []).extend(use.node for use in node.outputs[0].uses())
    return found


def layer_of(node: ir.Node) -> str | None:
    """The layer whose weight the node takes as its second input, None if it takes none."""
    maker = node.inputs[1].producer() if len(node.inputs) > 1 and node.inputs[1] is not None else None
    return maker.attributes.get_string("layer") if maker is not None and (maker.domain, maker.op_type) == ("datafree", "Weight") else None


def out_axis(layer: ir.Node) -> int:
    """The axis of output channels in the weight of the layer."""
    first = layer.op_type == "Conv" or layer.op_type == "Gemm" and layer.attributes.get_int("transB", 0) == 1
    return 0 if first else 1


def biased(node: ir.Node) -> bool:
    """Whether the layer has a bias."""
    return len(node.inputs) > 2 and node.inputs[2] is not None


def fold_norms(graph: ir.Graph, weights: Mapping[str, Integers]) -> dict[str, Integers]:
    """Batch norms that alone follow a layer that is called once, as part of its scales and bias."""
    found = dict(weights)
    readers = readers_of(graph)
    for norm in [node for node in graph if node.op_type == "BatchNormalization"]:
        layer = norm.inputs[0].producer()
        name = None if layer is None else layer_of(layer)
        if layer is None or name is None or len(readers[name]) > 1 or layer.op_type == "MatMul":
            continue
        if len(layer.outputs[0].uses()) > 1 or layer.outputs[0].is_graph_output():
            continue
        gamma, beta, mean, var = (array(value) for value in norm.inputs[1:])
        if len(found[name].scale) != len(gamma) or found[name].axis != out_axis(layer):
            continue  # a grouped transposed convolution shares its scales among groups
        factor = gamma / np.sqrt(var + norm.attributes.get_float("epsilon", 1e-5))
        bias = array(layer.inputs[2]) if biased(layer) else np.zeros_like(mean)
        found[name] = found[name].scaled(factor)
        folded = Pen(graph, layer).constant((beta + factor * (bias - mean)).astype(np.float32), f"{name}.bias.folded")
        layer.resize_inputs(3)
        layer.replace_input_with(2, folded)
        replace_by(graph, norm, layer.outputs[0])
    return found


def halve_norms(graph: ir.Graph) -> None:
    """Batch norms that stay get by with a factor and a shift: means of 0 and variances of 1 are made when the file is loaded."""
    made: dict[int, tuple[ir.Value, ir.Value]] = {}
    for norm in [node for node in graph if node.op_type == "BatchNormalization"]:
        if any(value is None or ir.convenience.get_const_tensor(value) is None for value in norm.inputs[1:]):
            continue
        gamma, beta, mean, var = (array(value) for value in norm.inputs[1:])
        factor = gamma / np.sqrt(var + norm.attributes.get_float("epsilon", 1e-5))
        pen, size = Pen(graph, norm), len(gamma)
        if size not in made:  # a norm of this size further down finds them made
            shape = pen.constant(np.array([size]), "channels")
            zeros, ones = (pen.op("ConstantOfShape", [shape], {"value": ir.tensor([number])}) for number in (0.0, 1.0))
            made[size] = zeros, ones
        norm.replace_input_with(1, pen.constant(factor.astype(np.float32), "factor"))
        norm.replace_input_with(2, pen.constant((beta - factor * mean).astype(np.float32), "shift"))
        for place, value in zip((3, 4), made[size], strict=True):
            norm.replace_input_with(place, value)
        norm.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.0)


def drop_points(graph: ir.Graph) -> None:
    """Take off all quantizers of activations: between them ONNX Runtime would round the float weights of a layer anew, its own way."""
    for node in marked(graph, "Quantized"):
        replace_by(graph, node, node.inputs[0])


def share_points(graph: ir.Graph, grids: Mapping[str, Grid]) -> None:
    """One quantizer where several quantize the same tensor to the same grid."""
    first: dict[tuple[ir.Value | None, Grid], ir.Node] = {}
    for node in marked(graph, "Quantized"):
        key = (node.inputs[0], grids[node.attributes.get_string("point")])
        if key in first:
            replace_by(graph, node, first[key].outputs[0])
        else:
            first[key] = node


def unclamped(value: ir.Value, found: Grid) -> tuple[ir.Value, Grid]:
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


def codes_of_marker(node: ir.Node) -> str:
    """The tensor that holds the codes of a marker ``Quantized``."""
    return codes_name(node.attributes.get_string("point"), node.attributes.get_int("call", 1))


def float_weight(pen: Pen, codes: ir.Value, weight: Integers, name: str) -> ir.Value:
    """A product that runtimes compute once, when they load the file."""
    value = pen.op("Cast", [codes], {"to": ir.DataType.FLOAT})
    value = pen.op("Mul", [value, pen.constant(weight.along(weight.scale), f"{name}.weight.scale")])
    value.shape = ir.Shape(weight.codes.shape)
    return value


def alive(weight: Integers) -> Integers:
    """Channels that are 0 throughout take the largest scale of the others: theirs may be 0, and a bias is counted in it."""
    rest = tuple(axis for axis in range(weight.codes.ndim) if axis != weight.axis)
    dead = (weight.multiplied() == 0).all(axis=rest)
    largest = weight.scale[~dead].max(initial=0) or 1.0
    return replace(weight, scale=np.where(dead, largest, weight.scale).astype(np.float32))


def marked(graph: ir.Graph, kind: str) -> list[ir.Node]:
    """The markers of a kind, ``Weight`` or ``Quantized``."""
    return [node for node in graph if node.domain == "datafree" and node.op_type == kind]


def replace_by(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Let ``value`` stand for what the node gives, under its name where that goes out of the graph."""
    old = node.outputs[0]
    if old.is_graph_output():
        if value.is_graph_output() or value.producer() is None:  # which has a name of its own that must stay
            value = Pen(graph, node).op("Identity", [value])
        value.name, value.type, value.shape = old.name, old.type, old.shape
    ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def put_behind(graph: ir.Graph, value: ir.Value, kind: str, inputs: Sequence[ir.Value]) -> None:
    """Let all who read ``value`` read ``kind(value, *inputs)`` instead, which takes its name where that goes out of the graph."""
    maker = value.producer()
    assert maker is not None
    node = ir.node(kind, [value, *inputs])
    made = node.outputs[0]
    made.type, made.shape = value.type, value.shape
    if value.is_graph_output():
        made.name, value.name = value.name, f"{value.name}.before"
    ir.convenience.replace_all_uses_with(value, made, replace_graph_outputs=True)
    node.replace_input_with(0, value)
    graph.insert_after(maker, node)


def array(value: ir.Value | None) -> Array:
    """What a constant holds. Raises ExportError where it is none."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    if tensor is None:
        raise ExportError(f"{value} is no constant, as the bias of a layer or the statistics of a norm have to be")
    return np.asarray(tensor.numpy())


def tidy(model: ir.Model, layers: Collection[str]) -> None:
    """Take off what nobody reads, and names that say nothing; ``layers`` keep theirs."""
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    common.ClearMetadataAndDocStringPass()(model)
    common.NameFixPass()(model)
    _shorten(model.graph, layers)


def _shorten(graph: ir.Graph, layers: Collection[str]) -> None:
    """Names that say something stay: layers, codes of points, what goes in and out. The others would double small files."""
    kept = {str(value.name) for value in (*graph.inputs, *graph.outputs)}
    free_v, free_c = _free_names("v", kept), _free_names("c", kept)
    for value in [value for node in graph for value in node.outputs if value.name not in kept]:
        if value.name is None or not value.name.endswith(CODES):
            value.name, value.type, value.shape = next(free_v), None, None
    for value in list(graph.initializers.values()):
        value.name, value.type, value.shape = next(free_c), None, None
    for node in graph:
        if layer_name(node.name or "") not in layers:
            node.name = ""
        for key in [key for key, each in node.attributes.items() if _is_default(key, each.value)]:
            del node.attributes[key]


def _free_names(letter: str, taken: Collection[str]) -> Iterator[str]:
    return (name for number in count() if (name := f"{letter}{number}") not in taken)


def _is_default(key: str, value: object) -> bool:
    """Whether ONNX takes the same where the attribute of a convolution is absent."""
    implied = {"auto_pad": "NOTSET", "group": 1, "dilations": 1, "strides": 1, "pads": 0, "output_padding": 0}
    return key in implied and all(each == implied[key] for each in (value if isinstance(value, (tuple, list)) else (value,)))
