"""Activation ranges that minimise the expected squared error, from the mean and standard deviation of each channel alone.

An activation is clipped to [0, alpha] after a ReLU, or to [-alpha, alpha] where it has a sign, and rounded to ``bits`` bits with one
scale for all channels. What clipping costs is the second moment of the part beyond alpha; what rounding costs is step^2 / 12 wherever
the value lies strictly inside. Before the ReLU each channel is normal or Laplacian with the given mean and standard deviation.

The signed case is derived, no source gives it: the part below -alpha is the part of -x above alpha, so its cost is that of a channel
of mean -mean; and the 2^(bits - 1) - 1 steps on either side of zero make the step alpha / (2^(bits - 1) - 1).
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from datafree.errors import NetworkError, TargetError
from datafree.plan import WEIGHT_BITS

Model = Literal["gauss", "laplace"]
ClipModel = Literal["gauss", "laplace", "mix"]

_FAR = 12.0  # standard deviations beyond which no clip pays, at 8 bits and with Laplacian tails
_COARSE, _FINE, _ROUNDS = 512, 33, 3  # points of the grid search: at first, then around the best, so often
_WIDE = 6.0  # standard deviations that the range of 8-bit activations reaches


def expected_error(alpha: Tensor, mean: Tensor, sd: Tensor, bits: int, model: Model, signed: bool = False) -> Tensor:
    """Expected squared error per position, summed over the channels, of clipping at each ``alpha`` and rounding: float64.

    alpha: any shape, positive; mean, sd: (C,), of the values before the ReLU, sd >= 0 (that is |gamma| and beta of a batch norm);
    ``signed``: there is no ReLU. Returns the shape of alpha. Raises NetworkError or TargetError on values that make no sense.
    """
    _check(mean, sd, bits, model, get_args(Model))
    alpha, mean = alpha.double().unsqueeze(-1), mean.double()
    sd = sd.double().clamp(min=torch.finfo(torch.float32).tiny)
    cost, above = _tail(alpha - mean, sd, model)
    if signed:
        lower_cost, below = _tail(alpha + mean, sd, model)
        cost = cost + lower_cost
        inside = 1 - above - below
    else:
        inside = _tail(-mean, sd, model)[1] - above
    step = alpha / (2 ** (bits - 1) - 1 if signed else 2**bits - 1)
    return torch.sum(cost + step.square() / 12 * inside.clamp(min=0), -1)


def best_clip(mean: Tensor, sd: Tensor, bits: int, model: ClipModel, signed: bool = False) -> Tensor:
    """The alpha of least :func:`expected_error`, float32, shape (); ``mix`` averages the errors of both models.

    A grid search over the whole range, then finer around its best point. Use ``mix`` below 8 bits: real activations have tails
    between the two models. A tensor that is 0 throughout gets the alpha of step 1. Recompute it after any step that changes mean or sd.
    """
    _check(mean, sd, bits, model, get_args(ClipModel))
    reach = (mean.abs() if signed else mean).double() + _FAR * sd.double()
    widest = float(reach.max())
    if widest <= 0:
        return torch.tensor(float(2 ** (bits - 1) - 1 if signed else 2**bits - 1), device=mean.device)
    models: tuple[Model, ...] = ("gauss", "laplace") if model == "mix" else (model,)
    grid = torch.linspace(widest / _COARSE, widest, _COARSE, dtype=torch.float64, device=mean.device)
    for _ in range(_ROUNDS):
        error = torch.stack([expected_error(grid, mean, sd, bits, each, signed) for each in models]).sum(0)
        at = int(error.argmin())
        low, best, high = grid[max(at - 1, 0)], grid[at], grid[min(at + 1, len(grid) - 1)]
        grid = torch.linspace(float(low), float(high), _FINE, dtype=torch.float64, device=mean.device)
    return best.float()


def wide_range(mean: Tensor, sd: Tensor, low: float = -math.inf, high: float = math.inf) -> tuple[Tensor, Tensor]:
    """Lowest mean - 6 sd and highest mean + 6 sd of the channels, held within the bounds of an activation function, such as 0 and 6.

    Good at 8 bits only: at 4 bits it costs 5 to 7 dB against :func:`best_clip`. Nagel et al., arXiv 1906.04721; the 6 is that of
    public implementations. mean, sd: (C,), before the activation function. Returns two tensors of shape ().
    """
    _check(mean, sd, 8, "gauss", get_args(Model))
    return (mean - _WIDE * sd).amin().clamp(low, high), (mean + _WIDE * sd).amax().clamp(low, high)


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


def _tail(d: Tensor, sd: Tensor, model: Model) -> tuple[Tensor, Tensor]:
    """E[(x - a)^2; x > a] and P(x > a) at d = a - mean, elementwise, float64, sd > 0."""
    if model == "gauss":
        t = d / sd
        above = torch.erfc(t / math.sqrt(2)) / 2
        density = torch.exp(-t.square() / 2) / math.sqrt(2 * math.pi)
        return ((sd.square() + d.square()) * above - sd * d * density).clamp(min=0), above
    scale = sd / math.sqrt(2)
    decay = torch.exp(-d.abs() / scale)
    second = torch.where(d > 0, scale.square() * decay, d.square() + scale.square() * (2 - decay))
    return second, torch.where(d > 0, decay / 2, 1 - decay / 2)


def _check(mean: Tensor, sd: Tensor, bits: int, model: str, models: tuple[str, ...]) -> None:
    if model not in models:
        raise TargetError(f"unknown model of activations {model!r}: choose from {', '.join(models)}")
    if bits not in WEIGHT_BITS:
        raise TargetError(f"{bits} bits are not supported: choose from {', '.join(map(str, WEIGHT_BITS))}")
    if mean.dim() != 1 or mean.shape != sd.shape or mean.numel() == 0:
        raise NetworkError(f"mean {tuple(mean.shape)} and sd {tuple(sd.shape)}: expected one entry of each per channel, (C,)")
    if not bool(torch.isfinite(mean).all() & torch.isfinite(sd).all() & (sd >= 0).all()):
        raise NetworkError("mean or sd of a channel is NaN or infinite, or sd is negative: hand in |gamma| of its batch norm")
