"""Ranges of activations from batch-norm statistics alone: no input runs through the network, not even noise.

What passes a point is followed back through activation functions, pooling and concats to its sources: norms, layers and sums, whose
means and variances :mod:`datafree.closed.propagate` tells. Two models say how the values of a source are spread around the mean of
each channel, with light and with heavy tails; sent forward again, they bracket what passes, and the range is the one that is best in
the worse case (:func:`datafree.closed.clip.best_range`). What is assumed:

- a layer, or the norm of one, adds up many terms: it is normal in the light model and Laplacian in the heavy one;
- so is a sum, its two sides independent in the light model and as correlated as can be in the heavy one: the branches of a trunk are
  something in between; all else is Laplacian in both;
- averages over positions vary as little as pixels that correlate by ``RHO`` let them (light), or as much as the pixels (heavy);
- the maximum of a window is spread like its pixels;
- pixels lie evenly between black and white.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from datafree.closed.clip import aciq_range, best_range
from datafree.closed.moments import Moments, tap_correlation
from datafree.closed.propagate import node_moments
from datafree.errors import NetworkError
from datafree.graph.flow import ACTIVATIONS, ADDS, POOLS, Flow, Kind
from datafree.graph.tape import Name, Node, Ref, repeat
from datafree.plan import QSpec
from datafree.task import Task

T = TypeVar("T")
Maps = tuple[Tensor, Tensor]
ClosedRule = Literal["closed", "aciq"]

_FAR, _POINTS = 12.0, (32, 192)  # standard deviations that the grid of a channel reaches, and its points, fewest and most
_VALUES = 1 << 16  # of all channels together, if that many points a channel are within these limits
_ENTRIES = 1 << 14
_NORMS = frozenset(("batch_norm", "instance_norm", "layer_norm", "group_norm"))


@torch.no_grad()
def closed_ranges(
    flow: Flow, model: nn.Module, points: Mapping[str, QSpec], task: Task, rule: ClosedRule = "closed"
) -> dict[str, tuple[Tensor, Tensor]]:
    """Scale and zero, each of shape (), of every point ``"<module>:input"`` or ``"<module>:output"``.

    ``model`` is the float network that ``flow`` was read from, or a copy with other weights under the same names. ``rule``: the range
    of least expected error (``closed``) or the clip of ACIQ. Raises NetworkError, naming the points, where batch norms do not tell what
    passes (attention, networks without any norm but layer norm), TargetError where a spec is not asymmetric with one scale.
    """
    nodes = {point: point_nodes(flow, point) for point in points}
    indices = [index for found in nodes.values() for index in found]
    moments, widest = (source_moments(flow, model, indices, correlation) for correlation in (0.0, 1.0))
    blind = [point for point, found in nodes.items() if not found or any(not moments.keys() >= sources(flow, index) for index in found)]
    if blind:
        raise NetworkError(
            f"the statistics of norms do not tell what passes {', '.join(blind)} (an attention stands before it, for instance): "
            "take activation ranges from pictures or noise instead"
        )
    light, heavy = (_Model(flow, model, each, task.limits, each is widest) for each in (moments, widest))
    if rule == "aciq":
        found = {point: heavy.values(nodes[point]) for point in points}
        return {point: aciq_range(values, points[point], masses) for point, (values, masses) in found.items()}
    return {point: best_range([each.values(nodes[point]) for each in (light, heavy)], spec) for point, spec in points.items()}


def point_nodes(flow: Flow, point: str) -> list[int]:
    """The nodes that pass a point, one a call; empty where the tape does not tell."""
    name, _, side = point.rpartition(":")
    found = [call.input if side == "input" else call.output for call in flow.calls_of.get(name, ())]
    known = [index for index in found if index is not None]
    return known if len(known) == len(found) else []


def follow(flow: Flow, index: int, source: Callable[[Node], T], join: Callable[[Node, list[T]], T]) -> T:
    """What ``source`` finds at the sources of a node, brought up to it by ``join`` at each activation function, pooling and concat.

    ``join`` gets such a node and what was found for its inputs. Sources are all other nodes: norms, layers, sums, inputs.
    """
    node = flow.nodes[flow.origin(index)]
    single = len(node.inputs) == 1 and node.call is not None and node.op in ACTIVATIONS | POOLS
    if node.op != "cat" and not single:
        return source(node)
    return join(node, [follow(flow, each, source, join) for each in node.inputs])


def sources(flow: Flow, index: int) -> set[int]:
    """The sources of a node, see :func:`follow`."""
    return follow(flow, index, lambda node: {node.index}, lambda node, found: set[int]().union(*found))


def source_moments(flow: Flow, model: nn.Module, indices: Iterable[int], correlation: float = 0.0) -> dict[int, Moments]:
    """Moments of the sources of the given nodes, the sides of sums correlating so much; those that are not known are left out."""
    wanted = {source for index in indices for source in sources(flow, index) if flow.nodes[source].shape}
    return {index: found for index, found in node_moments(flow, model, wanted, correlation).items() if found.known}


@torch.no_grad()
def activate(model: nn.Module, node: Node, values: Tensor) -> Tensor:
    """The recorded activation function on other values, (n, channels). Raises NetworkError where it has parameters of other channels."""
    assert node.call is not None

    def resolve(symbol: object) -> object:
        if isinstance(symbol, Ref):
            return values.clone()
        if isinstance(symbol, Name):
            path, _, name = symbol.name.rpartition(".")
            symbol = getattr(model.get_submodule(path), name)
        if isinstance(symbol, Tensor) and symbol.numel() not in (1, values.shape[1]):
            raise NetworkError(
                f"a {node.op} in {node.module or 'the network'} has parameters of {symbol.numel()} channels, and statistics are known of "
                f"{values.shape[1]}: take activation ranges from pictures or noise instead"
            )
        return symbol

    result = repeat(node.call, resolve)
    assert isinstance(result, Tensor)
    return result


@dataclass(frozen=True)
class _Model:
    """What values pass a node, and how often: two maps (grid, channels), values and masses. ``heavy``: with the heavier tails."""

    flow: Flow
    network: nn.Module
    moments: Mapping[int, Moments]
    pixels: tuple[float, float]
    heavy: bool

    def values(self, nodes: list[int]) -> Maps:
        found = [follow(self.flow, index, self.source, self.join) for index in nodes]
        values, masses = (torch.cat([each.flatten() for each in maps]) for maps in zip(*found, strict=True))
        return values, masses

    def source(self, node: Node) -> Maps:
        mean, sd = _by_channel(self.moments[node.index])
        if node.op == "input":
            ends = torch.linspace(*self.pixels, _POINTS[1], dtype=mean.dtype, device=mean.device)[:, None]
            return ends, torch.full_like(ends, 1 / len(ends))
        points = min(max(_VALUES // mean.numel(), _POINTS[0]), _POINTS[1])
        grid = torch.linspace(-_FAR, _FAR, points, dtype=mean.dtype, device=mean.device)[:, None]
        logarithm = -math.sqrt(2) * grid.abs() if self.heavy or not self._adds_up(node) else -grid.square() / 2
        return mean + grid * sd, logarithm.softmax(0).expand(-1, mean.numel())

    def join(self, node: Node, found: list[Maps]) -> Maps:
        values, masses = (torch.cat(maps, 1) for maps in zip(*found, strict=True))
        if node.op in ACTIVATIONS:
            values = activate(self.network, node, values)
        elif node.op in POOLS and not self.heavy:
            values = torch.lerp((values * masses).sum(0), values, self._kept(node))
        return values, masses

    def _adds_up(self, node: Node) -> bool:
        """Whether the node is a sum, a layer or the norm of one."""
        before = self.flow.nodes[self.flow.origin(node.inputs[0])] if node.op in _NORMS else node
        return before.op in ADDS or before.op in get_args(Kind)

    def _kept(self, node: Node) -> float:
        """The part of the standard deviation that averaging over positions leaves."""
        before, after = self.flow.nodes[node.inputs[0]].shape, node.shape
        if len(before) == len(after):
            sizes = [math.ceil(size / left) for size, left in zip(before[2:], after[2:], strict=True)]
        else:
            assert node.call is not None
            axes = node.call.kwargs.get("dim", (*node.call.args, None)[1])
            sizes = [before[axis] for axis in (axes if isinstance(axes, tuple | list) else (axes,) if isinstance(axes, int) else ())]
        return math.sqrt(math.prod(float(tap_correlation((size,)).mean()) for size in sizes))


def _by_channel(moments: Moments) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of an input, (channels,): axes without change left out, positions of pictures averaged.

    Where channels and tokens cannot be told apart, of every entry, or of some where these are too many.
    """
    mean, var = moments.mean[0], moments.var[0]
    for axis in range(mean.dim()):
        if mean.stride(axis) == 0 and var.stride(axis) == 0:
            mean, var = mean.narrow(axis, 0, 1), var.narrow(axis, 0, 1)
    if mean.dim() > 2:
        mean, var = (each.flatten(1).mean(1) if each.shape[0] > 1 else each for each in (mean, var))
    mean, var = mean.flatten(), var.flatten()
    chosen = torch.linspace(0, mean.numel() - 1, min(mean.numel(), _ENTRIES), dtype=torch.float64).long().to(mean.device)
    return mean[chosen], var[chosen].sqrt()
