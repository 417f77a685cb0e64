"""A student learns its teacher's answers, keeps what it must, and comes to the same bits after a kill."""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from datafree import fit as loop
from datafree.bits.allocate import make_plan
from datafree.closed.regress import divergence
from datafree.context import Ctx, Event
from datafree.errors import MethodError
from datafree.graph.flow import Layer, read
from datafree.plan import QSpec, Target
from datafree.quant.freeze import freeze, materialise
from datafree.quant.insert import insert, latent_weight, quantized_layers, quantizers, weight_quantizer
from datafree.quant.observe import observe
from datafree.quant.ranges import minmax
from datafree.synth.filters import low_pass
from datafree.synth.generator import Conditional
from datafree.synth.generator import Recipe as Generation
from datafree.synth.prior import pictures
from datafree.synth.source import Batch, Pool, Prior, Source
from datafree.tune import distill as module_under_test
from datafree.tune.distill import Recipe, distill
from datafree.tune.features import attention
from datafree.zoo.digits import digits
from networks import same

MODEL, TASK = digits()
STEPS = 6
QUICK = Recipe(batch=8, range_batches=1, rate=1e-3, clip=1e3)


class Killed(Exception):
    """Stands for the end of the process."""


def spec(layer: Layer, bits: int) -> QSpec:
    return QSpec(bits, symmetric=False, axis=layer.out_axis)


def untrained(bits: int = 3, model: nn.Module = MODEL) -> nn.Module:
    ctx = Ctx.create(0)
    flow = read(model, TASK, ctx)
    return insert(model, make_plan(flow, model, Target(bits, bits, protocol="paper"), spec, ctx)).requires_grad_(False)


def trained(recipe: Recipe = QUICK, steps: int = STEPS, ctx: Ctx | None = None, source: Source | None = None) -> nn.Module:
    student, ctx = untrained(), ctx or Ctx.create(0)
    distill(MODEL, student, TASK, source or Prior("mix", TASK, ctx.generator), steps, ctx, recipe)
    return student


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: each.clone() for name, each in model.state_dict().items()}


def labelled(n: int = 64) -> Pool:
    """Digits that nobody drew, each with the class the network gives it."""
    inputs = pictures("mix", n, TASK, torch.Generator().manual_seed(5))
    with torch.no_grad():
        return Pool(Batch(inputs, MODEL(inputs).argmax(1)), torch.Generator().manual_seed(6))


@pytest.mark.parametrize("distance", ("mse", "kl", "l1", "adaptability"))
def test_a_student_comes_nearer_to_its_teacher_on_inputs_it_has_not_seen(distance: module_under_test.Distance) -> None:
    unseen = pictures("mix", 64, TASK, torch.Generator().manual_seed(9))
    recipe = Recipe(batch=16, rate=1e-2, distance=distance, temperature=4.0)
    before, after = (divergence(MODEL, trained(recipe, steps), TASK, unseen) for steps in (0, 25))
    assert after < 0.9 * before


def test_the_teacher_stays_and_so_do_statistics_and_activation_ranges_once_set() -> None:
    teacher = state(MODEL)
    before, after = state(trained(steps=0)), state(trained())
    assert all(torch.equal(each, teacher[name]) for name, each in MODEL.state_dict().items())
    for name, each in after.items():
        fixed = "running" in name or "batches_tracked" in name or "output_quantizer" in name or "input_quantizer" in name
        if not name.endswith(".zero"):  # one of a few integers
            assert torch.equal(each, before[name]) == fixed, name


