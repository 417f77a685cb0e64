"""Where a tensor can be quantized without rewriting the forward pass.

A point is ``"<module>:input"`` (the first tensor a module is called with) or ``"<module>:output"`` (the tensor it
returns). A tensor that only layers consume is quantized at their inputs. One that other operations read too, such as a
residual trunk, is quantized once for all of them: where the module that makes it returns it, or where it enters the
modules that read it.
"""

import math
from collections.abc import Iterable, Mapping

from torch import nn

from datafree.graph.flow import ACTIVATIONS, Flow

REACH = 1.5  # how many times as far as on synthetic inputs the averages of a whole picture may reach on the data
_MANY = 16  # positions that such an average is taken over, at least
_AVERAGES = frozenset(("mean", "avg_pool", "adaptive_avg_pool"))
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def points(flow: Flow, modules: Mapping[str, nn.Module], index: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Points that together quantize the value of node ``index`` for all its consumers, and the consumers left uncovered."""
    uses = flow.consumers[index]
    at_layers = {use: flow.layer_at[use] for use in uses if use in flow.layer_at and _hands_over(flow, use, index)}
    if len(at_layers) == len(uses):
        return _inputs(at_layers.values()), ()
    if (maker := _maker(flow, modules, index)) is not None:
        return (f"{maker}:output",), ()
    entered: dict[int, str] = dict(at_layers)
    for use in uses:
        for call in flow.module_calls:
            if use not in entered and call.input == index and call.start <= use < call.stop and _attachable(flow, modules, call.module):
                entered[use] = call.module
    # A module whose input point serves one consumer serves all consumers inside it, and its layers need no point of their own.
    spans = {call.module: range(call.start, call.stop) for call in flow.module_calls if call.module in entered.values()}
    kept = [name for use, name in entered.items() if not any(use in span for other, span in spans.items() if other != name)]
    return _inputs(kept), tuple(use for use in uses if use not in entered)


def averaged(flow: Flow, points: Iterable[str]) -> dict[str, float]:
    """REACH for each of the points that only averages over many positions pass, or what layers make of them before the next norm.

    What one position holds is known from norms, but pictures of one thing differ more in their averages than pictures of many do.
    """
    found = {}
    for point in points:
        name, _, side = point.rpartition(":")
        nodes = [call.input if side == "input" else call.output for call in flow.calls_of.get(name, ())]
        if nodes and all(index is not None and _is_average(flow, index) for index in nodes):
            found[point] = REACH
    return found


def _is_average(flow: Flow, index: int) -> bool:
    node = flow.nodes[flow.origin(index)]
    if node.op in _AVERAGES:
        return math.prod(flow.nodes[node.inputs[0]].shape) >= _MANY * math.prod(node.shape)
    return len(node.inputs) == 1 and (node.op in ACTIVATIONS or node.index in flow.layer_at) and _is_average(flow, node.inputs[0])


def _inputs(names: object) -> tuple[str, ...]:
    return tuple(dict.fromkeys(f"{name}:input" for name in names))  # type: ignore[attr-defined]


def _maker(flow: Flow, modules: Mapping[str, nn.Module], index: int) -> str | None:
    """The innermost module that makes and returns the node before anything consumes it, and can carry a quantizer."""
    for call in flow.module_calls:  # inner modules end first
        made = call.output == index and call.start <= index and all(use >= call.stop for use in flow.consumers[index])
        if made and _attachable(flow, modules, call.module):
            return call.module
    return None


def _hands_over(flow: Flow, use: int, index: int) -> bool:
    """Whether the layer behind the call ``use`` got the node as its first positional argument."""
    return any(call.input == index and call.start <= use < call.stop for call in flow.calls_of[flow.layer_at[use]])


def _attachable(flow: Flow, modules: Mapping[str, nn.Module], name: str) -> bool:
    return name != "" and len(flow.calls_of[name]) == 1 and not isinstance(modules[name], _CONTAINERS)
