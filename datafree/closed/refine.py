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

# Of the scale, by bits, each tried on every row; where there is no entry, 1 alone.
FACTORS = MappingProxyType({2: (1.05, 1.15, 1.25, 1.4), 3: (0.95, 1.05, 1.15)})
SWEEPS = 2
_COLUMNS = 128  # columns between two products with the errors of all columns


def refine(weight: Tensor, hessian: Tensor, scale: Tensor, spec: QSpec, sweeps: int = SWEEPS) -> tuple[Tensor, Tensor]:
    """Codes (int16, shape of ``weight``) and scales (groups, out): error feedback at FACTORS times ``scale``, then :func:`descend`.

    Each row keeps the factor that serves it best.

    Args:
        weight: (groups, out, n).
        hessian: (groups, n, n), positive semidefinite, or in blocks as for ``error_feedback``.
        scale: (groups, out), where to begin.
        spec: a symmetric grid: uniform or ternary.
        sweeps: passes of coordinate descent over the columns, each followed by a new scale.

    Raises NetworkError for grids with zero points or without 0, and what ``error_feedback`` refuses.
    """
    _check(spec)
    weight, hessian = weight.detach().float(), hessian.float()
    codes, found = torch.zeros(weight.shape, dtype=torch.int16, device=weight.device), scale
    least = torch.full_like(scale, torch.inf)
    for factor in FACTORS.get(spec.bits, (1.0,)):
        trial = error_feedback(weight, hessian, scale * factor, spec)
        fitted = fit_scale(weight, trial, hessian, scale * factor)
        error = energy(weight - fitted[..., None] * trial, hessian)
        better = error < least
        codes, found = torch.where(better[..., None], trial, codes), torch.where(better, fitted, found)
        least = torch.minimum(error, least)
    scale = found
    for _ in range(sweeps):
        codes = descend(weight, codes, hessian, scale, spec)
        scale = fit_scale(weight, codes, hessian, scale)
    return codes, scale


def descend(weight: Tensor, codes: Tensor, hessian: Tensor, scale: Tensor, spec: QSpec) -> Tensor:
    """One pass of coordinate descent: each code in turn becomes the best one given all others. The error never grows.

    Shapes as for :func:`refine`; columns on whose diagonal H is 0 keep their codes.
    """
    _check(spec)
    low, high = spec.levels
    blocks = len(hessian) // len(weight)
    step = scale.repeat_interleave(blocks, 0)
    rest = split(weight - scale[..., None] * codes, blocks).transpose(1, 2).contiguous()  # (groups * blocks, n / blocks, out)
    moved = split(codes, blocks).to(rest.dtype).transpose(1, 2).contiguous()
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    n = hessian.shape[2]
    for start in range(0, n, _COLUMNS):
        stop = min(start + _COLUMNS, n)
        inner = hessian[:, start:stop, start:stop].contiguous()
        slope = hessian[:, start:stop] @ rest
        for j in range(start, stop):
            pull = slope[:, j - start] / (diagonal[:, j, None] * step)
            new = (moved[:, j] + torch.where(torch.isfinite(pull), pull, 0)).round_().clamp_(low, high)
            change = (new - moved[:, j]) * step
            moved[:, j] = new
            rest[:, j] -= change
            slope.addcmul_(inner[:, :, j - start, None], change[:, None], value=-1)
    return merge(moved.transpose(1, 2), blocks).to(torch.int16)


def fit_scale(weight: Tensor, codes: Tensor, hessian: Tensor, scale: Tensor) -> Tensor:
    """The scale of least error for the codes, (groups, out); where that is no positive number, ``scale``."""
    blocks = len(hessian) // len(weight)
    projected = merge(split(codes.to(hessian.dtype), blocks) @ hessian, blocks)
    fitted = (weight * projected).sum(2) / (codes * projected).sum(2)
    return torch.where(torch.isfinite(fitted) & (fitted > 0), fitted, scale)


def _check(spec: QSpec) -> None:
    if has_zero_points(spec) or spec.grid == "dorefa":
        raise NetworkError(f"codes and scales are refined on symmetric grids only, not on {spec}: round with error_feedback instead")
