"""The frontier against brute force; budgets; what measuring together changes."""

import itertools
import math
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datafree.bits import pareto
from datafree.bits.pareto import frontier
from datafree.bits.search import choose
from datafree.errors import TargetError
from tests.bits.problems import problem


def total(table: Mapping[str, Mapping[int, float]], widths: Mapping[str, int]) -> float:
    return sum(table[name][bits] for name, bits in widths.items())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(0, 10_000))
def test_the_frontier_is_that_of_brute_force(layers: int, seed: int) -> None:
    lost, cost = problem(layers, seed)
    every = [dict(zip(cost, widths, strict=True)) for widths in itertools.product(*cost.values())]
    expected, best = [], math.inf
    for size, loss in sorted((total(cost, widths), total(lost, widths)) for widths in every):
        if loss < best - 1e-12:
            expected.append((size, pytest.approx(loss)))
            best = loss
    found = frontier(lost, cost)
    assert [(point.size, point.loss) for point in found if point.size in {size for size, _ in expected}] == expected
    for point in found:
        assert (point.size, point.loss) == (total(cost, point.widths), pytest.approx(total(lost, point.widths)))


def test_no_point_beats_another_and_thinning_costs_next_to_nothing() -> None:
    lost, cost = problem(40, 1)
    found = frontier(lost, cost)
    assert len(found) > 300
    assert all(one.size < other.size and one.loss > other.loss for one, other in zip(found, found[1:], strict=False))
    smallest, largest = (sum(pick(sizes.values()) for sizes in cost.values()) for pick in (min, max))
    for share in (0.1, 0.3, 0.5, 0.8):
        budget = smallest + int(share * (largest - smallest))
        (*_, point) = frontier(lost, cost, budget)
        exact = total(lost, choose(lost, cost, budget))
        assert point.size <= budget and point.loss < 1.02 * exact + 2e-6 * max(max(table.values()) for table in lost.values())


def test_a_budget_out_of_reach_is_told() -> None:
    lost, cost = problem(5, 2)
    smallest = sum(min(sizes.values()) for sizes in cost.values())
    (point,) = frontier(lost, cost, smallest)
    assert point.size == smallest
    with pytest.raises(TargetError, match=f"max_bytes = {smallest - 1} is out of reach.*smallest possible size is {smallest} bytes"):
        frontier(lost, cost, smallest - 1)


def test_a_distortion_that_is_no_number_is_refused() -> None:
    with pytest.raises(TargetError, match="distortion of a at 4 bits is nan"):
        frontier({"a": {3: 1.0, 4: math.nan}}, {"a": {3: 1, 4: 2}})


def test_survivors_are_measured_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers that hurt each other at 2 bits: alone neither shows it."""
    monkeypatch.setattr(pareto, "GROUP", 2)
    lost = {name: {2: 1.0, 4: 0.9, 8: 0.0} for name in "abcd"}
    cost = {name: {2: 2, 4: 4, 8: 8} for name in "abcd"}
    asked = []

    def joint(widths: Mapping[str, int]) -> float:
        asked.append(dict(widths))
        return total(lost, widths) + 10 * (widths["a"] == widths["b"] == 2)

    found = frontier(lost, cost, 20, joint)
    assert {len(widths) for widths in asked} == {2, 4}
    assert all(point.loss == pytest.approx(joint(point.widths)) and point.size <= 20 for point in found)
    added = frontier(lost, cost, 20)
    assert added[0].widths == found[0].widths == dict.fromkeys("abcd", 2) and found[0].loss > 13
    assert min(joint(point.widths) for point in found) <= min(joint(point.widths) for point in added)


def test_few_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    lost, cost = problem(20, 3)
    asked = []
    frontier(lost, cost, joint=lambda widths: asked.append(1) or total(lost, widths))
    assert len(asked) <= 4 * pareto.JOINT_CLASSES * pareto.KEPT
