"""From what the user asks for to what every layer gets: bits by protocol and role, and where activations are quantized."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from datafree.context import Ctx
from datafree.errors import TargetError
from datafree.graph.chains import roles
from datafree.graph.flow import ACTIVATIONS, ADDS, MOVES, POOLS, Flow, Layer
from datafree.graph.points import points
from datafree.plan import LayerPlan, Plan, QSpec, Target

EDGE_BITS = 8  # in the protocol `deploy`: of the first and last layer, of depthwise layers, of what enters a residual sum or a concat


def make_plan(
    flow: Flow,
    model: nn.Module,
    target: Target,
    weight_spec: Callable[[Layer, int], QSpec],
    ctx: Ctx,
    widths: Mapping[str, int] | None = None,
) -> Plan:
    """The plan for ``target``; ``weight_spec`` says how a layer's weight is quantized to so many bits.

    ``widths`` are the bits of every layer that is not kept, where a search has chosen them; else :func:`weight_widths` gives them.
    A plan in ``target`` is taken as it is. Raises TargetError where it does not fit the network, or has grids other than ``weight_spec``.
    """
    if target.plan is not None:
        return _given(flow, target, target.plan, weight_spec)
    given = weight_widths(flow, target) if widths is None else _searched(flow, target, widths)
    acts = activation_points(flow, model, target)
    if acts.unreached:
        ctx.note(f"activations that stay in float for some of their consumers: {'; '.join(acts.unreached)}")
    layers = {}
    for name, bits in given.items():
        act_bits = acts.at_layers.get(name)
        layers[name] = LayerPlan(weight_spec(flow.layers[name], bits), None if act_bits is None else _activation(act_bits))
    return Plan(layers, {point: _activation(bits) for point, bits in acts.elsewhere.items()})


def own_range(layer: Layer, bits: int) -> QSpec:
    """For :func:`make_plan`: every output channel of a weight has a range of its own, and it need not lie evenly around zero."""
    return QSpec(bits, symmetric=False, axis=layer.out_axis)


def weight_widths(flow: Flow, target: Target) -> dict[str, int]:
    """Bits of every layer's weight, in execution order; kept layers are absent.

    Raises TargetError for unknown names, and for more than two widths: which layer gets which takes a search (``bits.search``).
    """
    _check_kept(flow, target)
    if len(target.widths) > 2:
        raise TargetError(
            f"this method does not choose among the widths {target.weight_bits}: give one or two, or take method 'anchor', 'dfq' or 'zeroq'"
        )
    low, high = target.widths[0], target.widths[-1]
    given = roles(flow)
    widths = {}
    for name, layer in flow.layers.items():
        if name not in target.keep:
            at_edge = target.protocol == "deploy" and (layer.first or layer.last or layer.depthwise)
            widths[name] = EDGE_BITS if at_edge else low if given[name] == "low" else high
    return widths


def _given(flow: Flow, target: Target, plan: Plan, weight_spec: Callable[[Layer, int], QSpec]) -> Plan:
    """The plan of the target, checked: it must tell of exactly the layers that are not kept, in the grids of the method."""
    _check_kept(flow, target)
    for name in plan.layers:
        if name not in flow.layers or name in target.keep:
            reason = "keep wants in float" if name in target.keep else "this network does not have: it is the plan of another one"
            raise TargetError(f"the plan gives bits to {name}, which {reason}")
    if missing := [name for name in flow.layers if name not in target.keep and name not in plan.layers]:
        listed = ", ".join(missing[:5])
        raise TargetError(f"the plan is silent on {listed}: it is the plan of another network, or these layers must be named in keep")
    for name, layer in plan.layers.items():
        _check_grid(f"the weight of {name}", layer.weight, weight_spec(flow.layers[name], layer.weight.bits))
    for point, spec in plan.activations.items():
        _check_grid(point, spec, _activation(spec.bits))
    return Plan({name: plan.layers[name] for name in flow.layers if name in plan.layers}, plan.tensors)


def _check_grid(what: str, wanted: QSpec, made: QSpec) -> None:
    if wanted != made:
        raise TargetError(f"{what}: the plan says {wanted}, this method makes {made}: search the plan with this method and its fields")


def _searched(flow: Flow, target: Target, widths: Mapping[str, int]) -> dict[str, int]:
    """The given widths in execution order, checked for gaps."""
    _check_kept(flow, target)
    expected = [name for name in flow.layers if name not in target.keep]
    if wrong := set(expected).symmetric_difference(widths):
        raise TargetError(f"widths are needed for exactly the layers that are not kept; wrong: {', '.join(sorted(wrong))}")
    return {name: widths[name] for name in expected}


def _check_kept(flow: Flow, target: Target) -> None:
    for name in target.keep:
        if name not in flow.layers and name not in flow.floats:
            close = difflib.get_close_matches(name, flow.layers, n=3) or list(flow.layers)[:5]
            raise TargetError(f"keep: the network has no layer {name!r} to quantize; did you mean {', '.join(close)}?")
    if all(name in target.keep for name in flow.layers):
        raise TargetError("keep names every layer of the network: nothing is left to quantize")


@dataclass(frozen=True)
class ActivationPoints:
    """Bits of quantized activations: at the inputs of layers, at other points, and tensors that cannot be reached.

    Args:
        at_layers: from layer name to bits.
        elsewhere: from point to bits.
        unreached: descriptions of tensors that stay in float for some consumer, though the protocol wants them quantized.
    """

    at_layers: dict[str, int]
    elsewhere: dict[str, int]
    unreached: tuple[str, ...]


def activation_points(flow: Flow, model: nn.Module, target: Target) -> ActivationPoints:
    """Where the protocol of ``target`` quantizes activations of this network, and to how many bits."""
    at_layers: dict[str, int] = {}
    elsewhere: dict[str, int] = {}
    unreached: list[str] = []
    if target.act_bits is None:
        return ActivationPoints(at_layers, elsewhere, ())
    modules = dict(model.named_modules())
    wanted = _deployed(flow, target) if target.protocol == "deploy" else _activated(flow, target)
    for index, bits in sorted(wanted.items()):
        found, missed = _at_layers(flow, index) if target.float_shortcuts else _cover(flow, modules, index)
        for point in found:
            name, _, side = point.rpartition(":")
            if side == "input" and name in flow.layers:
                if name not in target.keep:
                    at_layers[name] = max(bits, at_layers.get(name, 0))
            else:
                elsewhere[point] = max(bits, elsewhere.get(point, 0))
        if missed:
            node = flow.nodes[index]
            unreached.append(f"output of {node.op!r} in {node.module or 'the forward of the network'}")
    return ActivationPoints(at_layers, elsewhere, tuple(dict.fromkeys(unreached)))


def _cover(flow: Flow, modules: Mapping[str, nn.Module], index: int) -> tuple[list[str], list[int]]:
    """Points for the node; consumers that no point serves are followed through operations that only move values."""
    found, missed = points(flow, modules, index)
    every, left = list(found), []
    for use in missed:
        if flow.nodes[use].op in MOVES and len(flow.nodes[use].inputs) == 1:
            further, still = _cover(flow, modules, use)
            every += further
            left += still
        else:
            left.append(use)
    return every, left


def _at_layers(flow: Flow, index: int) -> tuple[list[str], list[int]]:
    """The inputs of the layers that take the node's value, moved about perhaps; nothing else is meant to be quantized."""
    found: list[str] = []
    for use in flow.consumers[index]:
        if use in flow.layer_at:
            found.append(f"{flow.layer_at[use]}:input")
        elif flow.nodes[use].op in MOVES and len(flow.nodes[use].inputs) == 1:
            found += _at_layers(flow, use)[0]
    return list(dict.fromkeys(found)), []


