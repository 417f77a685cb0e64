"""The frontier against brute force, and plans that every method keeps to or refuses clearly."""

import functools
import itertools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import datafree
from datafree import Ctx, LayerPlan, Plan, QSpec, Target, planning
from datafree.bits.cost import packed_bytes, plan_bytes
from datafree.errors import MethodError, TargetError
from datafree.planning import search
from datafree.quant.insert import plan_of
from datafree.synth.noise import source_of
from datafree.synth.source import Source
from datafree.task import Task
from networks import build
from test_contract import METHODS, quick

PAPER = Target(protocol="paper")
TASK = Task(shape=(3, 8, 8), classes=5)
WIDTHS = (2, 4, 8)
PLAIN = datafree.methods()["rtn"](correct_bias=False)  # rounds each layer for itself


@functools.cache
def tiny() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5)
    return nn.Sequential(*layers).eval()


@pytest.fixture
def inputs(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the search measures on."""
    seen: list[Tensor] = []

    class Watched:
        def __init__(self, source: Source) -> None:
            self.source = source

        def sample(self, n: int) -> object:
            batch = self.source.sample(n)
            seen.append(batch.inputs)
            return batch

    monkeypatch.setattr(planning, "source_of", lambda *args: Watched(source_of(*args)))
    return seen


def divergence(student: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        t, s = (model(x).double().softmax(1) for model in (tiny(), student))
    return float((t * (t / s).log()).sum(1).mean())


def by_widths(widths: Mapping[str, int]) -> datafree.Result:
    plan = Plan({name: LayerPlan(QSpec(bits, axis=0)) for name, bits in widths.items()})
    return datafree.quantize(tiny(), TASK, method=PLAIN, target=Target(plan=plan, protocol="paper"))


def test_the_frontier_is_that_of_brute_force(inputs: list[Tensor]) -> None:
    found = search(tiny(), TASK, Ctx.create(), method=PLAIN, target=PAPER, widths=WIDTHS)
    (x,) = inputs
    names, start = ("0", "3", "6"), divergence(by_widths(dict.fromkeys(("0", "3", "6"), 8)).student, x)
    added = {
        (name, bits): max(0.0, divergence(by_widths({**dict.fromkeys(names, 8), name: bits}).student, x) - start)
        for name in names
        for bits in WIDTHS
    }
    every = []
    for bits in itertools.product(WIDTHS, repeat=3):
        plan = Plan({name: LayerPlan(QSpec(width, axis=0)) for name, width in zip(names, bits, strict=True)})
        every.append((plan_bytes(tiny(), plan), start + sum(added[each] for each in zip(names, bits, strict=True))))
    best = [
        (size, loss) for size, loss in every if not any(s <= size and lost < loss - 1e-9 or s < size and lost <= loss for s, lost in every)
    ]
    assert [point.size for point in found.points] == sorted({size for size, _ in best})
    assert [point.loss for point in found.points] == pytest.approx([loss for _, loss in sorted(best)], abs=1e-6)
    assert len(found.points) > 3 and found.unit == "nats of KL per input"


@pytest.mark.parametrize("by", ("kl", "closed"))
def test_the_frontier_is_monotone_and_its_students_are_as_large_as_told(by: planning.Measure) -> None:
    model, task = build("cifar_resnet")
    found = search(model, task, Ctx.create(), method="dfmpc", target=Target(act_bits=4), widths=(2, 3, 8), by=by)
    for small, large in itertools.pairwise(found.points):
        assert small.size < large.size and small.loss > large.loss >= 0
    for point in (found.points[0], found.points[len(found.points) // 2]):
        plan = found.plan(point)
        student = found.student(point.widths)
        assert {name: layer.weight.bits for name, layer in plan.layers.items()} == dict(point.widths)
        assert plan_of(student) == plan and packed_bytes(student) == point.size
        result = datafree.quantize(model, task, method="dfmpc", target=Target(plan=plan))
        assert result.plan == plan and result.run["packed_bytes"] == point.size


def test_a_point_for_a_bound() -> None:
    found = search(tiny(), TASK, Ctx.create(), method="rtn", target=PAPER, widths=WIDTHS, by="closed")
    middle = found.points[len(found.points) // 2]
    assert found.within(middle.size) == found.losing(middle.loss) == middle
    assert found.within(10**9) == found.points[-1] and found.losing(1e9) == found.points[0]
    smallest = found.points[0].size
    with pytest.raises(TargetError, match=f"max_bytes = {smallest - 1} is out of reach: .* smallest size is {smallest} bytes"):
        found.within(smallest - 1)
    with pytest.raises(TargetError, match="max_drop = 0 is out of reach: .* noise-to-signal"):
        found.losing(0)


def numbers(student: nn.Module) -> dict[str, Tensor]:
    return {name: each for name, each in student.state_dict().items() if isinstance(each, Tensor)}


def assert_each_width_is_made_for_itself(method: datafree.Method, events: list[datafree.Event]) -> None:
    """Every student of a search is the one that the same method makes of the same network at that width alone."""
    model, task = build("cifar_resnet")
    target = Target(act_bits=8)
    found = search(model, task, Ctx.create(on_event=events.append), method=method, target=target, widths=(2, 8), by="closed")
    for bits in (2, 8):
        alone = datafree.quantize(model, task, method=method, target=replace(target, weight_bits=bits)).student
        expected, student = numbers(alone), numbers(found.students[bits])
        assert expected.keys() == student.keys()
        assert [name for name in expected if not torch.equal(expected[name], student[name])] == [], f"{bits} bits"


@pytest.mark.parametrize(
    ("name", "fields"),
    (
        ("gdfq", {"budget": "smoke", "warm_up": 2, "steps": 3, "batch": 8}),
        ("hast", {"budget": "smoke", "pictures": 8, "picture_steps": 3, "steps": 3, "batch": 8}),
        ("genie", {"budget": "smoke", "pictures": 4, "picture_steps": 3, "steps": 3}),
    ),
)
def test_a_search_trains_each_width_for_itself(name: str, fields: dict[str, object]) -> None:
    assert_each_width_is_made_for_itself(datafree.methods()[name](**fields), [])


def test_pictures_are_optimised_once_for_all_widths() -> None:
    events: list[datafree.Event] = []
    assert_each_width_is_made_for_itself(datafree.methods()["zeroq"](steps=10, pictures=2), events)
    assert sum(event.name.startswith("pictures") for event in events) == 10
    assert not any("resumed" in event.message for event in events)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    (
        ({"widths": (4,)}, TargetError, "two widths at least"),
        ({"widths": (4, 9)}, TargetError, "9 is not supported"),
        ({"target": Target(plan=Plan())}, TargetError, "target without a plan"),
        ({"method": "none"}, MethodError, "unknown method 'none': choose from .*anchor"),
        ({"method": 3}, MethodError, "must be a name or a Method"),
    ),
)
def test_a_search_that_makes_no_sense_is_told(values: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        search(tiny(), TASK, Ctx.create(), **values)  # type: ignore[arg-type]


# ---------------------------------------------------------------- a plan that is given


@pytest.mark.usefixtures("few_pictures")
@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_to_a_plan(method: str) -> None:
    model, task = build("cifar_resnet")
    chosen, keep = quick(method), ("layer1.0.conv2",)
    few, many = (datafree.quantize(model, task, method=chosen, target=Target(bits, 4, keep=keep)).plan for bits in (3, 6))
    mixed = replace(few, layers={name: (few, many)[number % 2].layers[name] for number, name in enumerate(few.layers)})
    result = datafree.quantize(model, task, method=chosen, target=Target(plan=mixed, keep=keep))
    assert result.plan == mixed and len({layer.weight.bits for layer in mixed.layers.values()}) > 1


def conv_plan(**changes: object) -> Plan:
    specs = {name: QSpec(4, axis=0) for name in ("0", "3", "6")}
    return Plan({name: LayerPlan(spec) for name, spec in (specs | changes).items() if isinstance(spec, QSpec)})


@pytest.mark.parametrize(
    ("target", "message"),
    (
        (Target(plan=conv_plan(conv1=QSpec(4, axis=0))), "bits to conv1, which this network does not have: it is the plan of another one"),
        (Target(plan=conv_plan(**{"3": None})), "the plan is silent on 3: it is the plan of another network, or .* named in keep"),
        (Target(plan=conv_plan(), keep=("3",)), "bits to 3, which keep wants in float"),
        (Target(plan=conv_plan(**{"3": QSpec(4, False, 0)})), "weight of 3: the plan says .*, this method makes .*: search the plan with"),
        (Target(plan=replace(conv_plan(), tensors={"2:output": QSpec(4)})), "2:output: the plan says"),
        (Target(plan=replace(conv_plan(), tensors={"9:output": QSpec(4, False)})), "no module '9'"),
        (Target(plan=conv_plan(), max_bytes=10), "more than max_bytes = 10"),
    ),
    ids=str,
)
def test_a_plan_that_does_not_fit_is_refused(target: Target, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        datafree.quantize(tiny(), TASK, method=PLAIN, target=target)


def test_a_method_that_plans_for_itself_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    cls = type(PLAIN)
    run = cls.run
    monkeypatch.setattr(cls, "run", lambda self, teacher, task, target, ctx: run(self, teacher, task, replace(target, plan=None), ctx))
    with pytest.raises(MethodError, match="does not keep to a plan that is given"):
        datafree.quantize(tiny(), TASK, method=PLAIN, target=Target(plan=conv_plan()))


@pytest.mark.parametrize("values", ({"weight_bits": 4}, {"act_bits": 8}))
def test_bits_beside_a_plan_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(TargetError, match="a plan says the bits"):
        Target(plan=conv_plan(), **values)  # type: ignore[arg-type]
    with pytest.raises(TargetError, match="protocol dfmpc quantizes weights only, but the plan"):
        Target(plan=replace(conv_plan(), tensors={"2:output": QSpec(4, False)}), protocol="dfmpc")


def test_a_plan_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(conv_plan().to_json()))
    assert Plan.read(file) == conv_plan()
    for content, message in (
        (file.read_text()[:40], "is damaged"),
        ("[]", "is damaged: not a plan of datafree"),
        (file.read_text().replace('"bits": 4', '"bits": 40'), "40 bits are not supported"),
    ):
        file.write_text(content)
        with pytest.raises(TargetError, match=f"plan.json {message}|{message}"):
            Plan.read(file)
    with pytest.raises(TargetError, match="nowhere.json cannot be read: No such file"):
        Plan.read(tmp_path / "nowhere.json")
