"""The knapsack against brute force; budgets that hold; widths that are never given."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from datafree.bits.allocate import make_plan
from datafree.bits.cost import packed_bytes, plan_bytes
from datafree.bits.search import allowed, choose, is_mixed, mixed_widths
from datafree.bits.sensitivity import distortions, moments_energy, per_output
from datafree.closed.propagate import layer_inputs
from datafree.context import Ctx
from datafree.errors import TargetError
from datafree.graph.flow import Flow, flow
from datafree.plan import Plan, Target
from datafree.quant.insert import insert
from networks import NAMES, build
from tests.bits.problems import WIDTHS, Costs, Table, problem


def value(table: Table, widths: dict[str, int]) -> float:
    return sum(table[name][bits] for name, bits in widths.items())


def size(cost: Costs, widths: dict[str, int]) -> int:
    return sum(cost[name][bits] for name, bits in widths.items())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(0, 10_000), st.floats(0, 1.1))
def test_as_good_as_brute_force(layers: int, seed: int, share: float) -> None:
    lost, cost = problem(layers, seed)
    smallest, largest = (sum(pick(costs.values()) for costs in cost.values()) for pick in (min, max))
    budget = smallest + int(share * (largest - smallest))
    found = choose(lost, cost, budget)
    assert list(found) == list(cost) and size(cost, found) <= budget
    every = (dict(zip(cost, widths, strict=True)) for widths in itertools.product(*cost.values()))
    best = min(value(lost, widths) for widths in every if size(cost, widths) <= budget)
    assert value(lost, found) <= best + 2e-6 * max(max(table.values()) for table in lost.values())


def test_a_larger_budget_is_never_worse() -> None:
    lost, cost = problem(40, 1)
    smallest, largest = (sum(pick(costs.values()) for costs in cost.values()) for pick in (min, max))
    worst = max(max(table.values()) for table in lost.values())
    before = math.inf
    for budget in torch.linspace(smallest, largest, 15).long().tolist():
        found = choose(lost, cost, budget)
        assert size(cost, found) <= budget
        assert value(lost, found) <= before + 2e-6 * worst
        before = value(lost, found)
    assert found == {name: min(lost[name], key=lambda bits: lost[name][bits]) for name in cost}


def test_the_budget_holds_to_the_byte() -> None:
    """With large numbers, where a solver's relative tolerance is many bytes."""
    cost = {f"layer{i}": {2: 10_000_019 * (i + 1), 8: 40_000_079 * (i + 1)} for i in range(6)}
    lost = {name: {2: 1.0, 8: 0.0} for name in cost}
    everything = sum(costs[8] for costs in cost.values())
    assert set(choose(lost, cost, everything).values()) == {8}
    assert size(cost, choose(lost, cost, everything - 1)) < everything


def test_the_smallest_size_is_told_where_the_budget_is_out_of_reach() -> None:
    lost, cost = problem(5, 2)
    smallest = sum(min(costs.values()) for costs in cost.values())
    assert size(cost, choose(lost, cost, smallest)) == smallest
    with pytest.raises(TargetError, match=f"max_bytes = {smallest - 1} is out of reach.*smallest possible size is {smallest} bytes"):
        choose(lost, cost, smallest - 1)


def test_a_distortion_that_is_no_number_is_refused() -> None:
    with pytest.raises(TargetError, match="distortion of a at 4 bits is nan"):
        choose({"a": {4: math.nan}}, {"a": {4: 1}}, 10)