def _activated(flow: Flow, target: Target) -> dict[int, int]:
    """Protocol `paper`: what leaves an activation function and reaches another layer."""
    assert target.act_bits is not None
    useful = _reaching_a_layer(flow)
    return {node.index: target.act_bits for node in flow.nodes if node.op in ACTIVATIONS and node.index in useful}


def _deployed(flow: Flow, target: Target) -> dict[int, int]:
    """Protocol `deploy`: what enters a layer, the pooling before it, concats, and the sums that are quantized afterwards."""
    assert target.act_bits is not None
    wanted: dict[int, int] = {}
    for layer in flow.layers.values():
        if layer.name in target.keep:
            continue
        bits = EDGE_BITS if layer.first or layer.last else target.act_bits
        for index in flow.data(layer.name):
            source = flow.origin(index)
            wanted[source] = max(bits, wanted.get(source, 0))
            while flow.nodes[source].op in POOLS:
                source = flow.origin(flow.nodes[source].inputs[0])
                wanted.setdefault(source, target.act_bits)
    reaching = _reaching_a_layer(flow)
    for node in () if target.float_shortcuts else reversed(flow.nodes):
        if node.op in ADDS and len(node.inputs) == 2 and _ends_quantized(flow, node.index, wanted):
            for index in node.inputs:
                wanted.setdefault(flow.origin(index), EDGE_BITS)
        if node.op == "cat" and node.index in reaching:
            for source in _before_pools(flow, node.inputs):
                if flow.nodes[source].op != "cat":  # whose parts are quantized already
                    wanted.setdefault(source, EDGE_BITS)
    return wanted


def _before_pools(flow: Flow, indices: Iterable[int]) -> list[int]:
    """Where the values of nodes come from, followed back through pooling and what only moves values."""
    found = []
    for index in indices:
        source = flow.origin(index)
        while flow.nodes[source].op in POOLS:
            source = flow.origin(flow.nodes[source].inputs[0])
        found.append(source)
    return found


def _ends_quantized(flow: Flow, index: int, wanted: dict[int, int]) -> bool:
    """Whether the node, or the activation right behind it, is a quantized tensor."""
    behind = flow.consumers[index]
    return index in wanted or len(behind) == 1 and flow.nodes[behind[0]].op in ACTIVATIONS and behind[0] in wanted


def _reaching_a_layer(flow: Flow) -> set[int]:
    reaching: set[int] = set()
    for node in reversed(flow.nodes):
        if any(each in reaching or each in flow.layer_at for each in flow.consumers[node.index]):
            reaching.add(node.index)
    return reaching


def _activation(bits: int) -> QSpec:
    return QSpec(bits, symmetric=False)
