import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from datafree.closed.clip import Model, aciq, aciq_range, best_range, expected_error
from datafree.errors import DatafreeError, NetworkError, TargetError
from datafree.plan import QSpec
from datafree.quant.grid import fake_quantize
from datafree.quant.ranges import minmax, mse
from tests.reference import clip as reference

MEAN, SD = torch.tensor([0.0, 1.0, -1.0, -3.0]), torch.tensor([1.0, 0.3, 2.0, 1.0])
CHANNELS = list(zip(MEAN.tolist(), SD.tolist(), strict=True))
GRID = torch.linspace(-12, 12, 384, dtype=torch.float64)[:, None]
SHARES = {"gauss": (-GRID.square() / 2).softmax(0), "laplace": (-math.sqrt(2) * GRID.abs()).softmax(0)}
QUANTILES = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000  # evenly spread: far less noise than random draws
MODELS: tuple[Model, ...] = ("gauss", "laplace")


def unsigned(bits: int) -> QSpec:
    return QSpec(bits, symmetric=False)


def known(model: Model, rectified: bool, mean: Tensor = MEAN, sd: Tensor = SD) -> tuple[Tensor, Tensor]:
    """Values and masses of channels with these moments."""
    values = mean + GRID * sd
    return (values.relu() if rectified else values).flatten(), SHARES[model].expand_as(values).flatten()


def drawn(model: Model, rectified: bool) -> list[Tensor]:
    """The same as samples, a tensor for each channel."""
    half = 2 * QUANTILES - 1
    standard = math.sqrt(2) * torch.erfinv(half) if model == "gauss" else -half.sign() * torch.log1p(-half.abs()) / math.sqrt(2)
    values = [mean + sd * standard for mean, sd in CHANNELS]
    return [each.relu() for each in values] if rectified else values


def sampled_error(samples: list[Tensor], scale: float, zero: float, bits: int) -> float:
    """The squared error of really clipping and rounding, summed over the channels."""
    rounded = ((x / scale).round().clamp(-zero, 2**bits - 1 - zero) * scale for x in samples)
    return sum(float((each - x).square().mean()) for each, x in zip(rounded, samples, strict=True))


def error_at(model: tuple[Tensor, Tensor], scale: float, zero: float, bits: int) -> float:
    return float(expected_error(*model, torch.tensor([[scale]], dtype=torch.float64), torch.tensor([[zero]]), 2**bits - 1))


# ---------------------------------------------------------------- the expected error


@pytest.mark.parametrize("rectified", [False, True])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("high", [0.4, 1.0, 2.5, 6.0])  # below, at and above the means
def test_error_equals_the_formula(model: Model, high: float, rectified: bool) -> None:
    zero = 0 if rectified else 20
    scale = high / (63 - zero)
    low = -scale * zero
    expected = reference.expected_error(low, high, 63, CHANNELS, model, rectified)
    assert error_at(known(model, rectified), scale, zero, 6) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("rectified", [False, True])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("high", [0.4, 1.0, 2.5, 6.0])
def test_error_equals_that_of_samples(model: Model, high: float, rectified: bool) -> None:
    zero = 0 if rectified else 20
    scale = high / (63 - zero)
    expected = sampled_error(drawn(model, rectified), scale, zero, 6)
    assert error_at(known(model, rectified), scale, zero, 6) == pytest.approx(expected, rel=0.01)


def test_what_lies_on_the_grid_costs_nothing() -> None:
    values, masses = torch.tensor([-1.0, 0.0, 2.0]), torch.tensor([0.2, 0.5, 0.3])
    assert error_at((values, masses), 1.0, 1, 2) == 0  # the ends -1 and 2, and 0
    assert error_at((values, masses), 1.0, 2, 2) == pytest.approx(0.3 * 1 + 0.2 / 12)  # [-2, 1]: 2 is clipped, -1 rounded


# ---------------------------------------------------------------- the best range


