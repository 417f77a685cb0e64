import pytest
import torch
from torch import Tensor

from datafree.closed.hqq import hqq
from datafree.errors import NetworkError, TargetError
from datafree.plan import QSpec
from datafree.quant.grid import fake_quantize
from datafree.quant.ranges import minmax, mse


def skewed(*shape: int) -> Tensor:
    """Weights with a long tail to one side."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(3))
    return 0.05 * (x + 0.5 * x.square())


def error(weight: Tensor, ranges: tuple[Tensor, Tensor], spec: QSpec) -> Tensor:
    gap = (weight - fake_quantize(weight, *ranges, spec)).abs().pow(0.7)
    return gap.sum() if spec.axis is None else gap.movedim(spec.axis, 0).flatten(1).sum(1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("axis", [0, 1, None])
def test_never_worse_than_where_it_starts_nor_than_min_max(bits: int, axis: int | None) -> None:
    weight, spec = skewed(12, 5, 3, 3), QSpec(bits, False, axis)
    found = hqq(weight, spec)
    assert found[0].shape == found[1].shape == minmax(weight, spec)[0].shape
    assert (error(weight, found, spec) <= error(weight, mse(weight, spec, exponent=0.7), spec)).all()
    assert (error(weight, found, spec) <= error(weight, minmax(weight, spec), spec)).all()


def test_shifting_the_zero_point_pays_at_two_bits() -> None:
    weight, spec = skewed(64, 144), QSpec(2, False, 0)
    found, start = hqq(weight, spec), mse(weight, spec, exponent=0.7)
    assert torch.equal(found[0], start[0])
    assert not torch.equal(found[1], start[1])
    assert error(weight, found, spec).sum() < error(weight, start, spec).sum()


def test_finds_the_best_zero_point_there_is_for_most_channels() -> None:
    weight, spec = skewed(64, 144), QSpec(3, False, 0)
    scale, zero = hqq(weight, spec)
    every = torch.stack([error(weight, (scale, torch.full_like(scale, float(z))), spec) for z in range(8)])
    best = every.amin(0)
    assert (error(weight, (scale, zero), spec) <= best * 1.000001).float().mean() > 0.8


def test_zero_points_are_codes_and_zero_weights_stay_zero() -> None:
    spec = QSpec(4, False, 0)
    weight = torch.cat([skewed(8, 50), skewed(1, 50).abs(), -skewed(1, 50).abs(), torch.zeros(1, 50)])
    weight[:, 0] = 0
    scale, zero = hqq(weight, spec)
    assert torch.equal(zero, zero.round())
    assert zero.min() >= 0 and zero.max() <= 15
    assert torch.isfinite(scale).all() and (scale > 0).all()
    assert (fake_quantize(weight, scale, zero, spec)[:, 0] == 0).all()


def test_many_rows_are_worked_on_in_parts() -> None:
    weight, spec = skewed(40, 9000), QSpec(3, False, 0)  # more than one block
    scale, zero = hqq(weight, spec, rounds=3)
    alone = hqq(weight[37:38], spec, rounds=3)
    assert scale[37] == alone[0][0] and zero[37] == alone[1][0]


@pytest.mark.parametrize("spec", [QSpec(4, True, 0), QSpec(2, False, 0, "ternary"), QSpec(4, False, 0, "dorefa")])
def test_refuses_grids_without_zero_points(spec: QSpec) -> None:
    with pytest.raises(TargetError, match="asymmetric"):
        hqq(skewed(4, 9), spec)


def test_refuses_weights_that_are_not_finite() -> None:
    with pytest.raises(NetworkError, match="NaN"):
        hqq(torch.full((2, 3), torch.nan), QSpec(4, False, 0))
