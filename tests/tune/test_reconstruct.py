"""Unit after unit a student comes nearer to its teacher, on its grids, and to the same bits after a kill."""

import dataclasses
import functools
import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from datafree import fit as loop
from datafree.bits.allocate import make_plan
from datafree.closed.regress import divergence
from datafree.context import Ctx, Event
from datafree.errors import MethodError
from datafree.graph.blocks import Unit
from datafree.graph.flow import Layer, read
from datafree.graph.taps import entering
from datafree.plan import QSpec, Target
from datafree.quant.freeze import materialise
from datafree.quant.insert import codes_of, insert, latent_weight, quantized_layers, quantizers, weight_quantizer
from datafree.quant.observe import observe
from datafree.synth.prior import pictures
from datafree.task import Task
from datafree.tune.reconstruct import Recipe, reconstruct
from networks import build, same

QUICK = Recipe(steps=4, batch=8, rate=0.1, scale_rate=1e-3, range_rate=1e-3, rounding=0.1)


def spec(layer: Layer, bits: int) -> QSpec:
    return QSpec(bits, symmetric=False, axis=layer.out_axis)


def inputs(task: Task, n: int = 24) -> Tensor:
    return pictures("mix", n, task, torch.Generator().manual_seed(5))


def untrained(model: nn.Module, task: Task, bits: int = 3) -> nn.Module:
    ctx = Ctx.create(0)
    student = insert(model, make_plan(read(model, task, ctx), model, Target(bits, bits, protocol="paper"), spec, ctx)).requires_grad_(False)
    observe(student, [inputs(task)], "minmax", task.run)
    return student


def trained(recipe: Recipe = QUICK, network: str = "cifar_resnet", ctx: Ctx | None = None) -> nn.Module:
    model, task = build(network)
    student, ctx = untrained(model, task), ctx or Ctx.create(0)
    reconstruct(model, student, read(model, task, ctx), task, inputs(task), ctx, recipe)
    return student


@functools.cache
def plain() -> nn.Module:
    return trained()


def test_a_student_comes_nearer_to_its_teacher_on_inputs_it_has_not_seen() -> None:
    model, task = build("cifar_resnet")
    student, unseen = untrained(model, task, bits=2), pictures("mix", 64, task, torch.Generator().manual_seed(9))
    before = divergence(model, student, task, unseen)
    recipe = Recipe(steps=20, batch=16, rate=0.2, scale_rate=1e-3, range_rate=1e-2, rounding=0.01)
    losses = reconstruct(model, student, read(model, task, Ctx.create(0)), task, inputs(task, 48), Ctx.create(0), recipe)
    assert [len(each) for each in losses.values()] == [20] * 5
    assert divergence(model, student, task, unseen) < 0.6 * before


def test_codes_move_by_one_at_most_and_all_else_stays() -> None:
    model, task = build("cifar_resnet")
    before, after = untrained(model, task), trained(dataclasses.replace(QUICK, steps=12, rate=0.5))
    moved = torch.cat(
        [(codes_of(layer) - codes_of(before.get_submodule(name))).flatten() for name, layer in quantized_layers(after).items()]
    )
    assert moved.abs().max() == 1 and 0.02 < (moved != 0).float().mean() < 0.7
    learned = {"scale", "original"}
    for name, tensor in before.state_dict().items():
        stays = torch.equal(tensor, after.state_dict()[name])
        assert stays == (name.rpartition(".")[2] not in learned), name


def test_what_is_left_is_an_ordinary_student() -> None:
    model, task = build("cifar_resnet")
    student, x = plain(), inputs(task)
    kinds, before = ({name: type(each).__name__ for name, each in of.named_modules()} for of in (student, untrained(model, task)))
    assert kinds == before
    assert torch.equal(student(x), materialise(student)(x)) and not student(x).requires_grad
    for layer in quantized_layers(student).values():
        assert torch.equal(latent_weight(layer), layer.weight)


def test_without_joint_scales_the_weight_scales_stay() -> None:
    before, after = untrained(*build("cifar_resnet")), trained(dataclasses.replace(QUICK, joint_scale=False))
    for name, layer in quantized_layers(after).items():
        assert torch.equal(weight_quantizer(layer).scale, weight_quantizer(before.get_submodule(name)).scale)
    assert any(not torch.equal(quantizer.scale, quantizers(before)[point].scale) for point, quantizer in quantizers(after).items())