def test_a_trained_student_is_frozen_as_it_is_simulated() -> None:
    student = trained()
    inputs = TASK.noise(4, torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(student(inputs), materialise(student)(inputs))
    for each in freeze(student).values():
        low, high = each.spec.levels
        assert low <= each.codes.min() and each.codes.max() <= high
    assert not any(each.requires_grad or each.grad is not None for each in student.parameters())
    assert not any(each._forward_hooks for each in student.modules() if "Quantizer" in type(each).__name__) and not student.training


def test_ranges_of_weights_follow_them_or_stay() -> None:
    before = untrained()
    for kind in ("follow", "stay"):
        student = trained(dataclasses.replace(QUICK, weight_range=kind))
        for name, layer in quantized_layers(student).items():
            quantizer = weight_quantizer(layer)
            follows = torch.equal(quantizer.scale, minmax(latent_weight(layer), quantizer.spec)[0])
            assert follows == (kind == "follow")
            stays = torch.equal(quantizer.scale, weight_quantizer(before.get_submodule(name)).scale)
            assert stays == (kind == "stay")


@pytest.mark.parametrize("act_range", ("moving", "percentile", "extremes"))
def test_ranges_of_activations_are_set_on_the_source(act_range: module_under_test.ActRange) -> None:
    student = trained(dataclasses.replace(QUICK, act_range=act_range, percentile=100.0, range_batches=3), steps=0)
    assert all(quantizer.ready for quantizer in quantizers(student).values())


def test_the_extremes_are_those_of_all_batches() -> None:
    student = trained(dataclasses.replace(QUICK, act_range="extremes", range_batches=3), steps=0)
    expected, source = untrained(), Prior("mix", TASK, Ctx.create(0).generator)
    observe(expected, [source.sample(8).inputs for _ in range(3)], "minmax", TASK.run)
    assert same(student, expected)


def test_the_source_is_updated_when_it_is_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    source, updates = labelled(), 0

    def update(self: Pool, student: nn.Module) -> dict[str, Tensor]:
        nonlocal updates
        updates += 1
        return {}

    monkeypatch.setattr(Pool, "update", update)
    trained(dataclasses.replace(QUICK, each=4), steps=6, source=source)
    assert updates == 2


def test_ranges_that_are_not_there_cannot_stay() -> None:
    with pytest.raises(MethodError, match="cannot stay as they are, unset"):
        trained(dataclasses.replace(QUICK, act_range="stay"))


@functools.cache
def plain() -> nn.Module:
    return trained(source=labelled())


@pytest.mark.parametrize(
    "change",
    (
        {"rate": 2e-3}, {"falling": "cosine"}, {"falling": "steps"}, {"weight_decay": 0.1}, {"clip": 0.1}, {"batch": 9},
        {"distance": "kl"}, {"weight": 2.0}, {"classes": 1.0}, {"average": 0.0}, {"average": 1.0}, {"flip": True}, {"roll": 2},
        {"crop": 0.5}, {"mixup": 1.0}, {"low_pass": 2.0}, {"perturb": 0.1}, {"gradient": "identity"},
        {"range_batches": 2}, {"percentile": 90.0},
    ),
    ids=str,
)  # fmt: skip
def test_every_choice_matters(change: dict[str, object]) -> None:
    student = trained(dataclasses.replace(QUICK, **change), source=labelled())
    assert not same(student, plain())
    with torch.no_grad():
        assert torch.isfinite(student(TASK.noise(2, torch.Generator().manual_seed(0)))).all()


def test_the_gradient_of_a_clipped_value_is_none_or_that_of_the_identity() -> None:
    student = trained(steps=0)
    (point,) = (each for name, each in quantizers(student).items() if name.startswith("relu"))
    top = float(point.scale * (point.spec.levels[1] - point.zero))
    for kind, expected in (("masked", [1.0, 0.0]), ("identity", [1.0, 1.0])):
        x = torch.tensor([0.4 * top, 2 * top], requires_grad=True)
        with module_under_test._gradient(student, kind):
            value = point(x)
        (slope,) = torch.autograd.grad(value.sum(), x)
        assert slope.tolist() == expected and torch.equal(value.detach(), point(x.detach()))


def test_the_average_is_that_of_the_last_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Tensor]] = []
    count = module_under_test._Lesson.count

    def look(self: module_under_test._Lesson) -> None:
        count(self)
        seen.append([each.detach().clone() for each in self.student.parameters()])

    monkeypatch.setattr(module_under_test._Lesson, "count", look)
    student = trained(dataclasses.replace(QUICK, average=0.5))
    assert len(seen) == STEPS
    for param, *last in zip(student.parameters(), *seen[STEPS // 2 - 1 :], strict=True):
        torch.testing.assert_close(param, torch.stack(last).mean(0))


def test_what_has_a_rate_of_nothing_stays_without_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    count = module_under_test._Lesson.count

    def look(self: module_under_test._Lesson) -> None:
        assert all((each.grad is None) == (each.dim() > 1) for each in self.student.parameters())
        count(self)

    monkeypatch.setattr(module_under_test._Lesson, "count", look)
    before = untrained()
    for name, param in trained(dataclasses.replace(QUICK, rate=0.0, norm_rate=1e-2)).named_parameters():
        assert torch.equal(param, before.get_parameter(name)) == (param.dim() > 1)


def test_mixtures_of_two_have_shares_of_both_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    lesson = module_under_test._Lesson(MODEL, untrained(), TASK, labelled(), 1, Ctx.create(0), dataclasses.replace(QUICK, mixup=1.0))
    x, labels, (t, _) = lesson._shown()
    assert labels is not None and labels.shape == (8, 10) and torch.allclose(labels.sum(1), torch.ones(8))
    assert ((labels > 0).sum(1) == 2).any() and torch.equal(t, MODEL(x).detach())


def test_mixtures_may_be_for_the_distance_alone() -> None:
    recipe = dataclasses.replace(QUICK, mixup=1.0, classes=1.0)
    for mixed_classes, names in ((True, {"mse", "cross-entropy"}), (False, {"mse"})):
        chosen = dataclasses.replace(recipe, mixed_classes=mixed_classes)
        lesson = module_under_test._Lesson(MODEL, trained(steps=0), TASK, labelled(), 1, Ctx.create(0), chosen)
        assert lesson().keys() == names


def test_perturbed_inputs_are_harder_and_count_as_well() -> None:
    recipe = dataclasses.replace(QUICK, perturb=0.02, features=attention)
    lesson = module_under_test._Lesson(MODEL, trained(steps=0), TASK, labelled(), 1, Ctx.create(0), recipe)
    shown: list[Tensor] = []
    lesson.student.register_forward_pre_hook(lambda module, args: shown.append(args[0].detach()))
    terms = lesson()
    assert terms.keys() == {"mse", "features", "mse of perturbed inputs", "features of perturbed inputs"}
    moves = (shown[1] - shown[0]).abs()
    assert moves.max() == pytest.approx(0.02, rel=1e-3) and (moves > 0.019).float().mean() > 0.9
    assert terms["mse of perturbed inputs"] > 1.1 * terms["mse"]
    torch.stack([*terms.values()]).sum().backward()
    assert all(each.grad is None for each in MODEL.parameters())


def test_a_low_pass_comes_before_all_else() -> None:
    recipe = dataclasses.replace(QUICK, low_pass=1.5, batch=64)
    lesson = module_under_test._Lesson(MODEL, untrained(), TASK, labelled(), 1, Ctx.create(0), recipe)
    x, labels, (t, _) = lesson._shown()
    assert torch.equal(x, low_pass(labelled().sample(64).inputs, 1.5)) and torch.equal(t, MODEL(x).detach())


def test_labels_are_asked_for_where_they_are_missing() -> None:
    with pytest.raises(MethodError, match="does not know what its inputs show"):
        trained(dataclasses.replace(QUICK, classes=1.0))


def rates(recipe: Recipe) -> list[float]:
    return [module_under_test._factor(step / 100, recipe) for step in range(101)]


def test_rates_rise_and_fall_as_told() -> None:
    cycle, cosine = (rates(Recipe(falling=kind)) for kind in ("one-cycle", "cosine"))
    assert cycle[0] == 0.04 and max(cycle) == cycle[30] == 1.0 and cycle[100] == pytest.approx(0.0, abs=1e-12)
    assert cosine[0] == 1.0 and cosine[50] == pytest.approx(0.5) and cosine == sorted(cosine, reverse=True)
    steps = rates(Recipe(falling="steps", milestones=(0.5, 0.75)))
    assert (steps[49], steps[50], steps[74], steps[75]) == pytest.approx((1.0, 0.1, 0.1, 0.01))


class Failing:
    """A source whose inputs are no numbers from some batch on."""

    def __init__(self, fail_at: int, error: Callable[[Tensor], Tensor]) -> None:
        self.source, self.left, self.error = Prior("mix", TASK, torch.Generator().manual_seed(0)), fail_at, error

    def sample(self, n: int) -> Batch:
        self.left -= 1
        inputs = self.source.sample(n).inputs
        return Batch(self.error(inputs) if self.left < 0 else inputs)

    def update(self, student: nn.Module) -> dict[str, Tensor]:
        return {}


def kill(inputs: Tensor) -> Tensor:
    raise Killed


def test_what_is_no_number_is_named_and_the_last_good_state_is_kept() -> None:
    recipe = dataclasses.replace(QUICK, average=0.0, falling="steps", milestones=())
    student, ctx = untrained(), Ctx.create(0)
    with pytest.raises(MethodError, match="distill: the mse is nan at step 4: lower the learning rate"):
        distill(MODEL, student, TASK, Failing(4, lambda x: x * math.nan), STEPS, ctx, recipe)
    expected = untrained()
    distill(MODEL, expected, TASK, Failing(99, lambda x: x), 3, Ctx.create(0), recipe)
    assert same(student, expected)


def test_a_gradient_that_is_no_number_is_named_before_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_under_test, "mse", lambda t, s: (s - s.detach()).square().sum().sqrt())
    student = untrained()
    with pytest.raises(MethodError, match="the gradient of the student is nan at step 1"):
        distill(MODEL, student, TASK, labelled(), STEPS, Ctx.create(0), QUICK)
    assert same(student, trained(steps=0, source=labelled()))


@pytest.mark.parametrize("learns", (False, True))
def test_killed_it_resumes_to_the_same_bits(learns: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_STEPS", 3)
    recipe = dataclasses.replace(QUICK, average=0.9, classes=1.0 if learns else 0.0, mixup=0.0 if learns else 0.5)

    def run(folder: Path | None, kill_at: int | None = None) -> tuple[nn.Module, Tensor]:
        ctx = dataclasses.replace(Ctx.create(0), folder=folder)
        source: Source = Prior("mix", TASK, ctx.generator)
        if learns:
            source = Conditional(MODEL, TASK, ctx, Generation(batch=8, widths=(8, 8), milestones=(4,)))
        update, update_of, calls = source.update, type(source).update, 0

        def counted(student: nn.Module) -> object:
            nonlocal calls
            if calls == kill_at:
                raise Killed
            calls += 1
            return update(student)

        monkeypatch.setattr(type(source), "update", lambda self, student: counted(student))
        try:
            student = trained(recipe, ctx=ctx, source=source)
        finally:
            monkeypatch.setattr(type(source), "update", update_of)
        return student, source.sample(4).inputs

    expected, inputs = run(None)
    with pytest.raises(Killed):
        run(tmp_path, 5)
    student, again = run(tmp_path, STEPS - 3)  # and not one more
    assert same(student, expected) and torch.equal(again, inputs)


def test_time_stops_it_and_the_rates_keep_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1, 10_000))
    monkeypatch.setattr(loop.time, "monotonic", lambda: next(clock) / 4)
    notes: list[Event] = []
    student, ctx = untrained(), Ctx.create(0, on_event=lambda event: notes.append(event) if event.name == "note" else None)
    lost = distill(MODEL, student, TASK, labelled(), 1000, ctx, dataclasses.replace(QUICK, max_seconds=10.0))
    assert 3 < len(lost) < 20
    assert [each.message for each in notes] == [f"distill: stopped after {len(lost)} of 1000 steps, when its 10 s were over"]
    assert not same(student, trained(steps=0, source=labelled()))
    assert distill(MODEL, student, TASK, labelled(), 5, ctx, dataclasses.replace(QUICK, max_seconds=0.0)) == []
    assert notes[-1].message == "distill: stopped after 0 of 5 steps, when its 0 s were over"


