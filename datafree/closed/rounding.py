"""Rounding with error feedback: what one weight loses by rounding, those that are not rounded yet make good.

Frantar et al., GPTQ, arXiv 2210.17323. Legend: H the second moment of a layer's inputs; M its lower Cholesky factor, H = M M^T.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from datafree.closed.moments import RHO, tap_correlation
from datafree.errors import NetworkError
from datafree.plan import QSpec
from datafree.quant.grid import has_zero_points, round_
from datafree.quant.precision import float64

_BLOCK = 1 << 15  # weights worked on column by column: they stay in the cache, and are too few for torch to start threads
_PART = 1 << 24  # weights that are rounded at a time, with several copies of them
_RAISES = (1, 10, 100)  # of the damping


def error_feedback(
    weight: Tensor, hessian: Tensor, scale: Tensor, spec: QSpec, zero: Tensor | None = None, *, damping: float = 0.01
) -> Tensor:
    """Codes (int16, shape of ``weight``) that keep ``(w - q) H (w - q)^T`` of every row w small; columns of large H come first.

    The errors of the columns done enter the next one through M, which gives the same codes as the factor of the inverse of H in
    GPTQ (arXiv 2307.13304, theorem 6) and needs no inverse. Inputs that never fire (0 on the diagonal) round to nearest.
    H that is not positive definite is factored in float64, then with 10 and 100 times the damping.

    Args:
        weight: (groups, out, n), any float dtype.
        hessian: (groups, n, n), or (n, n) for one group; (groups * blocks, n / blocks, n / blocks) where it is block-diagonal, which
            takes n / blocks steps only.
        scale: (groups, out) or what broadcasts to it.
        spec: the grid; its axis does not matter here.
        zero: like ``scale``; None for the zero that the grid implies.
        damping: share of the mean diagonal that is added to the diagonal.

    Raises NetworkError where shapes do not fit, an asymmetric grid has no zero, or H cannot be factored.
    """
    blocks = _check(weight, hessian, spec, zero)
    scale = scale.float().expand(weight.shape[:2]).repeat_interleave(blocks, 0)
    zero = torch.zeros(()) + (spec.levels[1] / 2 if spec.grid == "dorefa" else 0.0) if zero is None else zero
    zero = zero.to(scale).expand(weight.shape[:2]).repeat_interleave(blocks, 0)
    apart = split(weight.detach().float(), blocks)
    groups, outputs, n = apart.shape
    hessian = hessian.expand(groups, n, n)
    order = hessian.diagonal(dim1=1, dim2=2).argsort(dim=1, stable=True)  # rising: the last column is rounded first
    share = _shares(hessian, order, damping)
    places = order[:, :, None].expand(groups, n, outputs)
    rest = (apart / scale[..., None]).transpose(1, 2).gather(1, places)  # in steps of the grid; of columns done: their errors w - q
    codes = torch.empty_like(rest)
    block = min(128, max(8, _BLOCK // (groups * outputs)))  # columns between two products with the errors of all columns done
    for stop in range(n, 0, -block):
        start = max(0, stop - block)
        wanted = rest[:, start:stop] + share[:, stop:, start:stop].transpose(1, 2) @ rest[:, stop:]
        for j in range(stop - 1, start - 1, -1):
            codes[:, j] = code = round_(wanted[:, j - start], zero, spec).clamp_(*spec.levels)
            rest[:, j] -= code.sub_(zero)
            wanted[:, : j - start].addcmul_(share[:, j, start:j, None], rest[:, j, None])
    return merge(torch.empty_like(codes).scatter_(1, places, codes).transpose(1, 2), blocks).to(torch.int16)


def in_parts(rows: Tensor, scale: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Outputs of (groups, out, n) and their scales (groups, out), so many at a time that a copy of them is small."""
    size = max(1, _PART // (rows.shape[0] * rows.shape[2]))
    yield from zip(rows.split(size, 1), scale.split(size, 1), strict=True)  # type: ignore[no-untyped-call]


def split(rows: Tensor, blocks: int) -> Tensor:
    """The columns of (groups, out, n) in so many equal parts, each a group of its own: (groups * blocks, out, n / blocks)."""
    groups, outputs, n = rows.shape
    return rows.reshape(groups, outputs, blocks, n // blocks).transpose(1, 2).reshape(groups * blocks, outputs, n // blocks)


def merge(parts: Tensor, blocks: int) -> Tensor:
    """The inverse of :func:`split`."""
    every, outputs, n = parts.shape
    return parts.reshape(every // blocks, blocks, outputs, n).transpose(1, 2).reshape(every // blocks, outputs, blocks * n)


def energy(rows: Tensor, hessian: Tensor) -> Tensor:
    """``w H w^T`` of every row w, (groups, out). rows: (groups, out, n); hessian as for :func:`error_feedback`, dense or in blocks."""
    blocks = len(hessian) // len(rows)
    parts = split(rows, blocks)
    return ((parts @ hessian) * parts).sum(2).view(len(rows), blocks, -1).sum(1)


def shrink(hessian: Tensor, share: float = 0.2) -> Tensor:
    """(1 - share) H + share diag(H), (..., n, n): correlations are trusted less than variances."""
    shrunk = hessian * (1 - share)
    shrunk.diagonal(dim1=-2, dim2=-1).copy_(hessian.diagonal(dim1=-2, dim2=-1))
    return shrunk


def moment_hessian(var: Tensor, kernel: tuple[int, ...], rho: float = RHO) -> Tensor:
    """Hv of every input channel, (in, taps, taps): var_c rho^(L1 distance of the taps).

    Channels are independent in this model, so each is a group of its own. var: (in,); kernel: () for a linear layer.
    """
    return var[:, None, None] * tap_correlation(kernel, rho).to(var)


def _check(weight: Tensor, hessian: Tensor, spec: QSpec, zero: Tensor | None) -> int:
    """The number of diagonal blocks that H is made of."""
    if weight.dim() == 3 and hessian.dim() == 2 and weight.shape[0] != 1:
        raise NetworkError(f"one Hessian of shape {tuple(hessian.shape)} for {weight.shape[0]} groups: give one for each")
    blocks = len(hessian) // len(weight) if hessian.dim() == 3 else 1
    size = (len(weight) * blocks, *(weight.shape[-1] // max(blocks, 1),) * 2)
    if weight.dim() != 3 or hessian.shape not in (size, size[1:]) or blocks * size[1] != weight.shape[2]:
        raise NetworkError(
            f"a weight of shape {tuple(weight.shape)} and a Hessian of shape {tuple(hessian.shape)} do not fit: "
            "expected (groups, out, n) and (groups, n, n), or blocks on the diagonal of that"
        )
    if zero is None and has_zero_points(spec):
        raise NetworkError(f"an asymmetric grid of {spec.bits} bits needs zero points as well as scales: pass zero")
    return blocks


def _shares(hessian: Tensor, order: Tensor, damping: float) -> Tensor:
    """M[i, j] / M[j, j] of the damped H in the given order, float32: how much of the error of column i enters column j < i."""
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    if not bool(torch.isfinite(hessian).all()) or bool((diagonal < 0).any()):
        raise NetworkError("a Hessian holds NaN, infinity or negative variances: check the statistics it was made from")
    mean = diagonal.mean(1, keepdim=True)
    mean = torch.where(mean > 0, mean, 1.0)
    factor, failed = _factor(hessian.float(), torch.where(diagonal == 0, mean, damping * mean), order)
    for times in _RAISES:
        bad = failed.nonzero().squeeze(1)
        if len(bad) == 0:
            break
        added = torch.where(diagonal == 0, mean, times * damping * mean)
        exact = float64(hessian[bad])
        again, still = _factor(exact, added[bad].to(exact), order[bad].to(exact.device))
        factor[bad], failed[bad] = again.to(factor), still.to(failed)
    if bool(failed.any()):
        raise NetworkError(
            f"{int((failed > 0).sum())} of {len(failed)} Hessians are not positive definite, even with {_RAISES[-1]} times the damping of "
            f"{damping}: shrink them more, give more inputs or a larger damping"
        )
    return factor.div_(factor.diagonal(dim1=1, dim2=2)[:, None].clone())


def _factor(hessian: Tensor, added: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """M of H with ``added`` on its diagonal, in the given order, and for each group whether that failed (above 0)."""
    ordered = hessian.gather(1, order[:, :, None].expand_as(hessian)).gather(2, order[:, None].expand_as(hessian))
    ordered.diagonal(dim1=1, dim2=2).add_(added.gather(1, order))
    factor, failed = torch.linalg.cholesky_ex(ordered)
    return factor, failed
