"""Slow float64 versions of the moment formulas, written from their definitions."""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor


def integrated(function: Callable[[Tensor], Tensor], mean: float, sd: float, points: int = 400_001) -> tuple[float, float]:
    """Mean and variance of function(N(mean, sd^2)) by a fine Riemann sum over 12 standard deviations."""
    z = torch.linspace(-12, 12, points, dtype=torch.float64)
    weight = torch.exp(-z.square() / 2)
    weight /= weight.sum()
    value = function(mean + sd * z)
    first = float((weight * value).sum())
    return first, float((weight * (value - first).square()).sum())


def published_relu(beta: float, gamma: float) -> tuple[float, float]:
    """E[x] and E[x^2] after ReLU, term by term."""
    t = beta / abs(gamma)
    density, mass = math.exp(-t * t / 2) / math.sqrt(2 * math.pi), math.erfc(-t / math.sqrt(2)) / 2
    return abs(gamma) * density + beta * mass, (beta**2 + gamma**2) * mass + beta * abs(gamma) * density


def hessian(mean: Tensor, var: Tensor, kernel: tuple[int, ...], rho: float) -> tuple[Tensor, Tensor]:
    """The mean part m m^T and the variance part Hv of the input second moment, each (n, n) over (channel, tap)."""
    taps = list(itertools.product(*(range(size) for size in kernel)))
    entries = [(c, p) for c in range(len(mean)) for p in taps]
    of_mean = torch.zeros(len(entries), len(entries), dtype=torch.float64)
    of_var = torch.zeros_like(of_mean)
    for i, (c, p) in enumerate(entries):
        for j, (d, q) in enumerate(entries):
            of_mean[i, j] = mean[c] * mean[d]
            if c == d:
                of_var[i, j] = var[c] * rho ** sum(abs(x - y) for x, y in zip(p, q, strict=True))
    return of_mean, of_var


def channels_of(output: int, weight: Tensor, channels: Tensor) -> Tensor:
    """The entries of ``channels`` that output channel ``output`` of a grouped layer sees."""
    per_group = weight.shape[1]
    outputs_per_group = weight.shape[0] * per_group // len(channels)
    start = output // outputs_per_group * per_group
    return channels[start : start + per_group]


def variance_form(a: Tensor, b: Tensor, var: Tensor, rho: float) -> Tensor:
    """a_j^T Hv b_j with Hv written out for every output channel."""
    out = []
    for j in range(a.shape[0]):
        seen = channels_of(j, a, var)
        _, of_var = hessian(torch.zeros_like(seen), seen, tuple(a.shape[2:]), rho)
        out.append(a[j].flatten().double() @ of_var @ b[j].flatten().double())
    return torch.stack(out)


def mean_form(delta: Tensor, mean: Tensor) -> Tensor:
    """Sum over channels and taps of delta[j,c,p] m_c, in loops."""
    out = torch.zeros(delta.shape[0], dtype=torch.float64)
    for j in range(delta.shape[0]):
        seen = channels_of(j, delta, mean)
        for c in range(delta.shape[1]):
            for value in delta[j, c].flatten():
                out[j] += float(value) * float(seen[c])
    return out


def model_inputs(mean: Tensor, var: Tensor, kernel: tuple[int, ...], rho: float, samples: int, generator: torch.Generator) -> Tensor:
    """Patches (samples, channels, *kernel) drawn from the normal model that the Hessian belongs to."""
    _, correlation = hessian(torch.zeros(1), torch.ones(1), kernel, rho)
    factor = torch.linalg.cholesky(correlation)
    z = torch.randn(samples, len(mean), factor.shape[0], dtype=torch.float64, generator=generator)
    x: Tensor = z @ factor.T * var.sqrt()[:, None] + mean[:, None]
    return x.view(samples, len(mean), *kernel)
