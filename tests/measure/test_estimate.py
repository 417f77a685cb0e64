"""The estimate of lost accuracy: the formula, what it refuses, and where its map comes from."""

import importlib
import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import datafree
from datafree.api import with_estimate
from datafree.measure.estimate import Estimate, Fit, estimate_drop, indicators
from datafree.report.content import estimate_text
from datafree.task import Task
from datafree.zoo.digits import digits

ROOT = Path(__file__).parents[2]
TASK = Task(shape=(3, 8, 8))
FIT = Fit(
    scale=20.0,
    exponents={"kl": 0.5, "noise": 1.0},
    half_width=1.0,
    confidence=90.0,
    ranges={"kl": (1e-3, 3.0), "noise": (1e-4, 2.0), "classes": (5, 1000)},
    ceilings={"disagreement": ((0.01, 5.0), (1.0, 20.0), (10.0, 100.0)), "noise": ((0.01, 0.5), (10.0, 2.0))},
    parameters=(100, 600),
    networks=("one", "two"),
    pairs=40,
    left_out_error=1.0,
)


def linear(scale: float = 1.0, noise: float = 0.0, classes: int = 5) -> nn.Module:
    layer = nn.Linear(192, classes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        layer.weight.copy_(scale * torch.randn(classes, 192, generator=generator) + noise * torch.randn(classes, 192, generator=generator))
        layer.bias.fill_(3.0)
    return nn.Sequential(nn.Flatten(), layer)


def sources(n: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"a": torch.randn(n, 3, 8, 8, generator=generator), "b": 2 * torch.randn(n, 3, 8, 8, generator=generator)}


def slow(teacher: nn.Module, student: nn.Module, inputs: Tensor) -> tuple[float, float, float]:
    """KL, relative energy of the noise and percent of other choices, entry by entry."""
    kl = noise = energy = other = 0.0
    for t, s in zip(teacher(inputs).tolist(), student(inputs).tolist(), strict=True):
        p, q = ([math.exp(each) / sum(map(math.exp, row)) for each in row] for row in (t, s))
        kl += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / len(inputs)
        t_mean, s_mean = sum(t) / len(t), sum(s) / len(s)
        noise += sum(((a - t_mean) - (b - s_mean)) ** 2 for a, b in zip(t, s, strict=True))
        energy += sum((a - t_mean) ** 2 for a in t)
        other += 100 * (t.index(max(t)) != s.index(max(s))) / len(inputs)
    return kl, noise / energy, other


def estimated(student: nn.Module, fit: Fit = FIT, teacher: nn.Module | None = None) -> Estimate:
    return estimate_drop(linear(0.1) if teacher is None else teacher, student, TASK, sources(), fit)


def test_indicators_and_drop_are_those_of_the_formula() -> None:
    teacher, student = linear(0.1), linear(0.1, 0.03)
    (kl_a, noise_a, other_a), (kl_b, noise_b, other_b) = (slow(teacher, student, inputs) for inputs in sources().values())
    found = indicators(teacher, student, TASK, sources())
    expected = {"kl": math.sqrt(kl_a * kl_b), "noise": math.sqrt(noise_a * noise_b), "disagreement": (other_a + other_b) / 2, "classes": 5}
    assert found == pytest.approx(expected, rel=1e-4)
    told = estimated(student)
    drop = 20 * math.sqrt(expected["kl"]) * expected["noise"]
    assert (told.drop, told.low, told.high) == pytest.approx((drop, (1 + drop) / math.e - 1, (1 + drop) * math.e - 1), rel=1e-4)
    assert (told.verdict, told.unknown) == ("estimated", None)
    assert told.fitted_on == ("one", "two") and told.sources == {"a": 8, "b": 8}
    assert (told.fitted_parameters, told.fitted_classes, told.parameters) == ((100, 600), (5, 1000), 192 * 5 + 5)


def test_a_shift_of_all_logits_is_no_noise() -> None:
    student = linear(0.1, 0.03)
    shifted = nn.Sequential(student, nn.Threshold(-1e9, 0.0))
    with torch.no_grad():
        shifted[0][1].bias.add_(7.0)
    assert indicators(linear(0.1), shifted, TASK, sources()) == pytest.approx(
        indicators(linear(0.1), linear(0.1, 0.03), TASK, sources()), rel=1e-4
    )


@given(st.floats(1e-6, 10), st.floats(1e-6, 10), st.floats(1, 10), st.integers(2, 1000))
def test_more_noise_is_never_less_loss(kl: float, noise: float, factor: float, classes: int) -> None:
    for fit in (FIT, Fit.shipped()):
        drop = fit.drop({"kl": kl, "noise": noise}, classes)
        assert drop <= fit.drop({"kl": factor * kl, "noise": noise}, classes)
        assert drop <= fit.drop({"kl": kl, "noise": factor * noise}, classes) <= 100 * (1 - 1 / classes)
        low, high = fit.interval(drop, classes)
        assert -1 < low <= drop <= high <= 100


@pytest.mark.parametrize(
    ("student", "reason"),
    (
        (linear(0.1, math.nan), "the student answers NaN"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 1)), r"answers \(8, 1\): accuracy is lost by classifiers only"),
        (nn.Conv2d(3, 5, 1), r"answers \(8, 5, 8, 8\)"),
    ),
)
def test_it_is_unknown_where_nothing_can_be_compared(student: nn.Module, reason: str) -> None:
    told = estimated(student, teacher=student if isinstance(student, nn.Conv2d) else None)
    assert told.unknown is not None and (told.verdict, told.drop, told.low, told.high) == ("unknown", None, None, None)
    assert re.search(reason, told.unknown)


