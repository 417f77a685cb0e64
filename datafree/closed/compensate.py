"""DF-MPC: the channel scale that compensates low-bit weights (arXiv 2307.00498), and our decoupled scale.

Legend, after the paper: layer l computes ``X = W * A`` and a batch norm follows; ``wh`` is the low-bit ``w``. With
``x_j = gamma_j w_j / sigma_j`` and ``y_j = beta_j - gamma_j mu_j / sigma_j``, hatted for the low-bit layer, channel j of
the low-bit layer is multiplied by the ``c_j >= 0`` that minimises ``|c xh - x|^2 + lambda1 (c yh - y)^2 + lambda2 c^2``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from datafree.closed.moments import RHO, variance_form
from datafree.closed.recalibrate import LIMIT

_DEAD = 1e-12  # of the largest denominator: squares, so a millionth of the largest channel


@dataclass(frozen=True)
class Affine:
    """What follows a layer, per output channel: ``scale * output + shift``, both (out,)."""

    scale: Tensor
    shift: Tensor

    @staticmethod
    def of_norm(gamma: Tensor, beta: Tensor, mu: Tensor, sigma: Tensor) -> "Affine":
        """A batch norm. sigma: sqrt(running_var + eps); mu: running mean less the layer's own bias. Each (out,)."""
        scale = gamma / sigma
        return Affine(scale, beta - scale * mu)

    @staticmethod
    def of_bias(bias: Tensor) -> "Affine":
        """A layer without a norm: its bias, zeros where it has none (the offset then drops out of the loss)."""
        return Affine(torch.ones_like(bias), bias)


def coefficients(low: Tensor, full: Tensor, after_low: Affine, after_full: Affine, lambda1: float = 0.5, lambda2: float = 0.0) -> Tensor:
    """c of DF-MPC, (out,): eq. 26-27 of arXiv 2307.00498, read channel by channel (its Assumption 1) and clipped at 0.

    Args:
        low: low-bit weights Wh, (out, ...), in any unit that ``after_low`` undoes.
        full: float weights W, of the same shape.
        after_low: the affine map behind the low-bit layer, with the recalibrated statistics.
        after_full: the one behind the float layer.
        lambda1: weight of the offset.
        lambda2: ridge on c.
    """
    return solve(*terms(low, full, after_low, after_full, lambda1), lambda2)


def terms(low: Tensor, full: Tensor, after_low: Affine, after_full: Affine, lambda1: float = 0.5) -> tuple[Tensor, Tensor]:
    """Numerator and denominator of c, each (out,); layers that share a batch norm add theirs up before :func:`solve`."""
    xh = after_low.scale[:, None] * low.flatten(1)
    x = after_full.scale[:, None] * full.flatten(1)
    yh, y = after_low.shift, after_full.shift
    return (xh * x).sum(1) + lambda1 * yh * y, (xh * xh).sum(1) + lambda1 * yh * yh


def solve(numerator: Tensor, denominator: Tensor, lambda2: float = 0.0) -> Tensor:
    """c from its two sums, (out,); 1 for a dead channel, which says nothing about its scale."""
    sound = torch.isfinite(numerator) & torch.isfinite(denominator)
    floor = _DEAD * torch.where(sound, denominator, 0).max()
    sound &= denominator > floor
    return torch.where(sound, (numerator / (denominator + lambda2)).clamp(min=0), 1)


def spread_scale(codes: Tensor, weight: Tensor, var: Tensor, fallback: Tensor, rho: float = RHO) -> Tensor:
    """The scale that keeps the variance of the output: sqrt(w^T Hv w / wh^T Hv wh), (out,); arguments as in :func:`plus_scale`.

    The least-error scale shrinks every output a little, and over many layers the signal fades: this one does not.
    """
    wh = codes.to(weight.dtype)
    scale = (variance_form(weight, weight, var, rho) / variance_form(wh, wh, var, rho)).sqrt()
    return torch.where(torch.isfinite(scale) & (scale > 0), scale, fallback.to(scale)).clamp(fallback / LIMIT, fallback * LIMIT)


def plus_scale(codes: Tensor, weight: Tensor, var: Tensor, fallback: Tensor, rho: float = RHO) -> Tensor:
    """The scale s_j that loses least of the output: (wh^T Hv w) / (wh^T Hv wh), (out,), to stand before the activation.

    Differs: the offset is left to :mod:`datafree.closed.correct`, which brings it to 0 exactly, so that the scale has
    the variance of the output alone to care for.

    Args:
        codes: Wh, (out, in / groups, *kernel), zero point taken off.
        weight: W, of the same shape.
        var: variances of the input channels, (in,).
        fallback: scale of a channel whose codes are all 0 or whose optimum is not positive, (out,).
        rho: correlation of neighbouring pixels.
    """
    wh = codes.to(weight.dtype)
    denominator = variance_form(wh, wh, var, rho)
    scale = variance_form(wh, weight, var, rho) / denominator
    return torch.where((denominator > 0) & (scale > 0) & torch.isfinite(scale), scale, fallback.to(scale))