def read(name: str) -> tuple[nn.Module, Flow]:
    model, task = build(name)
    return model, flow(model, torch.randn(2, *task.shape, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("name", NAMES)
def test_fragile_layers_keep_four_bits(name: str) -> None:
    _, found = read(name)
    for protocol in ("paper", "dfmpc", "deploy"):
        choices = allowed(found, Target(WIDTHS, max_bytes=1, protocol=protocol))
        for layer in found.layers.values():
            edge = layer.first or layer.last
            expected = (8,) if edge and protocol == "deploy" else (4, 6, 8) if edge or layer.depthwise else WIDTHS
            assert choices[layer.name] == expected


def test_fewer_than_four_bits_only_where_nothing_else_was_asked_for_and_kept_layers_absent() -> None:
    _, found = read("mobilenet")
    kept = next(name for name, layer in found.layers.items() if layer.first)
    choices = allowed(found, Target((2, 3), protocol="paper", keep=(kept,)))
    assert kept not in choices and set(choices.values()) == {(2, 3)} and len(choices) == len(found.layers) - 1


def test_more_than_two_widths_with_a_budget_are_mixed() -> None:
    assert is_mixed(Target((2, 4, 8), max_bytes=10))
    assert not is_mixed(Target((2, 6), max_bytes=10)) and not is_mixed(Target(4, max_bytes=10)) and not is_mixed(Target((2, 6)))


@pytest.mark.parametrize("protocol", ["deploy", "paper"])
@pytest.mark.parametrize("name", NAMES)
def test_networks_meet_their_budget_as_counted(name: str, protocol: str) -> None:
    model, found = read(name)
    lost = distortions(found, model, dict.fromkeys(found.layers, WIDTHS), moments_energy(found, layer_inputs(found, model)))
    ends = []
    for pick in (min, max):
        widths = {name: pick(bits) for name, bits in allowed(found, Target(WIDTHS, 4, 1, protocol)).items()}
        ends.append(plan_bytes(model, planned(model, found, Target(WIDTHS, 4, 1, protocol), widths)))
    for budget in (ends[0], (ends[0] + ends[1]) // 2, ends[1]):
        target = Target(WIDTHS, 4, budget, protocol)
        widths = mixed_widths(found, model, target, lost)
        assert all(bits in allowed(found, target)[name] for name, bits in widths.items())
        plan = planned(model, found, target, widths)
        assert {name: layer.weight.bits for name, layer in plan.layers.items()} == widths
        assert packed_bytes(insert(model, plan)) == plan_bytes(model, plan) <= budget
    with pytest.raises(TargetError, match=f"smallest possible size is {ends[0]} bytes"):
        mixed_widths(found, model, Target(WIDTHS, 4, ends[0] - 1, protocol), lost)


def planned(model: nn.Module, found: Flow, target: Target, widths: dict[str, int]) -> Plan:
    return make_plan(found, model, target, per_output, Ctx.create(), widths)


@pytest.mark.parametrize("name", NAMES)
def test_mixing_is_never_worse_than_one_width_of_the_same_size(name: str) -> None:
    model, found = read(name)
    lost = distortions(found, model, dict.fromkeys(found.layers, WIDTHS), moments_energy(found, layer_inputs(found, model)))
    uniform = {name: 8 if layer.first or layer.last else 4 for name, layer in found.layers.items()}
    size = plan_bytes(model, planned(model, found, Target(4), uniform))
    assert value(lost, mixed_widths(found, model, Target(WIDTHS, None, size), lost)) <= value(lost, uniform) * (1 + 1e-9)
    assert value(lost, mixed_widths(found, model, Target(WIDTHS, None, 5 * size // 4), lost)) < 0.9 * value(lost, uniform)


def test_a_search_needs_a_budget() -> None:
    model, found = read("vgg")
    with pytest.raises(TargetError, match="set max_bytes"):
        mixed_widths(found, model, Target(4), {})


def test_a_plan_takes_chosen_widths_and_refuses_gaps() -> None:
    model, found = read("vgg")
    target = Target(WIDTHS, max_bytes=10**6, keep=("3",))
    widths = {name: 5 for name in reversed(found.layers) if name != "3"}
    plan = planned(model, found, target, widths)
    assert list(plan.layers) == [name for name in found.layers if name != "3"]
    assert {layer.weight.bits for layer in plan.layers.values()} == {5}
    for wrong in ({**widths, "3": 4}, {**widths, "nowhere": 4}, {"0": 4}):
        with pytest.raises(TargetError, match="exactly the layers that are not kept"):
            planned(model, found, target, wrong)
    with pytest.raises(TargetError, match="does not choose among the widths"):
        make_plan(found, model, target, per_output, Ctx.create())
