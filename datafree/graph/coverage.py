"""How much of a network is quantized: its share of the parameters and of the multiply-adds, and every weight that stays in float."""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from datafree.graph.flow import Flow
from datafree.graph.tape import Name, Node, replace_in

_NORM_OPS = frozenset("batch_norm layer_norm group_norm instance_norm rms_norm".split())
_LAYER_OPS = frozenset(("conv", "conv_transpose", "linear"))


@dataclass(frozen=True)
class Coverage:
    """What is quantized of a network.

    Args:
        parameters: numbers in all parameters.
        quantized_parameters: those in quantized weights.
        macs: multiply-adds for one input: of layers, products of activations, attention and recurrent layers.
        quantized_macs: those of layers with quantized weights.
        floats: weights that stay in float, each with the reason: the name of a layer, of a module all of whose weights do, or of a
            parameter. Biases of quantized layers and the vectors of norms are left out.
    """

    parameters: int
    quantized_parameters: int
    macs: int
    quantized_macs: int
    floats: Mapping[str, str]


def coverage(flow: Flow, model: nn.Module, quantized: Collection[str]) -> Coverage:
    """What is quantized of the float network ``model``, which ``flow`` was read from, if the layers called ``quantized`` are."""
    parameters = dict(model.named_parameters())
    tensors: dict[str, Tensor] = {**parameters, **dict(model.named_buffers())}
    weights = {id(model.get_submodule(name).weight) for name in quantized}
    batch = flow.nodes[0].shape[0]
    macs = done = 0
    for node in flow.nodes:
        count = _macs(node, flow, tensors) // batch
        macs += count
        done += count if flow.layer_at.get(node.index) in quantized else 0
    return Coverage(
        parameters=sum(each.numel() for each in parameters.values()),
        quantized_parameters=sum(each.numel() for each in parameters.values() if id(each) in weights),
        macs=macs,
        quantized_macs=done,
        floats=_floats(flow, model, parameters, quantized),
    )


def _floats(flow: Flow, model: nn.Module, parameters: Mapping[str, nn.Parameter], quantized: Collection[str]) -> dict[str, str]:
    users: dict[str, dict[str, None]] = {}
    for node in flow.nodes:
        for name in _names(node):
            users.setdefault(name, {})[node.op] = None
    weights = {id(model.get_submodule(name).weight) for name in quantized}
    found: dict[str, str] = {}
    for name, parameter in parameters.items():
        path, _, key = name.rpartition(".")
        ops = list(users.get(name, ()))
        small = path in quantized and key == "bias" or bool(ops) and _NORM_OPS.issuperset(ops) or _is_norm(model.get_submodule(path))
        if id(parameter) not in weights and not small:
            whole = path and next(model.get_submodule(path).children(), None) is None
            found.setdefault(path if whole else name, _reason(flow, path, ops))
    for node in flow.nodes:
        if node.op in _LAYER_OPS and node.index not in flow.layer_at:
            for name in _names(node):
                if name not in parameters:
                    found.setdefault(name, f"a buffer that {node.op} uses as a weight")
    return found


def _reason(flow: Flow, path: str, ops: list[str]) -> str:
    if path in flow.layers:
        return "to be kept in float"
    if path in flow.floats:
        return flow.floats[path]
    if ops:
        return f"used by {' and '.join(ops)}, which is not quantized"
    return "no operation on the input takes it directly: its module is not called, or computes something from it first"


def _is_norm(module: nn.Module) -> bool:
    kinds = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
    return isinstance(module, kinds)


def _names(node: Node) -> Iterator[str]:
    """The parameters and buffers that the operation takes."""
    found: list[str] = []

    def look(value: object) -> object:
        if isinstance(value, Name):
            found.append(value.name)
        return value

    if node.call is not None:
        replace_in((node.call.args, dict(node.call.kwargs)), look)
    yield from found


def _macs(node: Node, flow: Flow, tensors: Mapping[str, Tensor]) -> int:
    """Multiply-adds of an operation on the whole batch."""
    shapes = [flow.nodes[each].shape for each in node.inputs]
    if node.op in _LAYER_OPS and node.call is not None:
        weight = _weight_shape(node, tensors)
        if weight is None or not shapes:
            return 0
        return math.prod(shapes[0] if node.op == "conv_transpose" else node.shape) * math.prod(weight[1:])
    if node.op in ("matmul", "baddbmm", "einsum") and len(shapes) >= 2 and node.shape:
        return math.prod(node.shape) * shapes[-2][-1] if shapes[-2] else 0
    if node.op == "scaled_dot_product_attention" and len(shapes) >= 3:
        query, key, value = shapes[:3]
        return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    held = [tensors[name].shape for name in _names(node) if tensors[name].dim() > 1]
    if node.op in ("add", "sub", "mul", "div", "cat") or not shapes or not shapes[0]:
        return 0
    positions = math.prod(shapes[0][:-1])  # recurrent layers and attention as one operation: every weight at every position
    attended = 2 * positions * shapes[0][0] * shapes[0][-1] if node.op == "multi_head_attention_forward" else 0
    return positions * sum(map(math.prod, held)) + attended


def _weight_shape(node: Node, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
    assert node.call is not None
    weight = node.call.args[1] if len(node.call.args) > 1 else node.call.kwargs.get("weight")
    if isinstance(weight, Name):
        return tuple(tensors[weight.name].shape)
    return tuple(weight.shape) if isinstance(weight, Tensor) else None
