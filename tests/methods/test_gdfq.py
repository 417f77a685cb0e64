"""GDFQ on the embedded digits: settings, losses, what training brings, time, and resuming."""

import dataclasses
import functools
from pathlib import Path

import pytest
import torch
from torch import nn

import datafree
from datafree import Event, Target
from datafree import fit as loop
from datafree.closed.regress import divergence
from datafree.context import Ctx
from datafree.errors import NetworkError
from datafree.method import Method
from datafree.methods import gdfq as module_under_test
from datafree.quant.insert import latent_weight, quantized_layers, weight_quantizer
from datafree.quant.ranges import minmax
from datafree.synth.prior import pictures
from datafree.tune import distill as training
from datafree.tune import taught
from datafree.zoo.digits import digits
from networks import same

MODEL, TASK = digits()
TARGET = Target(3, 3, protocol="paper")
QUICK = {"warm_up": 4, "steps": 4, "batch": 8, "range_batches": 1}


def method(**fields: object) -> Method:
    return datafree.methods()["gdfq"](**QUICK | fields)


@functools.cache
def quantized(**fields: object) -> nn.Module:
    return method(**fields).run(MODEL, TASK, TARGET, Ctx.create(0))


def settings(large: bool = False, **fields: object) -> tuple[object, training.Recipe]:
    """The recipes of generator and student, taken where the method hands them on."""
    chosen, found = datafree.methods()["gdfq"](**fields), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module_under_test, "is_large", lambda task: large)
        patch.setattr(taught, "is_large", lambda task: large)
        patch.setattr(taught.Taught, "generated", lambda self, teacher, task, setting, recipe, ctx: found.append(recipe))
        patch.setattr(taught.Taught, "teach", lambda self, *args: found.append(args[-1]))
        chosen.run(MODEL, TASK, TARGET, Ctx.create(0))
    return found[0], found[1]


def test_training_comes_nearer_to_the_network_on_pictures_it_has_not_seen() -> None:
    fields, target = {"warm_up": 10, "batch": 16}, Target(2, 2, protocol="paper")
    before, after = (method(steps=steps, **fields).run(MODEL, TASK, target, Ctx.create(0)) for steps in (0, 25))
    unseen = pictures("mix", 64, TASK, torch.Generator().manual_seed(9))
    assert divergence(MODEL, after, TASK, unseen) < 0.9 * divergence(MODEL, before, TASK, unseen)


def test_weights_are_on_asymmetric_grids_of_each_output_channel_that_follow_them() -> None:
    for layer in quantized_layers(quantized()).values():
        quantizer = weight_quantizer(layer)
        assert quantizer.spec == dataclasses.replace(quantizer.spec, bits=3, symmetric=False, axis=0)
        assert torch.equal(quantizer.scale, minmax(latent_weight(layer), quantizer.spec)[0])


@pytest.mark.parametrize(
    "fields",
    (
        {"variant": "kmdfq"}, {"budget": "paper"}, {"warm_up": 5}, {"steps": 5}, {"batch": 9}, {"rate": 2e-3}, {"generator_rate": 1e-2},
        {"generator": "full"}, {"statistics": 1.0}, {"cross_entropy": 0.5}, {"weight": 3.0}, {"temperature": 1.0}, {"falling": "cosine"},
        {"act_range": "moving"}, {"percentile": 99.0}, {"range_batches": 2}, {"gradient": "identity"}, {"average": 0.9}, {"clip": 0.1},
    ),
    ids=str,
)  # fmt: skip
def test_every_choice_changes_the_student(fields: dict[str, object]) -> None:
    assert not same(quantized(), quantized(**fields))


