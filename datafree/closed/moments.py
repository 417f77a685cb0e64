"""What batch-norm statistics say about activations: means, variances, and the Hessian of a layer that they imply.

The model behind all of it: every channel is normal, channels are independent, and two taps of one channel under the
same kernel correlate by ``rho`` to the power of their L1 distance. Channel c with mean m_c and variance v_c then gives
a layer the input second moment ``H[(c,p),(c',p')] = m_c m_c' + 1[c=c'] v_c rho^|p-p'|``; the second term is called Hv.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from datafree.errors import NetworkError

_BLOCK = 1 << 24  # values
RHO = 0.6  # neighbouring pixels of feature maps of natural pictures correlate by 0.5 to 0.7
_FAR = 12.0  # standard deviations beyond which a normal variable has no mass worth counting, even in float64
_POINTS, _REACH = 113, 7.0  # nodes of the quadrature and how many standard deviations they reach


@dataclass(frozen=True)
class Moments:
    """Mean and variance of the entries of a tensor, of equal shape.

    ``known`` is False where nothing could be derived: mean 0 and variance 1 are then only placeholders.
    """

    mean: Tensor
    var: Tensor
    known: bool = True


def clip(mean: Tensor, sd: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Mean and variance of min(max(x, low), high) for x ~ N(mean, sd^2), sd >= 0; a bound may be infinite."""
    safe = sd.clamp(min=torch.finfo(sd.dtype).tiny)
    a = ((low - mean) / safe).clamp(-_FAR, _FAR)
    c = ((high - mean) / safe).clamp(-_FAR, _FAR)
    # Moments about the clipped mean, in units of sd: large numbers never cancel, so float32 suffices.
    centre = torch.zeros_like(a).clamp(a, c)
    below, above = _cdf(a), _cdf(-c)
    inside = torch.where(a > 0, _cdf(-a) - above, 1 - below - above)
    first = _density(a) - _density(c)
    second = inside + a * _density(a) - c * _density(c)
    one = (a - centre) * below + (c - centre) * above + first - centre * inside
    two = (a - centre).square() * below + (c - centre).square() * above + second - 2 * centre * first + centre.square() * inside
    out = (mean.clamp(low, high) + sd * one).clamp(low, high)
    return out, sd.square() * (two - one.square()).clamp(min=0)