@pytest.mark.parametrize("rectified", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("model", MODELS)
def test_range_found_is_the_best_on_samples(model: Model, bits: int, rectified: bool) -> None:
    scale, zero = (float(each) for each in best_range([known(model, rectified)], unsigned(bits)))
    samples = [each[::8] for each in drawn(model, rectified)]
    zeros = [zero] if rectified else [each for each in (zero - 1, zero, zero + 1) if 0 <= each < 2**bits]
    least = min(sampled_error(samples, scale * (0.6 + 0.05 * i), each, bits) for i in range(17) for each in zeros)
    # step^2 / 12 presumes a density that is even within a step, which few bits and a Laplacian peak are not
    assert sampled_error(samples, scale, zero, bits) <= (1.12 if bits == 2 else 1.05) * least


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([2, 3, 5, 8]))
def test_no_other_range_has_less_error(seed: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values, masses = torch.randn(40, generator=generator) + 0.5, torch.rand(40, generator=generator)
    scale, zero = (float(each) for each in best_range([(values, masses)], unsigned(bits)))
    found = error_at((values, masses), scale, zero, bits)
    widest = (values.max().clamp(min=0) - values.min().clamp(max=0)).double() / (2**bits - 1)
    every = expected_error(values, masses, widest * torch.linspace(0.01, 1, 200)[:, None], torch.arange(2**bits), 2**bits - 1)
    assert found <= 1.06 * float(every.min())


def test_both_ends_follow_the_values() -> None:
    lopsided = torch.cat([torch.linspace(-0.28, 0, 50), torch.linspace(0, 4, 50)])
    scale, zero = (float(each) for each in best_range([(lopsided, torch.ones(100))], unsigned(4)))
    assert 0 < scale * zero < 0.4 and 3.5 < scale * (15 - zero) < 4.2
    assert float(best_range([(-lopsided.abs(), torch.ones(100))], unsigned(4))[1]) == 15
    assert float(best_range([(lopsided.abs(), torch.ones(100))], unsigned(4))[1]) == 0


def loss(model: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor], bits: int) -> float:
    """In dB, against the best range under this model."""
    return 10 * math.log10(
        error_at(model, *map(float, found), bits) / error_at(model, *map(float, best_range([model], unsigned(bits))), bits)
    )


@pytest.mark.parametrize("bits", [3, 4, 6])
@pytest.mark.parametrize("mean", [0.0, -2.0, -3.0])
def test_of_two_models_neither_loses_more_than_the_other(mean: float, bits: int) -> None:
    gauss, laplace = (known(model, True, torch.full((4,), mean), torch.ones(4)) for model in MODELS)
    found = best_range([gauss, laplace], unsigned(bits))
    losses = [loss(gauss, found, bits), loss(laplace, found, bits)]
    assert losses[0] == pytest.approx(losses[1], abs=0.4)
    wrong = loss(gauss, best_range([laplace], unsigned(bits)), bits), loss(laplace, best_range([gauss], unsigned(bits)), bits)
    assert max(losses) < 0.7 * min(wrong)


def test_channels_that_seldom_fire_do_not_lose_what_an_average_of_models_does() -> None:
    gauss, laplace = (known(model, True, torch.full((4,), -2.0), torch.ones(4)) for model in MODELS)
    averaged = torch.cat([gauss[0], laplace[0]]), torch.cat([gauss[1], laplace[1]])
    assert loss(gauss, best_range([averaged], unsigned(4)), 4) > 5.5
    assert loss(gauss, best_range([gauss, laplace], unsigned(4)), 4) < 3.5


def test_a_range_grows_with_scale_and_bits() -> None:
    values, masses = known("gauss", True)
    tops = [float(best_range([(values, masses)], unsigned(bits))[0]) * (2**bits - 1) for bits in range(2, 9)]
    assert tops == sorted(tops)
    assert float(best_range([(7 * values, masses)], unsigned(8))[0]) * 255 == pytest.approx(7 * tops[-1], rel=1e-6)


def test_channels_without_spread_and_without_activity() -> None:
    constant = best_range([(torch.tensor([0.5, 3.0]), torch.ones(2))], unsigned(4))
    assert float(constant[0]) == pytest.approx(0.2) and float(constant[1]) == 0
    nothing = best_range([(torch.zeros(3), torch.ones(3))], unsigned(4))
    assert float(nothing[0]) == 1 and float(nothing[1]) == 0
    values, masses = known("gauss", True)
    dead = torch.cat([values, torch.zeros(500)]), torch.cat([masses, torch.ones(500)])
    assert torch.equal(best_range([dead], unsigned(4))[0], best_range([(values, masses)], unsigned(4))[0])


# ---------------------------------------------------------------- ACIQ


@pytest.mark.parametrize(
    ("model", "factors"),
    [("gauss", (1.71, 2.15, 2.56, 2.94, 3.29, 3.62, 3.92)), ("laplace", (2.83, 3.90, 5.03, 6.20, 7.41, 8.65, 9.90))],
)
def test_aciq_gives_the_published_table(model: Model, factors: tuple[float, ...]) -> None:
    spread = torch.tensor([1.0, 2.0])
    for bits, factor in zip(range(2, 9), factors, strict=True):
        assert aciq(spread, bits, model).tolist() == pytest.approx([factor, 2 * factor], rel=3e-3)
        if bits > 2:
            assert torch.equal(aciq(spread, bits - 1, model, one_sided=True), aciq(spread, bits, model))


