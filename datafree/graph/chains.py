"""Chains of layers that follow one another without branch or join, and the low/high pairing of DF-MPC on them.

Source: DF-MPC, arXiv 2307.00498, figure 2. What the figure leaves open is settled here: stem, last layer, lone layers
(downsampling) and depthwise layers are high; in longer chains low and high alternate and the last layer is high.
"""

from dataclasses import dataclass
from typing import Literal

from datafree.graph.flow import ACTIVATIONS, ADDS, MOVES, POOLS, Flow, Layer

End = Literal["add", "cat", "branch", "output", "other"]
Role = Literal["low", "high"]

_PASSED = ACTIVATIONS | MOVES | POOLS | {"batch_norm", "layer_norm", "group_norm", "instance_norm"}


@dataclass(frozen=True)
class Chain:
    """Layers in order, each the only consumer of the one before; and what stands behind the last."""

    layers: tuple[str, ...]
    end: End


@dataclass(frozen=True)
class Pair:
    """A low layer and the higher one that follows it, None where several do or none (its repair stays in its own norm)."""

    low: str
    high: str | None


def chains(flow: Flow) -> tuple[Chain, ...]:
    """Every layer of ``flow`` in exactly one chain, in execution order."""
    following: dict[str, str] = {}
    ends: dict[str, End] = {}
    for layer in flow.layers.values():
        successor, end = _after(flow, layer) if len(layer.calls) == 1 else (None, "other")
        if successor is not None and successor not in following.values():
            following[layer.name] = successor
        ends[layer.name] = end
    found = []
    for name in flow.layers:
        if name not in following.values():
            names = [name]
            while names[-1] in following:
                names.append(following[names[-1]])
            found.append(Chain(tuple(names), ends[names[-1]]))
    return tuple(found)


def roles(flow: Flow) -> dict[str, Role]:
    """Which layers DF-MPC makes low and which high, by name in execution order."""
    low: set[str] = set()
    for chain in chains(flow):
        eligible = [name for name in chain.layers if _may_be_low(flow.layers[name])]
        low.update(_low_of(eligible, chain.end))
    return {name: "low" if name in low else "high" for name in flow.layers}


def pairs(flow: Flow) -> tuple[Pair, ...]:
    """Low layers with their compensating partner, in execution order."""
    given = roles(flow)
    found = {}
    for chain in chains(flow):
        for name, successor in zip(chain.layers, (*chain.layers[1:], None), strict=True):
            if given[name] == "low":
                found[name] = Pair(name, successor)
    return tuple(found[name] for name in flow.layers if name in found)


def _may_be_low(layer: Layer) -> bool:
    return layer.scale_per_output and not (layer.depthwise or layer.first or layer.last)


def _low_of(eligible: list[str], end: End) -> list[str]:
    if len(eligible) < 2:
        return []
    if end == "cat":  # a dense layer: 1x1 high, 3x3 low
        return eligible[1::2]
    if end == "add" and len(eligible) == 3:  # a bottleneck: the 3x3 in the middle
        return eligible[1:2]
    return eligible[:-1:2]


def _after(flow: Flow, layer: Layer) -> tuple[str | None, End]:
    """The layer that alone takes what ``layer`` makes, or what stands in its place."""
    index = layer.calls[0]
    while True:
        consumers = flow.consumers[index]
        if not consumers:
            return None, "output"
        ops = {flow.nodes[each].op for each in consumers}
        if ops == {"cat"}:
            return None, "cat"
        if len(consumers) > 1 or index in flow.outputs:
            return None, "branch"
        index = consumers[0]
        name = flow.layer_at.get(index)
        if name is not None:
            return (name, "other") if len(flow.layers[name].calls) == 1 else (None, "other")
        if flow.nodes[index].op in ADDS:
            return None, "add"
        if flow.nodes[index].op not in _PASSED or len(flow.nodes[index].inputs) > 1:
            return None, "other"
