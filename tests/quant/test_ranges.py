"""Ranges against loops in float64, against brute force, and at the edges: zeros, constants, one-sided and broken tensors."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from datafree.errors import NetworkError, TargetError
from datafree.plan import QSpec
from datafree.quant.grid import dequantize, fake_quantize, quantize
from datafree.quant.ranges import fit, from_range, minmax, mse, optimal_ternary, twn
from tests.reference import quantizers as reference

UNIFORM = [QSpec(bits, symmetric, 0) for bits in (2, 3, 4, 8) for symmetric in (True, False)]
ANY = [*UNIFORM, QSpec(2, grid="ternary", axis=0), QSpec(3, grid="dorefa", axis=0), QSpec(4), QSpec(4, symmetric=False)]
FLOATS = st.floats(min_value=-50, max_value=50, width=32).filter(lambda v: v == 0 or abs(v) > 1e-3)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def total_error(x: Tensor, scale: Tensor, zero: Tensor, spec: QSpec) -> Tensor:
    return (x - fake_quantize(x, scale, zero, spec)).square().sum()


@pytest.mark.parametrize("spec", UNIFORM, ids=str)
def test_minmax_equals_the_loop(spec: QSpec) -> None:
    x = normal(5, 3, 2) + torch.arange(5.0).reshape(5, 1, 1)
    scale, zero = minmax(x, spec)
    expected = [reference.minmax(row.flatten().tolist(), spec) for row in x]
    assert torch.allclose(scale, torch.tensor([s for s, _ in expected]), rtol=1e-6)
    assert zero.tolist() == [z for _, z in expected]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(UNIFORM), st.lists(FLOATS, min_size=1, max_size=9))
def test_minmax_loses_at_most_half_a_step_and_keeps_zero(spec: QSpec, values: list[float]) -> None:
    x = torch.tensor([values])
    scale, zero = minmax(x, spec)
    assert scale.isfinite().all() and (scale > 0).all()
    assert ((x - fake_quantize(x, scale, zero, spec)).abs() <= 0.5001 * scale).all()
    assert fake_quantize(torch.zeros(1, 1), scale, zero, spec).item() == 0


def test_dorefa_range() -> None:
    scale, zero = minmax(torch.tensor([[-3.0, 1.0], [0.5, 0.25]]), QSpec(3, grid="dorefa", axis=0))
    assert torch.allclose(scale, torch.tensor([6 / 7, 1 / 7])) and zero.tolist() == [3.5, 3.5]


@pytest.mark.parametrize("exponent", [2.0, 2.4])
@pytest.mark.parametrize("spec", UNIFORM[:-2], ids=str)
def test_mse_is_the_best_candidate(spec: QSpec, exponent: float) -> None:
    x, weight = normal(3, 20, seed=1), normal(3, 20, seed=2).abs()
    scale, zero = mse(x, spec, weight, exponent)
    found = (weight * (x - fake_quantize(x, scale, zero, spec)).abs() ** exponent).sum(1)
    for row, h, each in zip(x.tolist(), weight.tolist(), found.tolist(), strict=True):
        best = reference.mse_clip(row, spec, h, exponent)  # of candidates that move both ends together
        assert each == pytest.approx(best, rel=1e-3) if spec.symmetric else each <= best * 1.001


def test_mse_keeps_a_short_tail_that_matters() -> None:
    """At 3 bits GELU's negative values round to nothing unless the lower end moves by itself."""
    x = torch.nn.functional.gelu(0.8 * normal(1, 4000, seed=4))
    spec = QSpec(3, symmetric=False)
    scale, zero = mse(x, spec)
    assert zero > 0
    ends = itertools.product(torch.linspace(-0.6, 0, 31), torch.linspace(0.5, float(x.max()), 60))
    best = min(total_error(x, *from_range(low, high, spec), spec) for low, high in ends)
    assert total_error(x, scale, zero, spec) <= best * 1.02


@pytest.mark.parametrize("spec", ANY, ids=str)
def test_mse_is_never_worse_than_minmax(spec: QSpec) -> None:
    x = normal(4, 50, seed=3) ** 3
    assert total_error(x, *mse(x, spec), spec) <= total_error(x, *minmax(x, spec), spec)


def test_mse_weight_broadcasts_and_matters() -> None:
    x = torch.cat([normal(1, 63) * 0.1, torch.ones(1, 1)], dim=1)
    spec = QSpec(4, axis=0)
    weight = torch.ones(64)
    weight[:63] = 1e6
    small, _ = mse(x, spec, weight)
    large, _ = mse(x, spec)
    assert small < large
    assert torch.equal(mse(x, spec, torch.tensor(2.0))[0], large)


def test_channels_lie_along_the_axis() -> None:
    x = normal(3, 4, 2, 2)
    for axis in (1, -3):
        scale, zero = mse(x, QSpec(4, axis=axis))
        turned = mse(x.transpose(0, 1), QSpec(4, axis=0))
        assert torch.equal(scale, turned[0]) and torch.equal(zero, turned[1])
    assert minmax(x, QSpec(4))[0].shape == ()
    assert minmax(x, QSpec(4, axis=-1))[0].shape == (2,)
    assert minmax(torch.tensor([1.0, -3.0]), QSpec(2, axis=0))[0].tolist() == [1, 3]


