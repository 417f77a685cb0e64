"""Half-quadratic quantization: ranges that forgive large errors of few weights.

Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models, 2023 (github.com/mobiusml/hqq). Legend: W the weights
of a channel, s their scale, z their zero point, Q(W) = s (codes - z), E the part of W - Q(W) that is taken to be outliers.
"""

import torch
from torch import Tensor

from datafree.errors import TargetError
from datafree.plan import QSpec
from datafree.quant.grid import fake_quantize, has_zero_points
from datafree.quant.ranges import channel_rows, mse

_BLOCK = 1 << 18  # elements worked on at a time


def hqq(weight: Tensor, spec: QSpec, p: float = 0.7, strength: float = 10.0, rounds: int = 20) -> tuple[Tensor, Tensor]:
    """Scale and integer zero point with a small sum |W - Q(W)|^p, p < 1.

    In turn: E = shrink(W - Q(W)), then z = mean of codes - (W - E) / s. weight: any shape; scale and zero: (C,), C the size of
    ``spec.axis``, or (). Raises TargetError unless ``spec`` is uniform and asymmetric, NetworkError where weights are not finite.

    Differs: one group for each channel, a range that includes 0, and integer zero points, as runtimes demand: of the integers next to
    each round's z the best is kept. From the min-max scale of the original such whole steps find nothing to gain, so the scale is
    that of :func:`datafree.quant.ranges.mse` with exponent p, and the result is never worse than that by the sum above.
    """
    if not has_zero_points(spec):
        raise TargetError(f"HQQ looks for zero points, which {spec} does not have: use an asymmetric uniform grid")
    rows = channel_rows(weight, spec.axis)
    scale, zero = (each.reshape(-1) for each in mse(weight, spec, exponent=p))
    by_row = QSpec(spec.bits, symmetric=False, axis=0)
    size = max(1, _BLOCK // rows.shape[1])
    parts = zip(*(torch.split(each, size) for each in (rows, scale, zero)), strict=True)
    best = torch.cat([_shifted(part, some, start, by_row, (p, strength), rounds) for part, some, start in parts])
    return (scale[0], best[0]) if spec.axis is None else (scale, best)


def _shifted(rows: Tensor, scale: Tensor, zero: Tensor, spec: QSpec, norm: tuple[float, float], rounds: int) -> Tensor:
    """The best integer zero point that the alternation passes by."""
    p, strength = norm
    step = scale[:, None]

    def error(trial: Tensor) -> Tensor:
        return (rows - fake_quantize(rows, scale, trial, spec)).abs().pow(p).sum(1)

    best, least, z = zero, error(zero), zero[:, None]
    for _ in range(rounds):
        codes = (rows / step + z).round().clamp(*spec.levels)
        gap = rows - step * (codes - z)
        outliers = gap.sign() * (gap.abs() - gap.abs().pow(p - 1) / strength).clamp(min=0)
        z = (codes - (rows - outliers) / step).mean(1, keepdim=True)
        for trial in (z.floor(), z.ceil()):
            whole = trial.squeeze(1).clamp(*spec.levels)
            found = error(whole)
            best, least = torch.where(found < least, whole, best), torch.minimum(found, least)
    return best
