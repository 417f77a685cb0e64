"""Slow float64 version of DF-MPC, written from eq. 16-27 of arXiv 2307.00498, one channel at a time."""

from torch import Tensor


def loss(
    c: float, low: Tensor, full: Tensor, gamma: float, beta: float, mu: float, sigma: float, mu_hat: float, sigma_hat: float,
    lambda1: float, lambda2: float,
) -> float:  # fmt: skip
    """Eq. 22 for one channel: |Gamma|^2 + lambda1 Theta^2 + lambda2 c^2."""
    total = 0.0
    for wh, w in zip(low.flatten().tolist(), full.flatten().tolist(), strict=True):
        total += (c * gamma * wh / sigma_hat - gamma * w / sigma) ** 2
    theta = (gamma * mu / sigma - c * gamma * mu_hat / sigma_hat) + (c * beta - beta)
    return total + lambda1 * theta**2 + lambda2 * c**2


def coefficient(
    low: Tensor, full: Tensor, gamma: float, beta: float, mu: float, sigma: float, mu_hat: float, sigma_hat: float,
    lambda1: float, lambda2: float,
) -> float:  # fmt: skip
    """Eq. 26-27 for one channel, clipped at 0."""
    numerator = denominator = 0.0
    for wh, w in zip(low.flatten().tolist(), full.flatten().tolist(), strict=True):
        xh, x = gamma * wh / sigma_hat, gamma * w / sigma
        numerator += xh * x
        denominator += xh * xh
    yh, y = beta - gamma * mu_hat / sigma_hat, beta - gamma * mu / sigma
    return max(0.0, (numerator + lambda1 * yh * y) / (denominator + lambda1 * yh * yh + lambda2))