def test_the_paper_budget_is_the_published_setting_as_coded() -> None:
    generation, recipe = settings(budget="paper")
    assert (generation.batch, generation.rate, generation.widths) == (200, 1e-3, (128, 64))  # type: ignore[attr-defined]
    assert generation.milestones == (20000, 40000, 60000) and generation.objective.statistics == 0.1  # type: ignore[attr-defined]
    assert (recipe.batch, recipe.rate, recipe.distance, recipe.temperature, recipe.weight, recipe.classes) == (200, 1e-4, "kl", 20, 0.1, 1)
    assert (recipe.act_range, recipe.range_batches, recipe.gradient) == ("moving", 20, "identity")
    assert (recipe.clip, recipe.average, recipe.weight_decay, recipe.falling) == (None, 0, 1e-4, "steps")
    steps = 80000 - 800
    assert [800 + round(each * steps) for each in recipe.milestones] == [20000, 40000, 60000]


def test_the_journal_and_large_pictures_have_settings_of_their_own() -> None:
    generation, recipe = settings(budget="paper", variant="kmdfq")
    assert (recipe.distance, recipe.weight, generation.objective.statistics) == ("mse", 1.0, 1.0)  # type: ignore[attr-defined]
    assert [(each.warm_up, each.steps) for each in map(taught.kmdfq_setting, (False, True))] == [(4000, 76000), (10000, 70000)]
    generation, recipe = settings(large=True, budget="paper", warm_up=7)
    assert (recipe.batch, recipe.rate) == (16, 1e-6) and generation.milestones[0] == round((80000 - 10000 + 7) / 4)  # type: ignore[attr-defined]
    assert settings(budget="fast", large=True)[1].batch < settings(budget="fast")[1].batch


def test_a_field_that_is_given_wins_over_the_budget() -> None:
    _, recipe = settings(budget="paper", rate=1.0, average=0.5, clip=2.0, gradient="masked")
    assert (recipe.rate, recipe.average, recipe.clip, recipe.gradient) == (1.0, 0.5, 2.0, "masked")


def test_the_time_is_kept_and_told() -> None:
    chosen = datafree.methods()["gdfq"](budget="standard", max_seconds=1.0, batch=8, generator="light")
    run = datafree.quantize(MODEL, TASK, method=chosen, target=TARGET).run
    assert isinstance(run["seconds"], float) and run["seconds"] < 10
    notes = run["notes"]
    assert isinstance(notes, list) and [note.split(":")[0] for note in notes] == ["generator", "distill"]
    assert all("stopped after" in note for note in notes)


def test_pictures_are_shown_to_whoever_keeps_them() -> None:
    shown = datafree.quantize(MODEL, TASK, method=method(), target=TARGET).pictures
    assert shown is not None and shown.shape == (64, *TASK.shape)


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("stage", ("generator", "distill"))
def test_killed_in_either_stage_it_resumes_to_the_same_bits(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_STEPS", 2)

    def kill(event: Event) -> None:
        if (event.name, event.step) == (stage, 3):
            raise Killed

    with pytest.raises(Killed):
        datafree.quantize(MODEL, TASK, method=method(), target=TARGET, folder=tmp_path, on_event=kill)
    events: list[Event] = []
    again = datafree.quantize(MODEL, TASK, method=method(), target=TARGET, folder=tmp_path, on_event=events.append)
    assert same(again.student, quantized())
    assert [each.message for each in events if each.name == "note"][-1] == f"{stage}: resumed at step 2 of 4"
    if stage == "distill":
        assert not any(each.name == "generator" for each in events), "it was warm already"


def test_a_network_without_logits_is_refused() -> None:
    with pytest.raises(NetworkError, match="take a method that knows none, such as anchor"):
        datafree.quantize(nn.Sequential(*MODEL.children())[:3].eval(), TASK, method=method(), target=TARGET)


def test_budgets_rise() -> None:
    published = taught.gdfq_setting(10, large=False)
    budgets = (module_under_test.Gdfq(budget=budget) for budget in ("smoke", "fast", "standard", "paper"))
    steps = [each.setting(published, TASK).steps for each in budgets]
    assert steps == sorted(steps)
