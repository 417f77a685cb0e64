"""Linear filters of inputs, (n, channels, *sizes) with any number of spatial axes: a low-pass, and LAWS' masks of texture."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from datafree.synth.prior import patterns
from datafree.task import Task

Band = tuple[Tensor, Tensor]  # least and largest, of each logarithmic energy

_MASKS = (
    (1.0, 4.0, 6.0, 4.0, 1.0),  # level
    (-1.0, -2.0, 0.0, 2.0, 1.0),  # edge
    (-1.0, 0.0, 2.0, 0.0, -1.0),  # spot
    (-1.0, 2.0, 0.0, -2.0, 1.0),  # wave
    (1.0, -4.0, 6.0, -4.0, 1.0),  # ripple
)
_CONVS = (F.conv1d, F.conv2d, F.conv3d)
_TINY = 1e-30
_NATURAL = 128  # procedural pictures that tell the band
_OUTSIDE = 0.05  # of them lie below it, and as many above


def low_pass(x: Tensor, cutoff: float) -> Tensor:
    """Without fine detail: frequency f, in cycles an input, is multiplied by ``exp(-(f / cutoff)^2 / 2)`` (SynQ, ICLR 2025).

    The mean stays; so does all of ``x`` where it has no spatial axes, or ``cutoff`` is 0, which stands for none.
    """
    sizes = tuple(x.shape[2:])
    if not sizes or not cutoff:
        return x
    frequencies = torch.meshgrid(*(size * torch.fft.fftfreq(size, device=x.device) for size in sizes), indexing="ij")
    gain = torch.exp(-torch.stack(frequencies).square().sum(0) / (2 * cutoff**2))
    axes = tuple(range(2, x.dim()))
    spectrum = torch.fft.rfftn(x.float(), dim=axes)
    filtered: Tensor = torch.fft.irfftn(spectrum * gain[..., : spectrum.shape[-1]], s=sizes, dim=axes)
    return filtered.to(x.dtype)


def texture(x: Tensor) -> Tensor:
    """How much texture of each kind inputs have: logarithms of the energies behind LAWS' masks, that of the level subtracted.

    Masks are the outer products of five taps an axis; an energy is the mean magnitude of the filtered mean of the channels. Multiplying
    an input by a positive number changes nothing. (n, channels, *sizes) -> (n, 5^axes - 1), 24 for pictures; (n, 0) without axes.
    """
    axes = x.dim() - 2
    if not axes:
        return x.new_zeros(len(x), 0)
    grey = F.pad(x.float().mean(1, keepdim=True), (2, 2) * axes, mode="replicate")
    energies = _CONVS[axes - 1](grey, masks(axes, x.device)[:, None]).abs().flatten(2).mean(2)
    logarithms = energies.clamp(min=_TINY).log()
    return logarithms[:, 1:] - logarithms[:, :1]


def masks(axes: int, device: torch.device) -> Tensor:
    """LAWS' masks, (5^axes, 5, ...), the level first."""
    taps = torch.tensor(_MASKS, device=device)
    found = []
    for chosen in itertools.product(taps, repeat=axes):
        mask = chosen[0]
        for each in chosen[1:]:
            mask = mask[..., None] * each
        found.append(mask)
    return torch.stack(found)


def natural_band(task: Task, generator: torch.Generator) -> Band:
    """Between which values nine of ten procedural pictures have their :func:`texture`: theirs falls with frequency as nature's does.

    Of standardised pictures, as pixels are while they are optimised: the level is no part of a texture.
    """
    found = texture(patterns("mix", _NATURAL, task.shape, generator))
    return found.quantile(_OUTSIDE, 0), found.quantile(1 - _OUTSIDE, 0)


def texture_gap(x: Tensor, band: Band) -> Tensor:
    """How far the :func:`texture` of inputs lies outside the band: the sum over the masks, the mean over the inputs."""
    found, (low, high) = texture(x), band
    return (F.relu(low - found) + F.relu(found - high)).sum(1).mean()
