"""Distances of logits against float64 loops, their one normalisation, and where they are least."""

import math

import pytest
import torch
from torch import Tensor

from datafree.tune.terms import adaptability, kl, l1, mse

N, CLASSES = 6, 5
ALL = (kl, mse, l1, adaptability)


def logits() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    t, s = (3 * torch.randn(N, CLASSES, generator=generator) for _ in range(2))
    return t, s


def softmax(row: list[float]) -> list[float]:
    parts = [math.exp(each) for each in row]
    return [each / sum(parts) for each in parts]


def rows(x: Tensor, temperature: float) -> list[list[float]]:
    return [[value / temperature for value in row] for row in x.double().tolist()]


@pytest.mark.parametrize("temperature", (1.0, 4.0, 20.0))
def test_kl_is_the_sum_over_classes_and_the_mean_over_inputs(temperature: float) -> None:
    t, s = logits()
    expected = 0.0
    for one, other in zip(rows(t, temperature), rows(s, temperature), strict=True):
        expected += sum(p * math.log(p / q) for p, q in zip(softmax(one), softmax(other), strict=True)) / N
    assert kl(t, s, temperature).item() == pytest.approx(temperature**2 * expected, rel=1e-4)


@pytest.mark.parametrize("temperature", (1.0, 20.0))
def test_adaptability_is_the_negative_entropy_of_the_disagreement(temperature: float) -> None:
    t, s = logits()
    expected = sum(sum(p * math.log(p) for p in softmax(row)) for row in rows(t - s, temperature)) / N
    assert adaptability(t, s, temperature).item() == pytest.approx(temperature**2 * expected, rel=1e-4)


def test_differences_are_averaged_over_inputs_and_classes() -> None:
    t, s = logits()
    gaps = [a - b for one, other in zip(rows(t, 1), rows(s, 1), strict=True) for a, b in zip(one, other, strict=True)]
    assert mse(t, s).item() == pytest.approx(sum(gap**2 for gap in gaps) / (N * CLASSES))
    assert l1(t, s).item() == pytest.approx(sum(abs(gap) for gap in gaps) / (N * CLASSES))


@pytest.mark.parametrize("distance", ALL)
def test_a_batch_that_is_repeated_costs_the_same(distance: object) -> None:
    assert callable(distance)
    t, s = logits()
    torch.testing.assert_close(distance(t.repeat(3, 1), s.repeat(3, 1)), distance(t, s))


@pytest.mark.parametrize("distance", ALL)
def test_least_where_the_student_answers_as_the_teacher(distance: object) -> None:
    assert callable(distance)
    t, s = logits()
    least = -math.log(CLASSES) if distance is adaptability else 0.0
    assert distance(t, t).item() == pytest.approx(least, abs=1e-6) and distance(t, s) > least + 0.1


@pytest.mark.parametrize("distance", (kl, adaptability))
def test_a_constant_on_all_classes_is_no_difference(distance: object) -> None:
    assert callable(distance)
    t, s = logits()
    torch.testing.assert_close(distance(t + 5, s - 2), distance(t, s))


@pytest.mark.parametrize("distance", ALL)
def test_half_precision_is_computed_in_full(distance: object) -> None:
    assert callable(distance)
    t, s = (each.bfloat16() for each in logits())
    assert distance(t, s).dtype == torch.float32 and distance(t, s) == distance(t.float(), s.float())