def test_the_setting_of_ranges_counts_and_a_budget_that_is_too_small_still_gives_a_student(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(loop.time, "monotonic", lambda: now)

    def slow(inputs: Tensor) -> Tensor:
        nonlocal now
        now += 3.0
        return inputs

    student = untrained()
    recipe = dataclasses.replace(QUICK, max_seconds=5.0, range_batches=2)
    assert distill(MODEL, student, TASK, Failing(0, slow), 9, Ctx.create(0), recipe) == []
    assert all(each.ready for each in quantizers(student).values())
    with torch.no_grad():
        assert torch.isfinite(student(TASK.noise(2, torch.Generator().manual_seed(0)))).all()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
def test_compiled_networks_teach_and_learn_the_same() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).eval()
    torch._dynamo.utils.counters.clear()
    students = []
    for backend in (None, "aot_eager"):
        ctx, student = Ctx.create(0), untrained(model=model)
        distill(model, student, TASK, Prior("mix", TASK, ctx.generator), 2, ctx, dataclasses.replace(QUICK, compile=backend))
        students.append(student)
    assert torch._dynamo.utils.counters["frames"]["ok"] >= 2, "the teacher and the student"
    assert same(*students), "not to the last bit"
    assert [name for name, _ in students[1].named_modules()] == [name for name, _ in students[0].named_modules()]
