"""The one definition of the quantizer: value = scale * (code - zero), all in float32.

Every method, the student and every export go through these functions. ``scale`` and ``zero`` have shape (C,), C the size of
``spec.axis``, or () where ``spec.axis`` is None. Values round half to even.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from datafree.plan import QSpec

_BLOCK = 1 << 20  # values


def broadcast(values: Tensor, spec: QSpec, like: Tensor) -> Tensor:
    """Lay ``values`` (C,) along ``spec.axis`` of ``like``, so that the two broadcast; values of shape () stay as they are."""
    if spec.axis is None:
        return values
    sizes = [1] * like.dim()
    sizes[spec.axis] = -1
    return values.reshape(sizes)


def row_blocks(x: Tensor, scale: Tensor, zero: Tensor, spec: QSpec) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows of ``x`` with about a million values together, and their scale and zero, for work that would take several copies of ``x``."""
    rows, along = max(1, _BLOCK * len(x) // max(1, x.numel())), spec.axis is not None and spec.axis % x.dim() == 0
    for start in range(0, len(x), rows):
        place = slice(start, start + rows)
        yield place, scale[place] if along else scale, zero[place] if along else zero


def quantize(x: Tensor, scale: Tensor, zero: Tensor, spec: QSpec) -> Tensor:
    """The codes of ``x`` (finite), int16, within ``spec.levels``."""
    return _nearest(x, scale, zero, spec).clamp(*spec.levels).to(torch.int16)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor, spec: QSpec) -> Tensor:
    """The values of ``codes``, float32."""
    return broadcast(scale.float(), spec, codes) * (codes.float() - broadcast(zero.float(), spec, codes))


def fake_quantize(x: Tensor, scale: Tensor, zero: Tensor, spec: QSpec) -> Tensor:
    """Round ``x`` to the grid: ``dequantize(quantize(x))`` bit for bit, in the dtype of ``x``.

    Straight-through gradient (arXiv 1308.3432): that of the identity where the code did not have to be clipped, else zero.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return _on_grid(_nearest(x, scale, zero, spec).clamp_(*spec.levels), scale, zero, spec).to(x.dtype)
    value: Tensor = _StraightThrough.apply(x, scale, zero, spec)  # type: ignore[no-untyped-call]
    return value


class _StraightThrough(torch.autograd.Function):
    """With autograd's own operations it takes twice as many passes over activations, which are large."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, zero: Tensor, spec: QSpec) -> Tensor:  # type: ignore[no-untyped-def]
        nearest = _nearest(x, scale, zero, spec)
        codes = nearest.clamp(*spec.levels)
        ctx.save_for_backward(nearest.eq_(codes))  # a factor of 0 or 1: a mask of booleans takes several times as long
        return _on_grid(codes, scale, zero, spec).to(x.dtype)

    @staticmethod
    def backward(ctx, slope: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        (kept,) = ctx.saved_tensors
        return (slope * kept).to(slope.dtype), None, None, None


def has_zero_points(spec: QSpec) -> bool:
    """Whether zero points have to be stored: the other grids imply theirs."""
    return spec.grid == "uniform" and not spec.symmetric


def round_(steps: Tensor, zero: Tensor, spec: QSpec) -> Tensor:
    """The codes, before clipping, of values counted in steps of the grid: float32, in place."""
    # an integer zero point is added after rounding, as runtimes do; DoReFa's lies between two codes and must come before
    return steps.add_(zero).round_() if spec.grid == "dorefa" else steps.round_().add_(zero)


def _on_grid(codes: Tensor, scale: Tensor, zero: Tensor, spec: QSpec) -> Tensor:
    """The values of ``codes``, float32, in place."""
    return codes.sub_(broadcast(zero.float(), spec, codes)).mul_(broadcast(scale.float(), spec, codes))


def _nearest(x: Tensor, scale: Tensor, zero: Tensor, spec: QSpec) -> Tensor:
    """The codes before clipping, as float32."""
    return round_(x.float() / broadcast(scale.float(), spec, x), broadcast(zero.float(), spec, x), spec)
