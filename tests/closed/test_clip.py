import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from datafree.closed.clip import ClipModel, Model, aciq, best_clip, expected_error, wide_range
from datafree.errors import DatafreeError, NetworkError, TargetError

MEAN, SD = torch.tensor([0.0, 1.0, -1.0, -3.0]), torch.tensor([1.0, 0.3, 2.0, 1.0])
Sampler = Callable[[float, float], Tensor]
QUANTILES = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000  # evenly spread: far less noise than random draws


def gauss(mean: float, sd: float) -> Tensor:
    return mean + sd * math.sqrt(2) * torch.erfinv(2 * QUANTILES - 1)


def laplace(mean: float, sd: float) -> Tensor:
    half = (QUANTILES - 0.5).sign() * torch.log1p(-2 * (QUANTILES - 0.5).abs())
    return mean - sd / math.sqrt(2) * half


def rounded(x: Tensor, alpha: float, bits: int, signed: bool) -> Tensor:
    top = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    return (x * (top / alpha)).round().clamp(-top if signed else 0, top) * (alpha / top)


def sampled_error(sample: Sampler, alpha: float, bits: int, signed: bool) -> float:
    """The squared error of really clipping and rounding, summed over the channels of MEAN and SD."""
    channels = [sample(float(mean), float(sd)) for mean, sd in zip(MEAN, SD, strict=True)]
    channels = channels if signed else [x.relu() for x in channels]
    return sum(float((rounded(x, alpha, bits, signed) - x).square().mean()) for x in channels)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("model", "sample"), [("gauss", gauss), ("laplace", laplace)])
@pytest.mark.parametrize("alpha", [0.4, 1.0, 2.5, 6.0])  # below, at and above the means: d has either sign
def test_error_equals_that_of_samples(model: Model, sample: Sampler, alpha: float, signed: bool) -> None:
    found = float(expected_error(torch.tensor(alpha), MEAN, SD, 6, model, signed))
    assert found == pytest.approx(sampled_error(sample, alpha, 6, signed), rel=0.01)


@pytest.mark.parametrize(("model", "sample"), [("gauss", gauss), ("laplace", laplace)])
@pytest.mark.parametrize("d", [-3.0, -0.5, 0.0, 0.7, 4.0])
def test_tail_alone_equals_that_of_samples(model: Model, sample: Sampler, d: float) -> None:
    mean = 5.0 - d  # alpha 5 at 8 bits: rounding adds at most 3e-5, which is taken off
    found = float(expected_error(torch.tensor(5.0), torch.tensor([mean]), torch.tensor([1.3]), 8, model))
    x = sample(mean, 1.3)
    rounding = (5 / 255) ** 2 / 12 * float(((x > 0) & (x < 5)).double().mean())
    assert found - rounding == pytest.approx(float((x - 5).clamp(min=0).square().mean()), rel=0.02)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize(("model", "sample"), [("gauss", gauss), ("laplace", laplace)])
def test_clip_found_is_the_best_on_samples(model: Model, sample: Sampler, bits: int, signed: bool) -> None:
    alpha = float(best_clip(MEAN, SD, bits, model, signed))
    least = min(sampled_error(sample, alpha * (0.5 + 0.05 * i), bits, signed) for i in range(21))
    # step^2 / 12 presumes a density that is even within a step, which few bits and a Laplacian peak are not
    assert sampled_error(sample, alpha, bits, signed) <= (1.01 if model == "gauss" else 1.05) * least


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_search_finds_the_least_expected_error(bits: int, signed: bool) -> None:
    grid = torch.linspace(0.01, 40, 40_000)
    for model in ("gauss", "laplace"):
        every = expected_error(grid, MEAN, SD, bits, model, signed)
        found = expected_error(best_clip(MEAN, SD, bits, model, signed), MEAN, SD, bits, model, signed)
        assert found <= every.min() * (1 + 1e-6)


def test_mix_lies_between_and_guards_against_the_wrong_model() -> None:
    clips: dict[ClipModel, float] = {model: float(best_clip(MEAN, SD, 4, model)) for model in ("gauss", "laplace", "mix")}
    assert clips["gauss"] < clips["mix"] < clips["laplace"]
    errors = {model: [sampled_error(sample, alpha, 4, False) for sample in (gauss, laplace)] for model, alpha in clips.items()}
    least = [min(column) for column in zip(*errors.values(), strict=True)]
    worst = {model: max(error / best for error, best in zip(row, least, strict=True)) for model, row in errors.items()}
    assert worst["mix"] < min(worst["gauss"], worst["laplace"])


def test_a_clip_grows_with_scale_and_bits() -> None:
    base = best_clip(MEAN, SD, 4, "mix")
    assert float(best_clip(7 * MEAN, 7 * SD, 4, "mix")) == pytest.approx(7 * float(base), rel=1e-4)
    every = [float(best_clip(MEAN, SD, bits, "mix")) for bits in (2, 3, 4, 5, 6, 7, 8)]
    assert every == sorted(every)


def test_channels_without_spread_and_without_activity() -> None:
    constant = best_clip(torch.tensor([0.5, 3.0]), torch.zeros(2), 4, "mix")
    assert float(constant) == pytest.approx(3.0, rel=0.05)
    assert float(best_clip(torch.tensor([-20.0]), torch.ones(1), 4, "gauss")) == 15.0
    dead = torch.cat([MEAN, torch.full((1,), -30.0)]), torch.cat([SD, torch.ones(1)])
    assert float(best_clip(*dead, 4, "mix")) == pytest.approx(float(best_clip(MEAN, SD, 4, "mix")), rel=1e-4)


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


def test_wide_range_spans_all_channels_within_the_bounds() -> None:
    mean, sd = torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.5])
    assert [float(each) for each in wide_range(mean, sd)] == [-6.0, 6.0]
    assert [float(each) for each in wide_range(mean, sd, 0.0)] == [0.0, 6.0]
    assert [float(each) for each in wide_range(mean, 2 * sd, 0.0, 6.0)] == [0.0, 6.0]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: best_clip(MEAN, -SD, 4, "mix"), NetworkError, "negative"),
        (lambda: best_clip(MEAN, SD[:2], 4, "mix"), NetworkError, "one entry of each"),
        (lambda: best_clip(MEAN / 0, SD, 4, "mix"), NetworkError, "NaN"),
        (lambda: best_clip(MEAN, SD, 1, "mix"), TargetError, "1 bits"),
        (lambda: best_clip(MEAN, SD, 4, "cauchy"), TargetError, "gauss, laplace, mix"),
        (lambda: expected_error(SD, MEAN, SD, 4, "mix"), TargetError, "gauss, laplace"),
        (lambda: aciq(SD, 4, "mix"), TargetError, "gauss, laplace"),
        (lambda: aciq(SD, 9, "gauss"), TargetError, "9 bits"),
    ],
)
def test_refuses_what_makes_no_sense(call: Callable[[], Tensor], error: type[DatafreeError], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
