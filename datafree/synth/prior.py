"""Procedural pictures: inputs that share the statistics of natural ones, but show nothing and are learnt from nothing.

``shape`` is that of one input, (channels, *sizes), with any number of channels and of spatial axes. Everything is float32 and
lives on the device of the generator, from which every random number is drawn.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from datafree.errors import MethodError, NetworkError
from datafree.task import Task

Family = Literal["leaves", "pink", "white", "mix"]
FAMILIES: tuple[Family, ...] = get_args(Family)

_SHARE = 0.9  # correlation of a colour channel of pink noise with the luminance
_COLOUR, _TEXTURE = 0.35, 0.2  # standard deviations of a leaf's colour and texture; that of its luminance is 1
_GROWTH = 0.6187  # exponent with which the number of leaves grows with the side of the picture: from 60 to 200
_STRETCH = 0.7  # a half-axis of a leaf is its radius times exp of at most this
_PAIRS = 1 << 18  # pairs of a leaf and a pixel worked on at a time: about 50 MB


def pictures(family: Family, n: int, task: Task, generator: torch.Generator) -> Tensor:
    """``n`` inputs for the network of ``task``, (n, *task.shape): pixels between black and white, then normalised by the task.

    Before they are clipped, the pixels of each channel have the mean and spread of ``task.pixel_statistics`` over the whole batch.
    ``mix`` alternates dead leaves and pink noise, so that any part of the batch holds both. An input of shape (features,) has no
    neighbourhoods: it gets white noise, whatever the family. Raises MethodError on an unknown family, NetworkError if ``n`` < 1.
    """
    if family not in FAMILIES:
        raise MethodError(f"unknown family of pictures {family!r}: choose from {', '.join(FAMILIES)}")
    if n < 1:
        raise NetworkError(f"{n} pictures were asked for: at least 1 is needed")
    return task.pictured(patterns(family, n, task.shape, generator))


def patterns(family: Family, n: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """What :func:`pictures` show, (n, *shape), each channel with mean 0 and variance 1 over the batch."""
    if family == "white" or len(shape) == 1:
        return _standard(white_noise(n, shape, generator))
    if family == "pink":
        return _standard(pink_noise(n, shape, generator))
    leaves = _standard(dead_leaves(n if family == "leaves" else (n + 1) // 2, shape, generator))
    if family == "leaves" or n == 1:
        return leaves
    batch = leaves.new_empty(n, *shape)
    batch[0::2], batch[1::2] = leaves, _standard(pink_noise(n // 2, shape, generator))
    return batch


def white_noise(n: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Independent standard normal entries, (n, *shape)."""
    return torch.randn(n, *shape, generator=generator, device=generator.device)