@pytest.mark.parametrize("rule", ["minmax", "mse"])
@pytest.mark.parametrize("spec", ANY, ids=str)
def test_channel_of_zeros(spec: QSpec, rule: str) -> None:
    x = normal(2, 6) if spec.axis == 0 else torch.zeros(2, 6)
    x[1] = 0
    scale, zero = fit(x, spec, "minmax" if rule == "minmax" else "mse")
    assert scale.isfinite().all() and (scale > 0).all()
    if spec.grid != "dorefa":
        assert (fake_quantize(x, scale, zero, spec)[1] == 0).all()
        assert (quantize(x, scale, zero, spec)[1].float() == (zero if spec.axis is None else zero[1])).all()
    if spec.grid == "uniform":
        assert scale.reshape(-1)[-1] == 1


@pytest.mark.parametrize("value", [3.0, -0.7, 1e-30, -1e-44])
@pytest.mark.parametrize("spec", ANY, ids=str)
def test_constant_tensors(spec: QSpec, value: float) -> None:
    x = torch.full((2, 5), value)
    scale, zero = minmax(x, spec)
    assert scale.isfinite().all() and (scale > 0).all()
    assert torch.allclose(fake_quantize(x, scale, zero, spec), x, rtol=1e-6, atol=1e-37)


def test_one_sided_values_keep_zero_at_the_end() -> None:
    spec = QSpec(8, symmetric=False)
    assert minmax(torch.tensor([2.0, 10.0]), spec)[1] == 0
    assert minmax(torch.tensor([-2.0, -10.0]), spec)[1] == 255
    scale, zero = from_range(torch.tensor(-1.0), torch.tensor(3.0), QSpec(2, symmetric=False))
    assert scale.item() == pytest.approx(4 / 3) and zero == 1


def test_twn_is_the_published_rule() -> None:
    x = normal(4, 3, 3, 3, seed=5)
    codes, alpha = twn(x)
    expected, scale = reference.twn(x.flatten().tolist())
    assert codes.flatten().tolist() == expected and codes.dtype == torch.int16
    assert torch.allclose(alpha, torch.full((4,), scale), rtol=1e-6)
    across, same = twn(x, axis=1)
    assert torch.equal(across, codes) and same.shape == (3,)
    assert torch.equal(minmax(x, QSpec(2, grid="ternary", axis=0))[0], alpha)
    zeros, one = twn(torch.zeros(2, 3))
    assert not zeros.any() and one.tolist() == [1, 1]


@settings(max_examples=60, deadline=None)
@given(st.lists(FLOATS, min_size=1, max_size=6), st.booleans())
def test_optimal_ternary_beats_every_other_choice(values: list[float], weighted: bool) -> None:
    x = torch.tensor([values])
    weight = torch.arange(1.0, len(values) + 1) if weighted else None
    codes, scale = optimal_ternary(x, weight=weight)
    importance = weight.tolist() if weight is not None else [1.0] * len(values)
    gap = (x.double() - scale.double()[:, None] * codes).square() * torch.tensor(importance)
    assert gap.sum().item() == pytest.approx(reference.ternary_by_trial(values, importance), rel=1e-5, abs=1e-6)


@settings(max_examples=100, deadline=None)
@given(st.lists(FLOATS, min_size=1, max_size=40), st.sampled_from([(0, (1, -1)), (1, (-1, 1)), (None, (-1,))]))
def test_nearest_rounding_reproduces_the_ternary_optimum(values: list[float], layout: tuple[int | None, tuple[int, ...]]) -> None:
    axis, shape = layout
    x = torch.tensor(values).reshape(shape)
    spec = QSpec(2, grid="ternary", axis=axis)
    codes, scale = optimal_ternary(x, axis)
    assert codes.shape == x.shape
    assert torch.equal(quantize(x, *mse(x, spec), spec), codes)
    assert torch.equal(mse(x, spec)[0], scale)


def test_optimal_ternary_of_a_large_layer_by_channel() -> None:
    x = normal(16, 4608, seed=9)
    codes, scale = optimal_ternary(x)
    spec = QSpec(2, grid="ternary", axis=0)
    assert torch.equal(quantize(x, scale, torch.zeros(16), spec), codes)
    assert torch.allclose(scale, torch.stack([row[c != 0].abs().mean() for row, c in zip(x, codes, strict=True)]), rtol=1e-5)
    best = total_error(x, scale, torch.zeros(16), spec)
    for factor in (0.97, 1.03):
        assert total_error(x, scale * factor, torch.zeros(16), spec) > best
    assert best < (x - dequantize(*(twn(x)), torch.zeros(16), spec)).square().sum()


def test_grouped_transposed_convolutions_range_along_axis_one() -> None:
    weight = torch.nn.ConvTranspose2d(4, 6, 3, groups=2).weight
    scale, _ = minmax(weight, QSpec(4, axis=1))
    assert scale.shape == (3,) and not scale.requires_grad


def test_refusals() -> None:
    with pytest.raises(NetworkError, match="NaN or infinity"):
        minmax(torch.tensor([1.0, float("nan")]), QSpec(4))
    with pytest.raises(NetworkError, match="empty"):
        mse(torch.zeros(0, 3), QSpec(4, axis=0))
    with pytest.raises(NetworkError, match="no axis 2"):
        minmax(torch.zeros(2, 3), QSpec(4, axis=2))
    with pytest.raises(TargetError, match="exponent 2 only"):
        mse(torch.ones(2, 3), QSpec(2, grid="ternary", axis=0), exponent=2.4)
    with pytest.raises(TargetError, match="minmax or mse"):
        fit(torch.ones(3), QSpec(4), "percentile")  # type: ignore[arg-type]
