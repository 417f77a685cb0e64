"""What a student may learn from inside its teacher: the maps in which units end, and how far apart two of them are.

A unit is the body of a residual block, up to the sum and the activation, or a pointwise convolution with the depthwise one before it
(MobileNet's). A network without any has the outputs of all convolutions between the first and the last, behind their norms. Outputs of
linear layers are no maps of positions: transformers and networks of linear layers have none.

Maps are (n, channels, *sizes). A term compares a map of the teacher with that of the student and gives a scalar: a mean over the inputs,
0 where the maps are equal and above it otherwise. Those of all maps are added up.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datafree.context import Ctx
from datafree.errors import NetworkError
from datafree.graph.chains import chains
from datafree.graph.flow import ADDS, Flow, Layer, flow
from datafree.quant.precision import float64
from datafree.task import Task

FeatureTerm = Callable[[Tensor, Tensor], Tensor]  # of the teacher's map and the student's
Maps = Mapping[str, Sequence[Tensor]]  # by the module that makes them, one a call

_RELATED = 0.1  # the share of related positions and channels in ZAQ's maps


def unit_ends(read: Flow) -> tuple[str, ...]:
    """The modules whose outputs end a unit, in execution order; () where there are no maps. See the head of this file."""
    ends = {*_bodies(read), *_pointwise(read)}
    found = [
        layer
        for layer in read.layers.values()
        if layer.kind != "linear"
        and (layer.name in ends if ends else not layer.first and not layer.last)
        and prod(read.nodes[layer.calls[0]].shape[2:]) > 1
    ]
    return tuple(dict.fromkeys(layer.norm or layer.name for layer in sorted(found, key=lambda layer: layer.calls)))


def find_ends(teacher: nn.Module, task: Task, ctx: Ctx) -> tuple[str, ...]:
    """:func:`unit_ends` on noise of the task's shape, always the same."""
    return unit_ends(flow(teacher, task.noise(2, torch.Generator(ctx.device).manual_seed(0))))


def _bodies(read: Flow) -> Iterator[str]:
    """The last layer in the deeper of the two branches of every residual sum."""
    depth: list[int] = []
    for node in read.nodes:
        depth.append(max((depth[each] for each in node.inputs), default=0) + (node.index in read.layer_at))
    for node in read.nodes:
        if node.op not in ADDS or len(node.inputs) != 2 or not read.consumers[node.index]:
            continue
        one, other = node.inputs
        if depth[one] == depth[other] or read.nodes[one].shape != read.nodes[other].shape:
            continue
        index = max(node.inputs, key=lambda each: depth[each])
        while index not in read.layer_at and read.nodes[index].inputs:  # a gate is no part of the path: its shape is another
            here = read.nodes[index]
            index = max(here.inputs, key=lambda each: (read.nodes[each].shape == here.shape, depth[each]))
        if index in read.layer_at:
            yield read.layer_at[index]


def _pointwise(read: Flow) -> Iterator[str]:
    """Every 1x1 layer that alone follows a depthwise one."""

    def is_pointwise(layer: Layer) -> bool:
        return layer.groups == 1 and set(layer.kernel) == {1}

    for chain in chains(read):
        for before, name in zip(chain.layers, chain.layers[1:], strict=False):
            if read.layers[before].depthwise and is_pointwise(read.layers[name]):
                yield name


@contextmanager
def captured(model: nn.Module, ends: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """While it lasts, what the modules ``ends`` return, as it is before anybody writes into it; it piles up from pass to pass."""
    seen: dict[str, list[Tensor]] = {}

    def watch(name: str) -> "torch.utils.hooks.RemovableHandle":
        def look(module: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> None:
            seen.setdefault(name, []).append(result.clone())

        return model.get_submodule(name).register_forward_hook(look)

    handles = [watch(name) for name in ends]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def difference(term: FeatureTerm, teacher: Maps, student: Maps) -> Tensor:
    """The sum of ``term`` over all maps.

    Raises NetworkError where there are none, or the two networks took different paths through their modules.
    """
    calls = [{name: len(maps) for name, maps in seen.items()} for seen in (teacher, student)]
    if not calls[0] or calls[0] != calls[1]:
        raise NetworkError(
            f"maps of the teacher, by module and calls: {calls[0]}; of the student: {calls[1]}; they must be the same, and any"
        )
    pairs = [pair for name, maps in teacher.items() for pair in zip(maps, student[name], strict=True)]
    return torch.stack([term(t, s) for t, s in pairs]).sum()


def weighted(*terms: tuple[float, FeatureTerm]) -> FeatureTerm:
    """The sum of several terms, each with its weight."""
    return lambda t, s: torch.stack([weight * term(t, s) for weight, term in terms]).sum()


def refined(t: Tensor, s: Tensor, temperature: float = 8.0) -> Tensor:
    """AKT's (arXiv 2412.19125): KL divergences of softmax(channels / T), and of softmax(positions / T), in nats.

    Both are nearly flat, so the result is tiny: it is computed in double precision, and meant to have a large weight.
    """
    channels = _divergence(channel_energy(t), channel_energy(s), temperature)
    return (channels + _divergence(position_energy(t), position_energy(s), temperature)).to(t.device, torch.float32)


def attention(t: Tensor, s: Tensor) -> Tensor:
    """HAST's (CVPR 2023), as coded: mean squared difference of the channels' energies on the unit sphere, over inputs and channels."""
    one, other = (F.normalize(each.float().square().flatten(2).mean(2)) for each in (t, s))
    return F.mse_loss(other, one)


def relations(t: Tensor, s: Tensor) -> Tensor:
    """ZAQ's (CVPR 2021): mean absolute difference of maps in which positions, then of maps in which channels, join related ones."""
    one, other = (F.normalize(each.float()).flatten(2) for each in (t, s))
    return F.l1_loss(_by_position(other), _by_position(one)) + F.l1_loss(_by_channel(other), _by_channel(one))


def channel_energy(x: Tensor) -> Tensor:
    """Softmax over the channels of the mean square over the positions: (n, channels, *sizes) -> (n, channels)."""
    return float64(x).square().flatten(2).mean(2).softmax(1)


def position_energy(x: Tensor) -> Tensor:
    """The mean square over the channels, of unit length: (n, channels, *sizes) -> (n, positions)."""
    return F.normalize(float64(x).square().mean(1).flatten(1))


def _divergence(t: Tensor, s: Tensor, temperature: float) -> Tensor:
    one, other = ((each / temperature).log_softmax(1) for each in (t, s))
    return F.kl_div(other, one, log_target=True, reduction="batchmean")


def _by_position(f: Tensor) -> Tensor:
    """f: (n, channels, positions)."""
    x = f.transpose(1, 2).unsqueeze(1).contiguous()
    alike = F.scaled_dot_product_attention(x, x, x, scale=1.0)  # never holds the similarities of all pairs at once
    return f + _RELATED * alike.squeeze(1).transpose(1, 2)


def _by_channel(f: Tensor) -> Tensor:
    """f: (n, channels, positions). Channels that are least alike have the largest share, as published."""
    alike = f @ f.transpose(1, 2)
    return f + _RELATED * ((alike.amax(2, keepdim=True) - alike).softmax(2) @ f)
