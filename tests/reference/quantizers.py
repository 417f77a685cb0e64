"""Slow float64 versions of the quantizers, one number at a time, written from the formulas."""

import itertools
import math

from datafree.plan import QSpec


def code(x: float, scale: float, zero: float, spec: QSpec) -> int:
    """The nearest code: Python's round is half to even, like torch's."""
    nearest = round(x / scale + zero) if spec.grid == "dorefa" else round(x / scale) + round(zero)
    return max(spec.levels[0], min(spec.levels[1], nearest))


def value(x: float, scale: float, zero: float, spec: QSpec) -> float:
    return scale * (code(x, scale, zero, spec) - zero)


def dorefa(x: float, largest: float, bits: int) -> float:
    """kQ(x) = 2/(2^k - 1) round((2^k - 1) (x / (2 max|x|) + 1/2)) - 1, times the scale max|x| that the paper drops."""
    n: int = 2**bits - 1
    return largest * (2 / n * round(n * (x / (2 * largest) + 0.5)) - 1)


def minmax(xs: list[float], spec: QSpec) -> tuple[float, float]:
    """Scale and zero of one channel on a uniform grid."""
    low, high = min(0.0, min(xs)), max(0.0, max(xs))
    if spec.symmetric:
        return max(-low, high) / (2 ** (spec.bits - 1) - 1), 0.0
    scale = (high - low) / (2**spec.bits - 1)
    return scale, float(round(-low / scale))


def error(xs: list[float], scale: float, zero: float, spec: QSpec, weights: list[float], exponent: float = 2.0) -> float:
    return sum(h * math.pow(abs(x - value(x, scale, zero, spec)), exponent) for x, h in zip(xs, weights, strict=True))


def mse_clip(xs: list[float], spec: QSpec, weights: list[float], exponent: float = 2.0) -> float:
    """The least error over the clip ratios 0.20 to 1.20."""
    ratios = (percent / 100 for percent in range(20, 121))
    return min(error(xs, *minmax([ratio * x for x in xs], spec), spec, weights, exponent) for ratio in ratios)


def twn(xs: list[float]) -> tuple[list[int], float]:
    """Codes and alpha of a whole layer."""
    threshold = 0.7 * sum(map(abs, xs)) / len(xs)
    kept = [abs(x) for x in xs if abs(x) > threshold]
    return [(x > threshold) - (x < -threshold) for x in xs], sum(kept) / len(kept)


def ternary_by_trial(xs: list[float], weights: list[float]) -> float:
    """The least squared error over every choice of codes, each with its own best scale: 3^n trials."""
    least = sum(h * x * x for x, h in zip(xs, weights, strict=True))
    for codes in itertools.product((-1, 0, 1), repeat=len(xs)):
        across = sum(h * x * c for x, c, h in zip(xs, codes, weights, strict=True))
        along = sum(h * c * c for c, h in zip(codes, weights, strict=True))
        if across > 0 and along > 0:
            scale = across / along
            least = min(least, sum(h * (x - scale * c) ** 2 for x, c, h in zip(xs, codes, weights, strict=True)))
    return least


def pack(codes: list[int], bits: int) -> bytes:
    """Little-endian: bit i of code k is bit k * bits + i of the stream."""
    stream = 0
    for k, each in enumerate(codes):
        stream |= each << (k * bits)
    return stream.to_bytes((len(codes) * bits + 7) // 8, "little")
