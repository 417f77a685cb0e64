"""Ranges that minimise the expected squared error of tensors that are known by their distribution only.

A distribution is a list of values and the mass of each. Clipping costs the second moment of what lies beyond the range; rounding
costs step^2 / 12 wherever a value lies strictly inside and is not 0, which has a code of its own.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from datafree.errors import NetworkError, TargetError
from datafree.plan import WEIGHT_BITS, QSpec
from datafree.quant.grid import has_zero_points
from datafree.quant.precision import float64
from datafree.quant.ranges import channel_rows, from_range

Model = Literal["gauss", "laplace"]

_SCALES, _SMALLEST = 512, 1e-3  # scales tried, evenly spaced in their logarithm, and the smallest, relative to that of min-max
_APART = 8  # zero points from one to the next in a first search
_LIKE_GAUSS = ((2 / math.pi) ** 0.5 + 0.5**0.5) / 2  # mean |x| over standard deviation, halfway between the two models


@torch.no_grad()
def best_range(models: Sequence[tuple[Tensor, Tensor]], spec: QSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero, float32, shape (), with the least expected squared error.

    models: pairs of values and masses, each (n,). Where several models of one tensor are given, the range is best in the worst case: its
    error, relative to the least that each model allows, is smallest for the model that it suits least. Raises TargetError unless
    ``spec`` is uniform and asymmetric with one scale, NetworkError on values or masses that make no sense.
    """
    if not has_zero_points(spec) or spec.axis is not None:
        raise TargetError(f"{spec}: a range by expected error takes an asymmetric uniform grid with one scale for the tensor")
    for values, masses in models:
        _check(values, masses)
    device = models[0][0].device
    models = [(float64(values), float64(masses)) for values, masses in models]
    low = torch.stack([values.amin() for values, _ in models]).amin().clamp(max=0)
    high = torch.stack([values.amax() for values, _ in models]).amax().clamp(min=0)
    if low == high:
        scale, zero = from_range(low, high, spec)
        return scale.to(device), zero.to(device)
    steps = spec.levels[1]
    scale = (high - low) / steps * torch.logspace(math.log10(_SMALLEST), 0, _SCALES, dtype=torch.float64, device=low.device)[:, None]
    zero = torch.arange(0 if high > 0 else steps, 1 + (steps if low < 0 else 0), device=low.device)
    if zero.numel() > _APART**2:  # first every so many zeros, then all those near the best ones
        coarse = zero[_APART // 2 :: _APART]
        errors = _errors(models, scale, coarse, steps)
        best = coarse[torch.stack([*errors, _worst(errors)]).amin(1).argmin(1)]
        zero = zero[((zero[:, None] - best).abs() <= _APART).any(1)]
    worst = _worst(_errors(models, scale, zero, steps))
    row, column = divmod(int(worst.argmin()), zero.numel())
    return scale[row, 0].to(device, torch.float32), zero[column].to(device, torch.float32)


def _errors(models: Sequence[tuple[Tensor, Tensor]], scale: Tensor, zero: Tensor, steps: int) -> Tensor:
    """Of each model (n), scale (m, 1) and zero (k,): (n, m, k)."""
    return torch.stack([expected_error(*model, scale, zero, steps) for model in models])


def _worst(errors: Tensor) -> Tensor:
    """Of all models the largest error relative to the least that the model allows, (m, k)."""
    least = errors.flatten(1).amin(1)[:, None, None]
    return torch.where(errors > least, errors / least, 1.0).amax(0)


def expected_error(values: Tensor, masses: Tensor, scale: Tensor, zero: Tensor, steps: int) -> Tensor:
    """Expected squared error, float64, of the ranges from -scale zero to scale (steps - zero): clipped beyond, rounded inside.

    values, masses: (n,). scale and zero broadcast to the shape of the result.
    """
    values, masses, scale, zero = map(float64, (values, masses, scale, zero))
    values, order = values.sort()
    sums = F.pad(torch.stack([masses[order] * values**power for power in (0, 1, 2)]).cumsum(1), (1, 0))
    bottom, top = -scale * zero, scale * (steps - zero)
    under, upto = torch.searchsorted(values, top), torch.searchsorted(values, bottom, right=True)
    at_zero = masses[order][values == 0].sum() * ((zero > 0) & (zero < steps))
    inside = (sums[0, under] - sums[0, upto] - at_zero).clamp(min=0)
    return _beyond(sums[:, -1:, None] - sums[:, under], top) + _beyond(sums[:, upto], bottom) + scale.square() / 12 * inside


def _beyond(sums: Tensor, end: Tensor) -> Tensor:
    """Sum of mass (value - end)^2 from the sums of mass times value to the powers 0, 1 and 2."""
    return (sums[2] - 2 * end * sums[1] + end.square() * sums[0]).clamp(min=0)


def aciq(spread: Tensor, bits: int, model: Model, one_sided: bool = False) -> Tensor:
    """The clip of ACIQ for a zero-mean tensor: ``spread`` times a factor that depends on bits and model only.

    Banner, Nahshan, Hoffer and Soudry, Post-training 4-bit quantization of convolution networks for rapid-deployment, arXiv 1810.05723.
    spread: the standard deviation (``gauss``), or b = mean |x - mean| (``laplace``), any shape. ``one_sided``: x comes after a ReLU and
    its grid spends no codes on negative values, which is worth one bit. It counts 2^bits steps, too few at 2 and 3 bits.
    """
    if model not in get_args(Model):
        raise TargetError(f"unknown model of activations {model!r}: choose from {', '.join(get_args(Model))}")
    if bits not in WEIGHT_BITS:
        raise TargetError(f"{bits} bits are not supported: choose from {', '.join(map(str, WEIGHT_BITS))}")
    noise = 3 * 4.0 ** (bits + one_sided)

    def slope(x: float) -> float:
        """Half the derivative of the error at a clip of x spreads, times noise: it rises from below 0 to above."""
        if model == "laplace":
            return x - noise * math.exp(-x)
        density, above = math.exp(-x * x / 2) / math.sqrt(2 * math.pi), math.erfc(x / math.sqrt(2)) / 2
        return x - noise * 2 * (density - x * above)

    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return spread * high


def aciq_range(x: Tensor, spec: QSpec, mass: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale and zero by :func:`aciq` around the mean, nowhere beyond min and max; each channel by the model that it is more like.

    x: any shape; scale and zero: (C,), C the size of ``spec.axis``, or (). ``mass`` weighs each element and broadcasts to x. A tensor
    without negative values on an asymmetric grid is one-sided: its zeros, which cost nothing, are left out. Raises TargetError for
    grids that are not uniform, NetworkError on an empty tensor or one with NaN or infinity.
    """
    if spec.grid != "uniform":
        raise TargetError(f"ACIQ's clips are those of uniform grids, not of the {spec.grid} one: choose another range")
    rows = channel_rows(x, spec.axis)
    weight = torch.ones_like(rows) if mass is None else channel_rows(mass.expand_as(x), spec.axis)
    one_sided = has_zero_points(spec) and bool((rows >= 0).all())
    if one_sided:
        weight = weight * (rows > 0)
    share = weight / weight.sum(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
    centre = torch.zeros_like(rows[:, :1]) if one_sided else (share * rows).sum(1, keepdim=True)
    size = (share * (rows - centre).abs()).sum(1)
    deviation = (share * (rows - centre).square()).sum(1).sqrt()
    gauss, laplace = aciq(deviation, spec.bits, "gauss", one_sided), aciq(size, spec.bits, "laplace", one_sided)
    clip = torch.where(size > _LIKE_GAUSS * deviation, gauss, laplace)[:, None]
    low, high = (centre - clip).clamp(min=rows.amin(1, keepdim=True)), (centre + clip).clamp(max=rows.amax(1, keepdim=True))
    scale, zero = from_range(low[:, 0], high[:, 0], spec)
    return (scale[0], zero[0]) if spec.axis is None else (scale, zero)


def _check(values: Tensor, masses: Tensor) -> None:
    if values.dim() != 1 or masses.shape != values.shape or not values.numel():
        raise NetworkError(f"values {tuple(values.shape)} and masses {tuple(masses.shape)} do not fit: expected (n,) and a mass for each")
    if not bool(torch.isfinite(values).all() & torch.isfinite(masses).all() & (masses >= 0).all()):
        raise NetworkError("a value or a mass is NaN or infinite, or a mass is negative: hand in finite moments")