def test_less_than_was_fitted_is_too_small_to_tell() -> None:
    told = estimated(linear(0.1))  # the very same network
    edge = 20 * math.sqrt(1e-3) * 1e-4
    assert (told.verdict, told.drop, told.low, told.unknown) == ("too small", None, None, None)
    assert told.high == pytest.approx((1 + edge) * math.e - 1)
    assert estimate_text(asdict(told)) == (
        "too small to tell (under 1.7 points of top-1): an estimate without data, "
        "fitted on networks of up to 0.6 k parameters and 5 to 1000 classes"
    )


def test_more_than_was_fitted_is_probably_large() -> None:
    told = estimated(linear(0.1, 1.0))
    assert (told.verdict, told.drop, told.high) == ("probably large", None, None)
    assert told.unknown is not None and "above 0.001 to 3, what the map was fitted on" in told.unknown
    assert estimate_text(asdict(told)).startswith("unknown, and probably large: kl = ")


@pytest.mark.parametrize(("disagreement", "verdict"), ((20.0, "estimated"), (21.0, "probably large")))
def test_choices_that_disagree_more_than_with_any_fitted_pair_contradict_the_map(disagreement: float, verdict: str) -> None:
    reason = FIT.contradiction({"disagreement": disagreement, "noise": 0.1}, 9.0)
    assert (reason is None) == (verdict == "estimated")
    assert FIT.contradiction({"disagreement": disagreement, "noise": 0.1}, 10.0) is None, "so large an interval allows all"
    noisy = FIT.contradiction({"disagreement": disagreement - 15, "noise": 0.6}, 9.0)
    assert noisy is not None and noisy.startswith("noise = 0.6 contradicts the map, which says 9.0 points at most")


