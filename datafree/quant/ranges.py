"""From tensors to ranges: scale and zero point of each channel.

``x`` has any shape; scale and zero have shape (C,), C the size of ``spec.axis``, or () where that is None. Asymmetric ranges
always include 0. A channel of zeros gets scale 1. All raise NetworkError on an empty tensor or one with NaN or infinity.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from datafree.errors import NetworkError, TargetError
from datafree.plan import QSpec
from datafree.quant.precision import float64

Rule = Literal["minmax", "mse"]
_BLOCK = 1 << 18  # elements
TINY = torch.finfo(torch.float32).tiny


def fit(x: Tensor, spec: QSpec, rule: Rule) -> tuple[Tensor, Tensor]:
    """Scale and zero of ``x`` by the rule ``minmax`` or ``mse``."""
    if rule == "minmax":
        return minmax(x, spec)
    if rule == "mse":
        return mse(x, spec)
    raise TargetError(f"unknown range rule {rule!r}: choose minmax or mse")


def minmax(x: Tensor, spec: QSpec, check: bool = True) -> tuple[Tensor, Tensor]:
    """The range that clips nothing; for the ternary grid the scale of :func:`twn`. ``check``: see :func:`channel_rows`."""
    if spec.grid == "ternary":
        scale = twn(x, spec.axis, check)[1]
        return scale, torch.zeros_like(scale)
    rows = channel_rows(x, spec.axis, check)
    return _shaped(*from_range(rows.amin(1), rows.amax(1), spec), spec.axis)


def mse(x: Tensor, spec: QSpec, weight: Tensor | None = None, exponent: float = 2.0) -> tuple[Tensor, Tensor]:
    """The range with the least ``sum(weight * |x - Q(x)|^exponent)`` among shrunk and widened min-max ranges.

    Factors of 0.2 to 1.2 in steps of a tenth, then in steps of a hundredth around the best. Where an asymmetric grid has values of
    both signs, each end is then moved alone: a short tail may matter all the same (that of GELU does). ``weight`` is the importance
    of each element and broadcasts to ``x``. For the ternary grid: the scale of :func:`optimal_ternary`, where ``exponent`` must be 2
    (TargetError otherwise).
    """
    if spec.grid == "ternary":
        if exponent != 2.0:
            raise TargetError(f"the ternary optimum is known for exponent 2 only, not {exponent}")
        scale = optimal_ternary(x, spec.axis, weight)[1]
        return scale, torch.zeros_like(scale)
    rows = channel_rows(x, spec.axis)
    importance = None if weight is None else channel_rows(weight.expand_as(x), spec.axis)
    by_row = replace(spec, axis=0)
    found = [_search(part, by_row, None if importance is None else importance[place], exponent) for place, part in _blocks(rows)]
    scale, zero = (torch.cat(parts) for parts in zip(*found, strict=True))
    return _shaped(scale, zero, spec.axis)


def _search(rows: Tensor, spec: QSpec, importance: Tensor | None, exponent: float) -> tuple[Tensor, Tensor]:
    ends = torch.stack([rows.amin(1), rows.amax(1)])
    factors = torch.ones_like(ends)
    scale, zero = from_range(ends[0], ends[1], spec)
    least = _error(rows, scale, zero, spec, importance, exponent)

    def attempt(trials: Tensor) -> None:
        """Of ``trials`` (K, 2, rows) those that are better; all at once where there is little to compute."""
        nonlocal factors, scale, zero, least
        for some in torch.split(trials, max(1, _BLOCK // rows.numel())):
            scales, zeros = from_range(ends[0] * some[:, 0], ends[1] * some[:, 1], spec)
            error, place = _error(rows, scales, zeros, spec, importance, exponent).min(0)
            better, at = error < least, (place, torch.arange(len(place), device=place.device))
            least, factors = torch.where(better, error, least), torch.where(better, some[place, :, at[1]].T, factors)
            scale, zero = torch.where(better, scales[at], scale), torch.where(better, zeros[at], zero)

    both = torch.ones_like(factors, dtype=torch.bool)
    low = both & (torch.arange(2, device=rows.device)[:, None] == 0)
    tenths = torch.arange(2, 13, device=rows.device) / 10
    hundredths = torch.cat([torch.arange(-9, 0, device=rows.device), torch.arange(1, 10, device=rows.device)]) / 100
    one_sided = spec.symmetric or bool((ends[0] >= 0).all()) or bool((ends[1] <= 0).all())
    for moved in (both,) if one_sided else (both, low, ~low):
        attempt(torch.where(moved, tenths[:, None, None], factors))
        attempt(torch.where(moved, (factors + hundredths[:, None, None]).clamp(0.2, 1.2), factors))
    return scale, zero


def from_range(low: Tensor, high: Tensor, spec: QSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero that cover [low, high], elementwise; the range is widened to include 0."""
    device = low.device
    low, high = float64(low).clamp(max=0), float64(high).clamp(min=0)
    smallest, largest = spec.levels
    if spec.grid == "dorefa":
        scale = _positive(2 * torch.maximum(-low, high) / largest).to(device)
        return scale, torch.full_like(scale, largest / 2)
    if spec.symmetric or spec.grid == "ternary":
        scale = _positive(torch.maximum(-low, high) / largest).to(device)
        return scale, torch.zeros_like(scale)
    scale = _positive((high - low) / (largest - smallest))
    zero = torch.round(-low / float64(scale)).clamp(smallest, largest).float()
    return scale.to(device), zero.to(device)


