"""Codes and scales of low-bit weights chosen together, for less error ``(w - q) H (w - q)^T`` than one pass of error feedback leaves.

The scale of least squared error is best for rounding to nearest; error feedback does better with another, mostly a wider one.
Afterwards every code may still move while all others stand: coordinate descent, and the scale has a closed form given the codes.
"""

from types import MappingProxyType

import torch
from torch import Tensor

from datafree.closed.rounding import energy, error_feedback, merge, split
from datafree.errors import NetworkError
from datafree.plan import QSpec
from datafree.quant.grid import has_zero_points
from datafree.quant.ranges import TINY

# Of the scale, by bits, each tried on every row; where there is no entry, 1 alone.
FACTORS = MappingProxyType({2: (1.05, 1.15, 1.25, 1.4), 3: (0.95, 1.05, 1.15)})
SWEEPS = 2  # of coordinate descent
_COLUMNS = 128  # columns between two products with the errors of all columns


def refine(weight: Tensor, hessian: Tensor, scale: Tensor, spec: QSpec) -> tuple[Tensor, Tensor]:
    """Codes (int16, shape of ``weight``) and scales (groups, out): error feedback at FACTORS times ``scale``, then :func:`descend`.

    Each row keeps the factor that serves it best.

    Args:
        weight: (groups, out, n).
        hessian: (groups, n, n), positive semidefinite, or in blocks as for ``error_feedback``.
        scale: (groups, out), where to begin.
        spec: a symmetric grid: uniform or ternary.

    Raises NetworkError for grids with zero points or without 0, and what ``error_feedback`` refuses.
    """
    _check(spec)
    weight, hessian = weight.detach().float(), hessian.float()
    tried = []
    for factor in FACTORS.get(spec.bits, (1.0,)):
        codes = error_feedback(weight, hessian, scale * factor, spec)
        tried.append((codes, fit_scale(weight, codes, hessian, scale * factor)))
    codes, scale = tried[0] if len(tried) == 1 else _best(weight, hessian, tried)
    for _ in range(SWEEPS):
        codes = descend(weight, codes, hessian, scale, spec)
        scale = fit_scale(weight, codes, hessian, scale)
    return codes, scale


def descend(weight: Tensor, codes: Tensor, hessian: Tensor, scale: Tensor, spec: QSpec) -> Tensor:
    """One pass of coordinate descent: each code in turn becomes the best one given all others. The error never grows.

    Shapes as for :func:`refine`; columns on whose diagonal H is 0 keep their codes.
    """
    _check(spec)
    blocks = len(hessian) // len(weight)
    steps = weight / scale[..., None]
    moved = split(codes, blocks).to(steps.dtype).transpose(1, 2).contiguous()  # (groups * blocks, n / blocks, out)
    rest = split(steps, blocks).transpose(1, 2).sub(moved)  # the errors, in steps of the grid
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    inverse = torch.where(diagonal > TINY, 1 / diagonal, 0)[..., None]
    n = hessian.shape[2]
    for start in range(0, n, _COLUMNS):
        stop = min(start + _COLUMNS, n)
        inner = hessian[:, start:stop, start:stop].contiguous()
        slope = hessian[:, start:stop] @ rest
        for j in range(start, stop):
            new = torch.addcmul(moved[:, j], slope[:, j - start], inverse[:, j]).round_().clamp_(*spec.levels)
            change = new - moved[:, j]
            moved[:, j] = new
            rest[:, j] -= change
            slope[:, j - start + 1 :].addcmul_(inner[:, j - start + 1 :, j - start, None], change[:, None], value=-1)
    return merge(moved.transpose(1, 2), blocks).to(torch.int16)


def fit_scale(weight: Tensor, codes: Tensor, hessian: Tensor, scale: Tensor) -> Tensor:
    """The scale of least error for the codes, (groups, out); where that is no positive number, ``scale``."""
    blocks = len(hessian) // len(weight)
    projected = merge(split(codes.to(hessian.dtype), blocks) @ hessian, blocks)
    fitted = (weight * projected).sum(2) / (codes * projected).sum(2)
    return torch.where(torch.isfinite(fitted) & (fitted > 0), fitted, scale)


def _best(weight: Tensor, hessian: Tensor, tried: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Of several codes and scales those of least error, row by row."""
    (codes, scale), *others = tried
    least = energy(weight - scale[..., None] * codes, hessian)
    for trial, fitted in others:
        error = energy(weight - fitted[..., None] * trial, hessian)
        better = error < least
        codes, scale = torch.where(better[..., None], trial, codes), torch.where(better, fitted, scale)
        least = torch.minimum(error, least)
    return codes, scale


def _check(spec: QSpec) -> None:
    if has_zero_points(spec) or spec.grid == "dorefa":
        raise NetworkError(f"codes and scales are refined on symmetric grids only, not on {spec}: round with error_feedback instead")
