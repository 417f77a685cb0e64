"""The one definition of the quantizer: value = scale * (code - zero), all in float32.

Every method, the student and every export go through these functions. ``scale`` and ``zero`` have shape (C,), C the size of
``spec.axis``, or () where ``spec.axis`` is None. Values round half to even.
"""

import torch
from torch import Tensor

from datafree.plan import QSpec


def broadcast(values: Tensor, spec: QSpec, like: Tensor) -> Tensor:
    """Lay ``values`` (C,) along ``spec.axis`` of ``like``, so that the two broadcast; values of shape () stay as they are."""
    if spec.axis is None:
        return values
    sizes = [1] * like.dim()
    sizes[spec.axis] = -1
    return values.reshape(sizes)


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
    fixed = x.detach()
    nearest = _nearest(fixed, scale, zero, spec)
    if not (torch.is_grad_enabled() and x.requires_grad):  # in place: activations are large
        shifted = nearest.clamp_(*spec.levels).sub_(broadcast(zero.float(), spec, x))
        return shifted.mul_(broadcast(scale.float(), spec, x)).to(x.dtype)
    codes = nearest.clamp(*spec.levels)
    value = dequantize(codes, scale, zero, spec).to(x.dtype)
    # x - fixed is an exact 0 that carries the gradient, so the sum stays the value to the last bit
    return value + torch.where(nearest == codes, x - fixed, 0.0)


def has_zero_points(spec: QSpec) -> bool:
    """Whether zero points have to be stored: the other grids imply theirs."""
    return spec.grid == "uniform" and not spec.symmetric


def round_(steps: Tensor, zero: Tensor, spec: QSpec) -> Tensor:
    """The codes, before clipping, of values counted in steps of the grid: float32, in place."""
    # an integer zero point is added after rounding, as runtimes do; DoReFa's lies between two codes and must come before
    return steps.add_(zero).round_() if spec.grid == "dorefa" else steps.round_().add_(zero)


def _nearest(x: Tensor, scale: Tensor, zero: Tensor, spec: QSpec) -> Tensor:
    """The codes before clipping, as float32."""
    return round_(x.float() / broadcast(scale.float(), spec, x), broadcast(zero.float(), spec, x), spec)
