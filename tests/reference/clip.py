"""Slow float64 versions of the expected errors of clipped and rounded tensors, channel by channel, written from the formulas."""

import math


def tail(d: float, sd: float, model: str) -> tuple[float, float]:
    """E[(x - a)^2; x > a] and P(x > a) at d = a - mean."""
    if model == "gauss":
        above = math.erfc(d / sd / math.sqrt(2)) / 2
        density = math.exp(-((d / sd) ** 2) / 2) / math.sqrt(2 * math.pi)
        return (sd**2 + d**2) * above - sd * d * density, above
    scale = sd / math.sqrt(2)
    if d > 0:
        return scale**2 * math.exp(-d / scale), math.exp(-d / scale) / 2
    return d**2 + 2 * scale**2 - scale**2 * math.exp(d / scale), 1 - math.exp(d / scale) / 2


def expected_error(low: float, high: float, steps: int, channels: list[tuple[float, float]], model: str, rectified: bool) -> float:
    """Of clipping to [low, high] and rounding to so many steps, summed over channels (mean, sd); ``rectified`` by a ReLU before."""
    total = 0.0
    for mean, sd in channels:
        cost, above = tail(high - mean, sd, model)
        if rectified:
            below = 1 - tail(-mean, sd, model)[1]
        else:
            lower, below = tail(mean - low, sd, model)  # the part of x below low is the part of -x above -low
            cost += lower
        total += cost + ((high - low) / steps) ** 2 / 12 * (1 - above - below)
    return total
