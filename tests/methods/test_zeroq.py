"""ZeroQ on the embedded digits: accuracy, ranges, variants of the pictures, and bits where they are needed."""

import functools

import pytest
import torch

import datafree
from datafree import Result, Target
from datafree.bits.cost import plan_bytes
from datafree.bits.pareto import Point, frontier
from datafree.closed.regress import divergence
from datafree.errors import DatafreeError
from datafree.fit import Stalled
from datafree.measure.accuracy import compare
from datafree.method import Method
from datafree.methods import zeroq as module_under_test
from datafree.quant.insert import quantizers, weight_quantizer
from datafree.quant.ranges import minmax
from datafree.zoo.digits import digits, held_out
from networks import build

QUICK = {"steps": 8, "pictures": 12, "rate": 0.1, "start": "mix"}
WIDTHS = (2, 3, 4, 5, 6, 8)


def method(**fields: object) -> Method:
    return datafree.methods()["zeroq"](**QUICK | fields)


@functools.cache
def quantized(target: Target, **fields: object) -> Result:
    return datafree.quantize(*digits(), method=method(**fields), target=target)


def accuracy(result: Result) -> float:
    model, task = digits()
    return compare(model, result.student, task, held_out()).student.top1


@pytest.mark.parametrize(("bits", "floor"), ((8, 98.0), (4, 90.0)))
def test_accuracy_on_the_held_out_digits(bits: int, floor: float) -> None:
    assert accuracy(quantized(Target(bits, bits, protocol="paper"))) >= floor


def test_weights_are_min_max_ranged_and_asymmetric_by_output_channel() -> None:
    model, _ = digits()
    result = quantized(Target(4, 4, protocol="paper"))
    for name, layer in result.plan.layers.items():
        assert not layer.weight.symmetric and layer.weight.axis == 0
        quantizer = weight_quantizer(result.student.get_submodule(name))
        scale, zero = minmax(model.get_submodule(name).weight, layer.weight)
        assert torch.equal(quantizer.scale, scale) and torch.equal(quantizer.zero, zero)


def test_a_percentile_clips_and_all_of_them_is_min_max() -> None:
    target, clip = Target(8, 8, protocol="paper"), {"act_range": "percentile"}
    full, same, less = (quantized(target, **fields) for fields in ({}, {**clip, "percentile": 100.0}, {**clip, "percentile": 99.0}))
    points = quantizers(full.student)
    assert points
    for point, quantizer in points.items():
        torch.testing.assert_close(quantizers(same.student)[point].scale, quantizer.scale)
        assert quantizers(less.student)[point].scale < quantizer.scale


@pytest.mark.parametrize(
    "fields", ({"variant": "dsg"}, {"variant": "classes"}, {"start": "pink"}, {"augment": True}, {"rate": 0.2}, {"batch": 5}), ids=str
)
def test_every_choice_of_pictures_changes_the_ranges_and_serves(fields: dict[str, object]) -> None:
    target = Target(8, 8, protocol="paper")
    base, other = (quantizers(quantized(target, **each).student) for each in ({}, fields))
    assert any(not torch.equal(base[point].scale, other[point].scale) for point in base)
    assert accuracy(quantized(target, **fields)) > 97


def test_stopping_early_takes_fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_under_test, "Stalled", lambda: Stalled(5))
    steps = []
    for stop_early in (False, True):
        events: list[datafree.Event] = []
        chosen = method(steps=14, pictures=2, stop_early=stop_early, rate=1e-6)
        datafree.quantize(*digits(), method=chosen, target=Target(8), on_event=events.append)
        steps.append(max(event.step for event in events if event.name.startswith("pictures")))
    assert steps == [14, 10]


def test_mixed_widths_meet_the_budget_and_lose_less_than_one_width() -> None:
    model, task = digits()
    uniform = quantized(Target(4, protocol="paper"))
    budget = plan_bytes(model, uniform.plan)
    mixed = quantized(Target(WIDTHS, max_bytes=budget, protocol="paper"), sensitivity_pictures=12)
    assert plan_bytes(model, mixed.plan) <= budget and len({layer.weight.bits for layer in mixed.plan.layers.values()}) > 1
    inputs, _ = held_out()
    assert divergence(model, mixed.student, task, inputs) < 0.8 * divergence(model, uniform.student, task, inputs)


def test_survivors_are_measured_together_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def look(*args: object) -> list[Point]:
        asked.append(args[3])
        return frontier(*args)

    monkeypatch.setattr(module_under_test, "frontier", look)
    model, task = build("cifar_resnet")
    found = [
        datafree.quantize(model, task, method=method(remeasure=remeasure), target=Target((2, 4, 8), max_bytes=6000, protocol="paper"))
        for remeasure in (False, True)
    ]
    assert asked[0] is None and callable(asked[1])
    assert all(plan_bytes(model, each.plan) <= 6000 for each in found)


def test_a_network_without_batch_norms_gets_procedural_pictures_and_a_note() -> None:
    result = datafree.quantize(*build("without_norm"), method=method(), target=Target(4, 4, protocol="paper"))
    notes = result.run["notes"]
    assert isinstance(notes, list) and any("procedural pictures take their place" in note for note in notes)
    assert torch.isfinite(result.student(torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))).all()


def test_a_budget_out_of_reach_is_refused() -> None:
    with pytest.raises(DatafreeError, match="out of reach"):
        datafree.quantize(*digits(), method=method(steps=1), target=Target(WIDTHS, max_bytes=100))