def twn(x: Tensor, axis: int | None = 0, check: bool = True) -> tuple[Tensor, Tensor]:
    """Ternary weight networks (arXiv 1605.04711): one threshold 0.7 mean|W| and one alpha = mean of |W| above it, for the layer.

    Returns codes (int16, shape of x) and alpha repeated for each slice of ``axis``.
    """
    rows = channel_rows(x, axis, check)
    size = rows.abs()
    keep = size > 0.7 * size.mean()
    alpha = _positive(float64(torch.where(keep, size, 0.0)).sum() / float64(keep.sum()).clamp(min=1)).to(x.device)
    codes = (torch.sign(rows) * keep).to(torch.int16)
    return _unrows(codes, x, axis), alpha if axis is None else alpha.repeat(rows.shape[0])


def optimal_ternary(x: Tensor, axis: int | None = 0, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The ternary codes and scales with the least squared error, exactly, for each slice of ``axis``.

    Keeping the k largest |w| with scale = their mean leaves sum(w^2) - (sum of the k)^2 / k, so the k that maximises the last term
    is optimal; with an importance ``weight`` h (broadcasts to x) that is (sum h|w|)^2 / sum h. Returns codes (int16), scale (C,) or ().
    """
    rows = channel_rows(x, axis)
    importance = None if weight is None else channel_rows(weight.expand_as(x), axis)
    found = [_ternary_rows(part, None if importance is None else importance[place]) for place, part in _blocks(rows)]
    codes, scale = (torch.cat(parts) for parts in zip(*found, strict=True))
    return _unrows(codes, x, axis), _shaped(scale, scale, axis)[0]


def _ternary_rows(rows: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    size, order = rows.abs().sort(dim=1, descending=True)
    weights = torch.ones_like(size) if importance is None else importance.gather(1, order)
    mass = float64(weights).cumsum(1)
    total = float64(weights * size).cumsum(1)
    best = torch.where(mass > 0, total.square() / mass.clamp(min=TINY), 0.0).argmax(1, keepdim=True)
    mean = (total.gather(1, best) / mass.gather(1, best).clamp(min=TINY)).squeeze(1)
    best = best.to(rows.device)
    kept = torch.zeros_like(rows).scatter_(1, order, (torch.arange(rows.shape[1], device=rows.device) <= best).to(rows.dtype))
    return (torch.sign(rows) * kept).to(torch.int16), _positive(mean).to(rows.device)


def _blocks(rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """A few rows at a time: what is computed in between stays in the cache."""
    size = max(1, _BLOCK // rows.shape[1])
    for start in range(0, rows.shape[0], size):
        place = slice(start, start + size)
        yield place, rows[place]


def channel_rows(x: Tensor, axis: int | None, check: bool = True) -> Tensor:
    """(C, n): one row for each slice of ``axis``; (1, n) where that is None. Detached, float32.

    Raises NetworkError for values that are not finite; without ``check`` they are not looked at, so a GPU is not waited for.
    """
    if axis is not None and not -x.dim() <= axis < x.dim():
        raise NetworkError(f"a tensor of shape {tuple(x.shape)} has no axis {axis} to range by: choose another axis or None")
    if x.numel() == 0:
        raise NetworkError(f"a tensor of shape {tuple(x.shape)} is empty: no range can be taken from it")
    values = x.detach().float()
    if check and not torch.isfinite(torch.stack(torch.aminmax(values))).all():  # NaN shows in both
        raise NetworkError(f"a tensor of shape {tuple(x.shape)} holds NaN or infinity: no range can be taken from it")
    return values.reshape(1, -1) if axis is None else values.movedim(axis, 0).reshape(x.shape[axis], -1)


def _unrows(rows: Tensor, x: Tensor, axis: int | None) -> Tensor:
    if axis is None:
        return rows.reshape(x.shape)
    moved = x.movedim(axis, 0).shape
    return rows.reshape(moved).movedim(0, axis)


def _shaped(scale: Tensor, zero: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    return (scale[0], zero[0]) if axis is None else (scale, zero)


def _positive(scale: Tensor) -> Tensor:
    """float32; 1 where there is nothing to scale, and never so small that it underflows."""
    return torch.where(scale > 0, scale.clamp(min=TINY), 1.0).float()


def _error(rows: Tensor, scale: Tensor, zero: Tensor, spec: QSpec, importance: Tensor | None, exponent: float) -> Tensor:
    """Of each row (C, n), (C,) or (K, C) as ``scale`` is; in steps of the grid and in place, for rows are as large as the network."""
    (low, high), shift = spec.levels, zero[..., None]
    steps = rows / scale[..., None]
    if spec.grid == "dorefa":
        steps += shift
        nearest = steps.round().clamp_(low, high)
    elif spec.symmetric:
        nearest = steps.round().clamp_(low, high)
    else:
        nearest = steps.round().add_(shift).clamp_(low, high).sub_(shift)  # bounds that are tensors take twice as long
    error = nearest.sub_(steps).square_() if exponent == 2.0 else nearest.sub_(steps).abs_().pow_(exponent)
    return (error if importance is None else error.mul_(importance)).sum(-1) * scale**exponent