def pink_noise(n: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Normal noise whose amplitude falls as 1 / frequency, as that of natural pictures does: (n, *shape), variance 1.

    Every channel correlates by 0.9 with one luminance. The constant part has the amplitude of the slowest wave.
    """
    channels, sizes = _split(shape)
    device = generator.device
    frequencies = torch.meshgrid(*(torch.fft.fftfreq(size, device=device) for size in sizes), indexing="ij")
    gain = 1 / torch.stack(frequencies).square().sum(0).sqrt().clamp(min=1 / max(sizes))
    gain /= gain.square().mean().sqrt()
    axes = tuple(range(-len(sizes), 0))

    def field(count: int) -> Tensor:
        spectrum = torch.fft.rfftn(white_noise(n, (count, *sizes), generator), dim=axes)
        waves: Tensor = torch.fft.irfftn(spectrum.mul_(gain[..., : spectrum.shape[-1]]), s=sizes, dim=axes)
        return waves

    luminance = field(1)
    if channels == 1:
        return luminance
    return field(channels).mul_(math.sqrt(1 - _SHARE**2)).add_(luminance, alpha=_SHARE)


def dead_leaves(n: int, shape: tuple[int, ...], generator: torch.Generator, texture: float = _TEXTURE) -> Tensor:
    """Ellipses and rectangles that cover one another: edges, flat regions and things of all sizes, (n, *shape).

    The dead-leaves model (Lee, Mumford and Huang, Occlusion models for natural images, IJCV 2001). Radii have density r^-3 from
    size / 40 to size / 2.5, luminances are standard normal, the channels of a leaf differ by N(0, 0.35^2), and a leaf carries 1/f
    noise of a strength of its own, N(0, texture^2). One leaf lies behind everything. 60 leaves at 32 pixels, 200 at 224.
    """
    channels, sizes = _split(shape)
    count = 1 + max(8, round(60 * (_side(sizes) / 32) ** _GROWTH))
    owner = _front_leaf(n, count, sizes, generator)
    luminance = white_noise(n, (1, count), generator)
    colour = luminance + _COLOUR * white_noise(n, (channels, count), generator)
    strength = texture * white_noise(n, (1, count), generator)  # of either sign, so that the noise does not run on from leaf to leaf
    return _paint(colour, owner).add_(_paint(strength, owner).mul_(pink_noise(n, (1, *sizes), generator)))


def _front_leaf(n: int, count: int, sizes: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """The number of the leaf seen at each pixel, (n, *sizes): the highest that covers it, and 0 behind them all.

    Only the pixels within a leaf's bounding box are looked at, each as one pair of leaf and pixel.
    """
    device, dims, leaves = generator.device, len(sizes), n * (count - 1)
    extent = torch.tensor(sizes, device=device)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(leaves, *shape, generator=generator, device=device)

    nearest, farthest = (_side(sizes) / 40) ** -2, (_side(sizes) / 2.5) ** -2
    radius = (nearest + (farthest - nearest) * uniform(1)).rsqrt()
    half = radius * torch.exp(_STRETCH * (2 * uniform(dims) - 1))
    turn = torch.linalg.qr(torch.randn(leaves, dims, dims, generator=generator, device=device)).Q  # columns: the leaf's own axes
    centre = uniform(dims) * extent - 0.5
    ellipse = uniform() < 0.5

    reach = (turn.abs() * half[:, None]).sum(2)  # half the bounding box of a rectangle, which holds the ellipse too
    low = (centre - reach).ceil().clamp(min=0)
    box = (torch.minimum((centre + reach).floor(), extent - 1.0) - low + 1).clamp(min=0).long()
    pixels, low = box.prod(1), low.long()
    number = 1 + torch.arange(leaves, device=device) % (count - 1)
    base = torch.arange(leaves, device=device) // (count - 1) * math.prod(sizes)
    front = torch.zeros(n * math.prod(sizes), dtype=torch.long, device=device)
    for some in _portions(pixels):
        leaf = some.repeat_interleave(pixels[some])
        rank = torch.arange(leaf.numel(), device=device) - (pixels[some].cumsum(0) - pixels[some]).repeat_interleave(pixels[some])
        place, stride, away = base[leaf], 1, []
        for axis in reversed(range(dims)):
            at = low[leaf, axis] + rank % box[leaf, axis]
            rank = rank // box[leaf, axis]
            place, stride = place + at * stride, stride * sizes[axis]
            away.append(at - centre[leaf, axis])
        own = (torch.stack(away[::-1], 1)[:, :, None] * turn[leaf]).sum(1).div_(half[leaf]).abs_()
        inside = torch.where(ellipse[leaf], own.square().sum(1), own.amax(1)) <= 1
        front.scatter_reduce_(0, place[inside], number[leaf[inside]], "amax")
    return front.view(n, *sizes)


def _portions(pixels: Tensor) -> tuple[Tensor, ...]:
    """Consecutive numbers of leaves, so many at a time that their boxes hold about _PAIRS pixels."""
    group = (pixels.cumsum(0) - pixels) // _PAIRS
    numbers = torch.arange(pixels.numel(), device=pixels.device)
    return torch.split_with_sizes(numbers, torch.unique_consecutive(group, return_counts=True)[1].tolist())


def _paint(values: Tensor, owner: Tensor) -> Tensor:
    """The value of the leaf that owns a pixel: values (n, channels, count), owner (n, *sizes) -> (n, channels, *sizes)."""
    n, channels = values.shape[:2]
    return values.gather(2, owner.view(n, 1, -1).expand(-1, channels, -1)).view(n, channels, *owner.shape[1:])


def _side(sizes: tuple[int, ...]) -> float:
    """The side of a square, or cube, of as many pixels."""
    return float(math.prod(sizes) ** (1 / len(sizes)))


def _split(shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """The number of channels and the spatial sizes."""
    if len(shape) < 2 or min(shape) < 1:
        raise NetworkError(f"no picture has the shape {shape}: expected (channels, *sizes), such as (3, 32, 32)")
    return shape[0], shape[1:]


def _standard(batch: Tensor) -> Tensor:
    """Mean 0 and variance 1 in each channel; a channel without variation becomes 0."""
    axes = (0, *range(2, batch.dim()))
    batch = batch - batch.mean(axes, keepdim=True)
    return batch / batch.square().mean(axes, keepdim=True).sqrt().clamp(min=torch.finfo(batch.dtype).tiny)
