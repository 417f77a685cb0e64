"""Where a network looks: attention maps of its last features with spatial axes, and what can be asked of them (after ACQ, 2301.07266).

Legend: n inputs, A attention, an input's sum being 1.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datafree.context import Ctx
from datafree.graph.taps import calls
from datafree.synth.labels import Blend, one_class
from datafree.task import Task

_EPSILON = 1e-12


def spatial_module(teacher: nn.Module, task: Task, ctx: Ctx) -> str | None:
    """Name of the module whose output is the last with as many spatial axes as the input, (n, channels, *sizes), and not pooled to a point.

    None where there is none, and where layers with channels last (on tokens) stand behind it: what it gives is early then.
    """
    noise = task.noise(2, torch.Generator(ctx.device).manual_seed(0))
    for name, module, shape in reversed(calls(teacher, noise)):
        if isinstance(module, nn.Linear | nn.LayerNorm) and len(shape) > 2:
            return None
        if name and len(shape) == noise.dim() > 2 and any(size > 1 for size in shape[2:]):
            return name
    return None


def attention(features: Tensor) -> Tensor:
    """A: squares of ``features``, (n, channels, *sizes), summed over the channels, as shares of their sum: (n, *sizes)."""
    squares = features.float().square().sum(1) + _EPSILON
    return squares / squares.flatten(1).sum(1).view(-1, *(1,) * (squares.dim() - 1))


def centre(seen: Tensor) -> Tensor:
    """Centre of gravity of A, (n, *sizes), from 0 to 1 along each axis: (n, axes). A cell stands for its middle."""
    found = []
    for axis in range(1, seen.dim()):
        size = seen.shape[axis]
        middles = ((torch.arange(size, device=seen.device) + 0.5) / size).view(-1, *(1,) * (seen.dim() - 1 - axis))
        found.append((seen * middles).flatten(1).sum(1))
    return torch.stack(found, 1)


def off_centre(seen: Tensor, place: Tensor) -> Tensor:
    """Squared distance of the centre of A, (n, *sizes), from the place, (n, axes): the mean over the inputs."""
    return (centre(seen) - place).square().sum(1).mean()


def sameness(features: Tensor, noise: Tensor) -> Tensor:
    """How little the noise, (n, latent), changes: -1 (at least as much of the features as of itself) to 0, the mean over pairs.

    Of a pair (see :class:`Placed`) it is -min(1, distance of the pooled features / distance of the noise), in sums of absolute values.
    """
    half = (len(noise) + 1) // 2
    apart, moved = ((each[half:] - each[: len(each) - half]).abs().sum(1) for each in (features.float().flatten(2).mean(2), noise))
    return -(apart / moved.clamp(min=_EPSILON)).clamp(max=1).mean()


def disagreement(one: Tensor, other: Tensor) -> Tensor:
    """Mean squared difference of two A, (n, *sizes), in units of an even one, so that the number of cells does not matter."""
    cells = one[0].numel()
    return F.mse_loss(cells * one, cells * other)


@dataclass(frozen=True)
class Placed:
    """A policy of one class an input, and a place for it, each coordinate in [low, high].

    Args:
        axes: of the place; 0: none.
        pairs: input i of the first half and input i of the second (of an odd number, the smaller half) are to show the same at the same
            place.
    """

    axes: int
    pairs: bool = True
    low: float = 0.2
    high: float = 0.8

    def __call__(self, n: int, classes: int, generator: torch.Generator) -> Blend:
        """As every :data:`datafree.synth.labels.Policy`."""
        different = (n + 1) // 2 if self.pairs else n
        drawn = one_class(different, classes, generator)
        place = None
        if self.axes:
            place = self.low + (self.high - self.low) * torch.rand(different, self.axes, generator=generator, device=generator.device)
        if not self.pairs:
            return Blend(drawn.classes, drawn.shares, place)
        twice = torch.arange(n, device=generator.device) % different
        return Blend(drawn.classes[twice], drawn.shares[twice], None if place is None else place[twice])