def standard(model: Model) -> Tensor:
    """Values of mean 0 and variance 1, well shuffled."""
    half = (2 * QUANTILES - 1)[torch.randperm(QUANTILES.numel(), generator=torch.Generator().manual_seed(0))]
    return (math.sqrt(2) * torch.erfinv(half) if model == "gauss" else -half.sign() * torch.log1p(-half.abs()) / math.sqrt(2)).float()


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_each_channel_gets_the_clip_of_the_model_that_it_is_like(bits: int) -> None:
    weight = torch.stack([standard("gauss"), 3 * standard("laplace")])
    scale, zero = aciq_range(weight, QSpec(bits, axis=0))
    expected = [float(aciq(torch.tensor(1.0), bits, "gauss")), float(aciq(torch.tensor(3 / math.sqrt(2)), bits, "laplace"))]
    assert (scale * (2 ** (bits - 1) - 1)).tolist() == pytest.approx(expected, rel=0.01) and not zero.any()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("model", MODELS)
def test_aciq_is_near_the_least_error_and_far_below_min_max(model: Model, bits: int, symmetric: bool) -> None:
    weight, spec = standard(model).view(8, -1) * torch.logspace(-1, 1, 8)[:, None], QSpec(bits, symmetric, 0)

    def error(ranges: tuple[Tensor, Tensor]) -> Tensor:
        return (weight - fake_quantize(weight, *ranges, spec)).square().sum(1)

    found = error(aciq_range(weight, spec))
    assert (found <= {3: 1.35, 4: 1.15, 8: 1.3}[bits] * error(mse(weight, spec))).all()
    assert bits == 8 or (found < 0.8 * error(minmax(weight, spec))).all()


def test_aciq_counts_from_the_mean_and_stays_within_the_values() -> None:
    shifted = standard("gauss")[None] + 10
    scale, zero = aciq_range(torch.cat([shifted, -shifted]), QSpec(4, False, 0))
    assert (scale * 15).tolist() == pytest.approx([12.56, 12.56], rel=0.01) and zero.tolist() == [0, 15]
    few = torch.tensor([[-1.0, 1.0, -1.0, 1.0]])
    assert float(aciq_range(few, QSpec(8, axis=0))[0]) == pytest.approx(1 / 127)


def test_aciq_of_one_sided_values_leaves_zeros_out() -> None:
    half = standard("laplace").abs()
    weight = torch.cat([half, torch.zeros(3 * half.numel())])
    scale, zero = aciq_range(weight, unsigned(4))
    assert float(15 * scale) == pytest.approx(float(aciq(half.mean(), 4, "laplace", one_sided=True)), rel=0.01) and float(zero) == 0
    assert float(aciq_range(half, QSpec(4))[0]) * 7 < 0.95 * float(15 * scale)  # a symmetric grid has no use for the knowledge
    masses = torch.cat([torch.ones(half.numel()), torch.full((3 * half.numel(),), 7.0)])
    assert torch.allclose(aciq_range(weight, unsigned(4), masses)[0], scale, rtol=1e-4)
    assert float(aciq_range(torch.zeros(5), unsigned(4))[0]) == 1


# ---------------------------------------------------------------- refusals

ONE = torch.ones(3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: best_range([(ONE, -ONE)], unsigned(4)), NetworkError, "negative"),
        (lambda: best_range([(ONE, ONE[:2])], unsigned(4)), NetworkError, "a mass for each"),
        (lambda: best_range([(ONE[:0], ONE[:0])], unsigned(4)), NetworkError, "a mass for each"),
        (lambda: best_range([(ONE / 0, ONE)], unsigned(4)), NetworkError, "NaN"),
        (lambda: best_range([(ONE, ONE)], QSpec(4)), TargetError, "asymmetric uniform grid with one scale"),
        (lambda: best_range([(ONE, ONE)], QSpec(4, False, 0)), TargetError, "asymmetric uniform grid with one scale"),
        (lambda: aciq(SD, 4, "mix"), TargetError, "gauss, laplace"),
        (lambda: aciq(SD, 9, "gauss"), TargetError, "9 bits"),
        (lambda: aciq_range(ONE, QSpec(2, grid="ternary")), TargetError, "not of the ternary one"),
        (lambda: aciq_range(ONE / 0, QSpec(4)), NetworkError, "NaN"),
    ],
)
def test_refuses_what_makes_no_sense(call: Callable[[], Tensor], error: type[DatafreeError], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
