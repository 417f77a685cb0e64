"""The TexQ-style method on the embedded digits: what training brings, its switches, settings, time, resuming."""

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
from datafree.method import Method
from datafree.synth import noise
from datafree.synth.noise import Recipe as Painting
from datafree.synth.prior import pictures
from datafree.tune import taught
from datafree.tune.distill import Recipe
from datafree.zoo.digits import digits
from networks import same

MODEL, TASK = digits()
TARGET = Target(3, 3, protocol="paper")
QUICK = {"warm_up": 4, "steps": 4, "picture_steps": 8, "batch": 8, "range_batches": 1}


def method(**fields: object) -> Method:
    return datafree.methods()["texq"](**QUICK | fields)


@functools.cache
def quantized(**fields: object) -> nn.Module:
    return method(**fields).run(MODEL, TASK, TARGET, Ctx.create(0))


def settings(**fields: object) -> tuple[Painting, Recipe]:
    """The recipes of the pictures and of the student, taken where the method hands them on."""
    found: list[Painting] = []
    lessons: list[Recipe] = []

    class Taken(Exception):
        """Stands for all that would follow."""

    def take(self: noise.Pixels, n: int) -> None:
        found.append(self.recipe)
        raise Taken

    def teach(self: taught.Trained, *args: object) -> None:
        lessons.append(args[-1])
        args[4](MODEL, None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(taught.Trained, "teach", teach)
        patch.setattr(noise.Pixels, "sample", take)
        with pytest.raises(Taken):
            datafree.methods()["texq"](**fields).run(MODEL, TASK, TARGET, Ctx.create(0))
    return found[0], lessons[0]


def test_training_comes_nearer_to_the_network_on_pictures_it_has_not_seen() -> None:
    fields, target = {"warm_up": 10, "batch": 16}, Target(2, 2, protocol="paper")
    before, after = (method(steps=steps, **fields).run(MODEL, TASK, target, Ctx.create(0)) for steps in (0, 20))
    unseen = pictures("mix", 64, TASK, torch.Generator().manual_seed(9))
    assert divergence(MODEL, after, TASK, unseen) < 0.9 * divergence(MODEL, before, TASK, unseen)


@pytest.mark.parametrize(
    "fields",
    ({"texture": 0.0}, {"layered": False}, {"centre": 0.0}, {"distorted": 0.0}, {"mixup": 1.0}, {"statistics": 1.0}, {"picture_steps": 7}),
    ids=str,
)
def test_every_switch_changes_the_student(fields: dict[str, object]) -> None:
    assert not same(quantized(), quantized(**fields))


def test_the_paper_budget_is_the_setting_that_is_told() -> None:
    painting, recipe = settings(budget="paper")
    assert (painting.steps, painting.rate, painting.patience, painting.lowest_rate) == (1500, 0.5, 50, 0.05)
    assert (painting.classes, painting.layers, painting.texture, painting.per_image) == (5, "depth", 0.1, True)
    assert (recipe.weight, recipe.temperature, recipe.classes, recipe.mixup, recipe.mixed_classes) == (20, 20, 1, 0.5, False)
    painting, recipe = settings(budget="fast", layered=False)
    assert (painting.steps, painting.layers, recipe.mixup) == (150, "flat", 0)


def test_classes_that_are_not_recognised_are_told() -> None:
    notes: list[str] = []
    ctx = Ctx.create(0, on_event=lambda event: notes.append(event.message) if event.name == "note" else None)
    method(picture_steps=1, steps=0).run(MODEL, TASK, TARGET, ctx)
    assert len(notes) == 1 and "of 10 classes" in notes[0]


def test_the_time_is_kept_and_told() -> None:
    chosen = datafree.methods()["texq"](budget="standard", max_seconds=1.5, batch=8, generator="light")
    run = datafree.quantize(MODEL, TASK, method=chosen, target=TARGET).run
    assert isinstance(run["seconds"], float) and run["seconds"] < 10
    notes = run["notes"]
    assert isinstance(notes, list) and [note.split(":")[0] for note in notes if "stopped" in note] == ["pictures", "generator", "distill"]


@pytest.mark.parametrize("stage", ("pictures, batch 1 of 1", "distill"))
def test_killed_in_any_stage_it_resumes_to_the_same_bits(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(Exception):
        """Stands for the end of the process."""

    monkeypatch.setattr(loop, "CHECKPOINT_STEPS", 2)

    def kill(event: Event) -> None:
        if (event.name, event.step) == (stage, 3):
            raise Killed

    with pytest.raises(Killed):
        datafree.quantize(MODEL, TASK, method=method(), target=TARGET, folder=tmp_path, on_event=kill)
    again = datafree.quantize(MODEL, TASK, method=method(), target=TARGET, folder=tmp_path)
    assert same(again.student, quantized())