def relu(mean: Tensor, sd: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of max(x, 0) for x ~ N(mean, sd^2), sd >= 0."""
    return clip(mean, sd, 0.0, math.inf)


def elementwise(function: Callable[[Tensor], Tensor], mean: Tensor, sd: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of function(x) for x ~ N(mean, sd^2) and any function that works entry by entry.

    An evenly spaced rule with the weights of the normal density: as exact as Gauss-Hermite for smooth functions,
    and better at kinks (of PReLU, hard swish), where it errs by at most 6e-4 sd times the change of slope.
    """
    nodes = [_REACH * (2 * i / (_POINTS - 1) - 1) for i in range(_POINTS)]
    weights = [math.exp(-node * node / 2) for node in nodes]
    centre = function(mean.clone())  # a copy, for functions that work in place
    # Sums of differences from the value at the mean: constants and steep lines leave no rounding error in the variance.
    one, two = torch.zeros_like(centre), torch.zeros_like(centre)
    for node, weight in zip(nodes, weights, strict=True):
        difference = function(mean + node * sd) - centre
        one += (weight / sum(weights)) * difference
        two += (weight / sum(weights)) * difference.square()
    return centre + one, (two - one.square()).clamp(min=0)


def window_maximum(mean: Tensor, sd: Tensor, kernel: tuple[int, ...], rho: float = RHO) -> tuple[Tensor, Tensor]:
    """Mean and variance of the largest of the prod(kernel) taps of a window, each N(mean, sd^2).

    The taps are taken to correlate by their average correlation, which makes the maximum a sum of two independent
    parts. Against sampling with rho 0.6 the mean comes out too high, by at most 4 % of sd up to 3 x 3 taps and by 8 %
    at 7 x 7; the variance errs by at most 1.5 and 3 % of sd^2.
    """
    taps, total = math.prod(kernel), 1.0
    for size in kernel:
        distance = torch.arange(size)
        total *= float((torch.tensor(rho, dtype=torch.float64) ** (distance[:, None] - distance).abs()).sum())
    if taps == 1:
        return mean, sd.square()
    common = (total - taps) / (taps * (taps - 1))
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    mass = (_cdf(z) ** taps).diff()
    middle = (z[1:] + z[:-1]) / 2
    first = float((mass * middle).sum())
    spread = float((mass * middle.square()).sum()) - first**2
    return mean + math.sqrt(1 - common) * first * sd, (common + (1 - common) * spread) * sd.square()


def tap_correlation(kernel: tuple[int, ...], rho: float = RHO) -> Tensor:
    """Correlation of the taps of a kernel, rho^(L1 distance): (K, K) for K = prod(kernel) taps; (1, 1) for no kernel."""
    sizes = kernel or (1,)
    places = torch.cartesian_prod(*(torch.arange(size) for size in sizes)).view(-1, len(sizes))
    distance = (places[:, None] - places[None]).abs().sum(-1)
    return torch.tensor(float(rho)) ** distance


def variance_form(a: Tensor, b: Tensor, var: Tensor, rho: float = RHO) -> Tensor:
    """a_j^T Hv b_j for every output channel j: (out,).

    a, b: (out, in / groups, *kernel), the number of groups following from ``var``: (in,), variances of the inputs.
    A transposed convolution hands in the view with its outputs first. Raises NetworkError where sizes do not fit.
    """
    groups = _groups(a, var)
    if a.shape != b.shape:
        raise NetworkError(f"the two weights differ in shape, {tuple(a.shape)} and {tuple(b.shape)}: give them alike")
    taps = tap_correlation(tuple(a.shape[2:]), rho).to(a)
    found = []
    for rows in row_blocks(a, groups):
        first, second = (each[rows].reshape(*each[rows].shape[:2], -1) for each in (a, b))
        found.append(_per_group((first @ taps * second).sum(2), var, groups))
    return torch.cat(found)


def row_blocks(weight: Tensor, groups: int = 1) -> list[slice]:
    """Outputs whose weights, 64 MB together, are worked on at a time; with groups all at once."""
    rows = len(weight) if groups > 1 else max(1, _BLOCK * len(weight) // weight.numel())
    return [slice(start, start + rows) for start in range(0, len(weight), rows)]


def outputs_first(weight: Tensor, groups: int = 1) -> Tensor:
    """The weight of a transposed convolution, (in, out / groups, *kernel), as (out, in / groups, *kernel)."""
    grouped = weight.view(groups, -1, *weight.shape[1:]).transpose(1, 2)
    return grouped.reshape(-1, *grouped.shape[2:])


def mean_form(delta: Tensor, mean: Tensor, groups: int = 1) -> Tensor:
    """What the weights ``delta`` answer on average to inputs of mean ``mean``: sum of delta[j,c,p] m_c, (out,).

    delta: (out, in / groups, *kernel); mean: (in,). Zero padding at the border is neglected.
    Raises NetworkError where sizes do not fit.
    """
    if _groups(delta, mean) != groups:
        raise NetworkError(f"weight {tuple(delta.shape)} in {groups} group(s) does not take {mean.numel()} input channels")
    return _per_group(delta.reshape(*delta.shape[:2], -1).sum(2), mean, groups)


def _per_group(rows: Tensor, channels: Tensor, groups: int) -> Tensor:
    """Inner product of each row (out, in / groups) with the channels of its group."""
    return torch.einsum("goi,gi->go", rows.view(groups, -1, rows.shape[1]), channels.to(rows).view(groups, -1)).reshape(-1)


def _groups(weight: Tensor, channels: Tensor) -> int:
    groups, rest = divmod(channels.numel(), weight.shape[1])
    if rest or channels.dim() != 1 or groups == 0 or weight.shape[0] % groups:
        raise NetworkError(
            f"a weight of shape {tuple(weight.shape)} cannot take inputs of shape {tuple(channels.shape)}: "
            "expected (out, in / groups, *kernel) and (in,)"
        )
    return groups


def _cdf(x: Tensor) -> Tensor:
    return torch.erfc(-x / math.sqrt(2)) / 2  # torch.special.ndtr has no lower tail: 0 at -6 in float32


def _density(x: Tensor) -> Tensor:
    return torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