@pytest.mark.parametrize("drop", (0.0, 1.0, 0.5))
def test_a_unit_is_shown_what_the_student_makes_or_the_teacher_or_a_mixture(drop: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = build("cifar_resnet")
    student, shown = untrained(model, task), []
    run, x = Unit.run, inputs(task, 8)
    ready = {each: entering(of, "layer1.1", [x], task.run).inputs for each, of in (("student", student), ("teacher", model))}

    def look(self: Unit, of: nn.Module, given: Tensor, *args: object) -> Tensor:
        if of is student and self.modules == ("layer1.1",):
            shown.append(given.clone())
        return run(self, of, given, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Unit, "run", look)
    still = Recipe(steps=1, batch=8, rate=0, scale_rate=0, range_rate=0, drop=drop)  # rounds to nearest again: the student stays
    reconstruct(model, student, read(model, task, Ctx.create(0)), task, x, Ctx.create(0), still)
    order = [int(((ready["student"] - each) * (ready["teacher"] - each)).abs().flatten(1).sum(1).argmin()) for each in shown[0]]
    assert sorted(order) == list(range(8))
    from_student, from_teacher = (shown[0] == ready[each][order] for each in ("student", "teacher"))
    assert (from_student | from_teacher).all() and not torch.equal(ready["student"], ready["teacher"])
    differs = ready["student"][order] != ready["teacher"][order]
    assert from_teacher[differs].float().mean() == pytest.approx(drop, abs=0.05 if 0 < drop < 1 else 0)


@pytest.mark.parametrize(
    "change",
    (
        {"steps": 5}, {"batch": 7}, {"rate": 0.3}, {"scale_rate": 2e-3}, {"range_rate": 2e-3}, {"rounding": 10.0}, {"warm_up": 0.9},
        {"drop": 0.0}, {"joint_scale": False},
    ),
    ids=str,
)  # fmt: skip
def test_every_choice_matters(change: dict[str, object]) -> None:
    assert not same(trained(dataclasses.replace(QUICK, **change)), plain())


def test_layers_that_are_called_twice_stay_and_are_noted() -> None:
    notes: list[str] = []
    ctx = Ctx.create(0, on_event=lambda event: notes.append(event.message) if event.name == "note" else None)
    after, before = trained(network="twice", ctx=ctx), untrained(*build("twice"))
    assert torch.equal(codes_of(after.conv), codes_of(before.conv)) and torch.equal(
        weight_quantizer(after.conv).scale, weight_quantizer(before.conv).scale
    )
    assert notes == ["layers that several parts of the network call stay as they were rounded: conv"]


def test_ranges_have_to_be_set() -> None:
    model, task = build("cifar_resnet")
    ctx = Ctx.create(0)
    flow = read(model, task, ctx)
    student = insert(model, make_plan(flow, model, Target(3, 3, protocol="paper"), spec, ctx))
    with pytest.raises(MethodError, match="are unset: observe activations first"):
        reconstruct(model, student, flow, task, inputs(task), ctx, QUICK)


def test_what_is_no_number_is_named_and_the_student_is_whole() -> None:
    model, task = build("cifar_resnet")
    student, ctx = untrained(model, task), Ctx.create(0)
    with pytest.raises(MethodError, match="reconstruct, unit 1 of 5: the error is nan at step 1"):
        reconstruct(model, student, read(model, task, ctx), task, inputs(task) * math.nan, ctx, QUICK)
    assert same(student, untrained(model, task))


class Killed(Exception):
    """Stands for the end of the process."""


def test_killed_it_resumes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_STEPS", 2)

    def kill(event: Event) -> None:
        if event.name == "reconstruct, unit 3 of 5" and event.step == 3:
            raise Killed

    with pytest.raises(Killed):
        trained(ctx=dataclasses.replace(Ctx.create(0, on_event=kill), folder=tmp_path))
    events: list[Event] = []
    again = trained(ctx=dataclasses.replace(Ctx.create(0, on_event=events.append), folder=tmp_path))
    assert same(again, plain())
    assert [each.message.split(":")[1] for each in events if each.name == "note"] == [f" resumed at step {n} of 4" for n in (4, 4, 2)]


def test_time_is_shared_by_the_units_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(loop.time, "monotonic", lambda: next(ticks) / 10)
    notes: list[str] = []
    ctx = Ctx.create(0, on_event=lambda event: notes.append(event.message) if event.name == "note" else None)
    model, task = build("cifar_resnet")
    recipe = dataclasses.replace(QUICK, steps=1000, max_seconds=20.0)
    losses = reconstruct(model, untrained(model, task), read(model, task, ctx), task, inputs(task), ctx, recipe)
    taken = [len(each) for each in losses.values()]
    assert 2 < min(taken) and max(taken) - min(taken) < 8 and next(ticks) / 10 < 22
    assert notes == [f"reconstruct: 5 of 5 units stopped after {min(taken)} to {max(taken)} of 1000 steps, to keep within 20 s"]
