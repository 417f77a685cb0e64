"""anchor end to end: each step can be left out and is worth having, its modes read what they say, and bits are chosen under a budget."""

import pytest
import torch
from torch import nn

import datafree
from datafree import Target
from datafree.bits.cost import plan_bytes
from datafree.errors import DatafreeError, TargetError
from datafree.measure.accuracy import compare
from datafree.method import Method
from datafree.methods import anchor as module_under_test
from datafree.zoo.digits import digits, held_out
from networks import build

MOMENTS = {"statistics": "moments", "own_inputs": False, "act_range": "moments", "recalibration": "none"}


def method(**fields: object) -> Method:
    return datafree.methods()["anchor"](**fields)


def accuracy(target: Target, **fields: object) -> float:
    model, task = digits()
    result = datafree.quantize(model, task, method=method(**fields), target=target)
    return compare(model, result.student, task, held_out()).student.top1


def weights(**fields: object) -> dict[str, torch.Tensor]:
    model, task = build("resnet_basic")
    student = datafree.quantize(model, task, method=method(**fields), target=Target(3, 4, protocol="paper")).student
    return student.state_dict()


@pytest.mark.parametrize(
    "fields",
    (
        {"family": "pink"}, {"statistics": "moments"}, {"shrinkage": 0.8}, {"feedback": False}, {"refine": False}, {"match_mean": False},
        {"match_spread": False}, {"own_inputs": True}, {"act_range": "moments"},
        {"recalibration": "regression"}, {"recalibration": "spread"},
    ),
    ids=str,
)  # fmt: skip
def test_every_step_is_a_switch_of_its_own(fields: dict[str, object]) -> None:
    common = {"own_inputs": False, "recalibration": "none"}
    base, other = weights(**common), weights(**common | fields)
    assert base.keys() == other.keys() and any(not torch.equal(base[name], other[name]) for name in base)


def test_without_pictures_none_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pictures", "source_of"):
        monkeypatch.setattr(module_under_test, name, lambda *args: pytest.fail("a picture was drawn"))
    assert accuracy(Target(4, 8), **MOMENTS) > 90


def test_error_feedback_and_refinement_are_worth_having() -> None:
    """Measured on the answers to the held-out digits, which are nearly all right in any case."""
    model, task = digits()
    x, _ = held_out()
    lost = []
    for on, more, own in ((False, False, False), (True, False, False), (True, True, False), (True, True, True)):
        chosen = method(feedback=on, refine=more, own_inputs=own, recalibration="regression")
        student = datafree.quantize(model, task, method=chosen, target=Target(2)).student
        with torch.no_grad():
            lost.append(float((student(x) - model(x)).square().sum()))
    assert lost[3] < lost[2] < lost[1] < lost[0]


def test_a_network_without_norms_needs_pictures_for_its_ranges() -> None:
    model, task = build("without_norm")
    result = datafree.quantize(model, task, method=method(statistics="moments", own_inputs=False, recalibration="none"), target=Target(4))
    assert torch.isfinite(result.student(task.noise(2, torch.Generator().manual_seed(0)))).all()
    datafree.quantize(model, task, method=method(), target=Target(4, 4))


@pytest.mark.parametrize("fields", ({}, MOMENTS), ids=("pictures", "moments"))
def test_mixed_widths_meet_the_budget_and_lose_less_than_one_width(fields: dict[str, object]) -> None:
    model, task = build("resnet_basic")
    uniform = datafree.quantize(model, task, method=method(**fields), target=Target(4, protocol="paper"))
    budget = plan_bytes(model, uniform.plan)
    mixed = datafree.quantize(model, task, method=method(**fields), target=Target((2, 3, 4, 5, 6, 8), max_bytes=budget, protocol="paper"))
    widths = {layer.weight.bits for layer in mixed.plan.layers.values()}
    assert plan_bytes(model, mixed.plan) <= budget and len(widths) > 1
    x = torch.randn(64, *task.shape, generator=torch.Generator().manual_seed(5))

    def error(student: nn.Module) -> float:
        with torch.no_grad():
            return float((student(x) - model(x)).square().sum())

    assert error(mixed.student) < error(uniform.student)


def test_a_budget_out_of_reach_is_refused() -> None:
    model, task = build("resnet_basic")
    with pytest.raises(TargetError, match="out of reach"):
        datafree.quantize(model, task, target=Target((2, 4, 8), max_bytes=100))


@pytest.mark.parametrize("fields", ({"family": "dogs"}, {"statistics": "data"}, {"shrinkage": 1.5}), ids=str)
def test_bad_fields_are_refused(fields: dict[str, object]) -> None:
    model, task = build("resnet_basic")
    with pytest.raises(DatafreeError, match=next(iter(fields))):
        datafree.quantize(model, task, method=method(**fields))
