"""Batch-norm statistics of a layer with quantized weights, without running it.

DF-MPC (arXiv 2307.00498, eq. 16) needs them and does not say how to get them without data.
Differs: we derive them from the moments of the layer's input.
"""

import torch
from torch import Tensor

from datafree.closed.moments import RHO, Moments, mean_form, variance_form

LIMIT = 10.0  # a layer's spread changes by no more than this factor, up or down


def recalibrate(
    low: Tensor,
    full: Tensor,
    mu: Tensor,
    sigma: Tensor,
    inputs: Moments | None,
    alpha: float | Tensor = 1.0,
    rho: float = RHO,
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the output of ``low``, each (out,), given those of ``full``.

    Only differences between the two layers are derived, so errors of the model enter through the small change alone:
    ``mu_hat = (mu + sum (alpha Wh - W) m) / alpha``, ``sigma_hat = sigma sqrt(wh^T Hv wh / w^T Hv w)``.
    Where nothing is known about the input, the mean is kept and the ratio is that of the norms of the weights.
    A channel whose low-bit weights (or float ones) are all 0 keeps its spread.

    Args:
        low: Wh, (out, in / groups, *kernel), with its scale left out.
        full: W, of the same shape.
        mu: mean of the output of ``full`` (running mean less the layer's own bias), (out,).
        sigma: its standard deviation, sqrt(running_var + eps), (out,).
        inputs: moments per input channel, (in,); None if unknown.
        alpha: scale that brings ``low`` to the size of ``full``: a number or (out,), positive.
        rho: correlation of neighbouring pixels.
    """
    scale = torch.as_tensor(alpha, dtype=full.dtype, device=full.device).expand(full.shape[0])
    low = scale.view(-1, *(1,) * (full.dim() - 1)) * low.to(full.dtype)
    if inputs is not None and inputs.known:
        mean = mu + mean_form(low - full, inputs.mean, groups=inputs.mean.numel() // full.shape[1])
        energy_low, energy_full = variance_form(low, low, inputs.var, rho), variance_form(full, full, inputs.var, rho)
    else:
        mean = mu
        energy_low, energy_full = low.square().flatten(1).sum(1), full.square().flatten(1).sum(1)
    return mean / scale, sigma * spread_ratio(energy_low, energy_full) / scale


def spread_ratio(energy_low: Tensor, energy_full: Tensor) -> Tensor:
    """How much the standard deviation of each output changes with its variance, within LIMIT; 1 where either is 0."""
    ratio = (energy_low / energy_full).sqrt().clamp(1 / LIMIT, LIMIT)
    return torch.where((energy_low > 0) & (energy_full > 0), ratio, 1)