def random_network(classes: int) -> nn.Module:
    """Nearly the same answer to every picture, as that of networks that nobody has trained."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16), nn.SiLU()]
    for _ in range(3):
        layers += [nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.SiLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes)).eval()


@pytest.mark.parametrize("bits", (2, 4))
def test_a_network_of_random_weights_gets_no_small_estimate(bits: int) -> None:
    model, task = random_network(1000), Task(shape=(3, 32, 32), classes=1000)
    result = with_estimate(datafree.quantize(model, task, method="rtn", target=datafree.Target(bits, 8)), model)
    told = result.run["estimate"]
    assert isinstance(told, dict) and told["indicators"]["kl"] < 1e-3 and told["indicators"]["disagreement"] > 50
    assert (told["verdict"], told["drop"], told["high"]) == ("probably large", None, None)
    assert re.search("(disagreement|noise) = .* contradicts the map", told["unknown"])


@pytest.mark.parametrize(("bits", "method"), ((2, "rtn"), (3, "rtn"), (4, "anchor")))
def test_the_embedded_digits_keep_their_estimates(bits: int, method: str) -> None:
    model, task = digits()
    result = with_estimate(datafree.quantize(model, task, method=method, target=datafree.Target(bits)), model)
    told = result.run["estimate"]
    assert isinstance(told, dict) and told["verdict"] == "estimated" and told["low"] <= told["drop"] <= told["high"]


@pytest.mark.parametrize(
    ("parameters", "told"), ((1200, ""), (1201, "; this one has 1.2 k parameters"), (25_000_000, "; this one has 25.0 M parameters"))
)
def test_a_network_twice_as_large_as_the_largest_fitted_is_told(parameters: int, told: str) -> None:
    found = {**asdict(estimated(linear(0.1, 0.03))), "parameters": parameters}
    assert estimate_text(found).endswith(f"5 to 1000 classes{told}")


def test_other_numbers_of_classes_and_flat_teachers_are_unknown() -> None:
    few = estimated(linear(0.1, 0.03, classes=4), teacher=linear(0.1, classes=4))
    assert few.verdict == "unknown" and few.unknown is not None and few.unknown.startswith("classes = 4 lies below 5 to 1000")
    flat = estimated(linear(0.1), teacher=linear(0.0))
    assert flat.unknown is not None and "logits are all equal" in flat.unknown and flat.indicators == {}


def test_the_same_seed_gives_the_same_estimate() -> None:
    model, task = digits()
    first, second, other = (datafree.quantize(model, task, method="rtn", target=datafree.Target(3), seed=seed) for seed in (5, 5, 6))
    told = [with_estimate(each, model).run["estimate"] for each in (first, second, other)]
    assert told[0] == told[1] != told[2]
    assert isinstance(told[0], dict) and told[0]["drop"] > 0 and told[0]["sources"] == {"leaves": 64, "pink": 64}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("estimate")


def test_the_map_of_the_package_follows_from_the_result_files(script: ModuleType) -> None:
    fit, shipped = script.fitted(script.everything()), Fit.shipped()
    assert (fit.scale, fit.exponents) == (pytest.approx(shipped.scale, rel=1e-3), pytest.approx(shipped.exponents, abs=1e-3))
    assert (fit.ranges, fit.networks, fit.pairs) == (shipped.ranges, shipped.networks, shipped.pairs)
    assert fit.parameters == shipped.parameters
    for name, steps in fit.ceilings.items():
        assert [value for _, value in steps] == [value for _, value in shipped.ceilings[name]]
    assert fit.networks == ("digits", "digits-vit", "mobilenetv1_025", "resnet20", "resnet56")


def test_a_power_law_is_found_again(script: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = [
        {
            "network": name,
            "parameters": 100,
            "drop": FIT.drop(found := {"kl": kl, "noise": noise, "disagreement": 1.0, "classes": 10.0}, 10),
            "indicators": found,
        }
        for name in ("one", "two", "three")
        for kl, noise in (10 ** -(3 * torch.rand(20, 2, generator=generator))).tolist()
    ]
    fit = script.fitted(pairs)
    assert fit.scale == pytest.approx(20, rel=1e-3) and fit.exponents == pytest.approx({"kl": 0.5, "noise": 1.0}, rel=1e-3)
    assert script.half_width(pairs) < 1e-2
    assert all(each["covered"] or abs(each["estimate"] - each["drop"]) < 1e-3 for each in script.validated(pairs))


def test_no_fitted_network_is_contradicted_unless_its_drop_is_large(script: ModuleType) -> None:
    refused = [each for each in script.validated(script.everything()) if each["doubted"]]
    assert len(refused) < 5 and all(each["drop"] > 50 for each in refused)


def test_parameters_of_the_fitted_networks_are_counted(script: ModuleType) -> None:
    known = {each["network"]: each["parameters"] for each in script.everything()}
    model, _ = digits()
    assert known["digits"] == sum(each.numel() for each in model.parameters())
    assert Fit.shipped().parameters == (min(known.values()), max(known.values()))


def test_the_interval_knows_nothing_of_the_network_left_out(script: ModuleType) -> None:
    pairs = script.everything()
    own = [each for each in script.validated(pairs) if each["network"] == "digits"]
    spoilt = [{**each, "drop": 50.0} if each["network"] == "digits" else each for each in pairs]
    again = [each for each in script.validated(spoilt) if each["network"] == "digits"]
    assert [(each["low"], each["estimate"], each["high"]) for each in own] == [
        (each["low"], each["estimate"], each["high"]) for each in again
    ]


def test_the_page_of_the_estimate_holds_its_figures(script: ModuleType) -> None:
    text = (ROOT / "docs" / "estimate.md").read_text()
    assert script.summary(script.validated(script.everything())) in text
    shipped = json.loads(script.FIT_PLACE.read_text())["fit"]
    assert f"{shipped['scale']:.3g} x KL^{shipped['exponents']['kl']:.3g}" in text


def test_half_width_covers_the_share_that_was_asked_for(script: ModuleType) -> None:
    pairs = script.everything()
    errors = [abs(math.log1p(guess) - math.log1p(max(each["drop"], 0))) for guess, each in zip(script.left_out(pairs), pairs, strict=True)]
    shares, half_width = [], script.half_width(pairs)
    for name in script.networks(pairs):
        own = [error <= half_width for error, each in zip(errors, pairs, strict=True) if each["network"] == name]
        shares.append(sum(own) / len(own))
    assert 0.9 <= min(shares) < 0.95
    assert replace(FIT, half_width=0.0).interval(5.0, 10) == pytest.approx((5.0, 5.0))
