"""What methods with a pool share: settings, parts of the pool, time, resuming."""

import dataclasses
import importlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import datafree
from datafree import Event, Target
from datafree import fit as loop
from datafree.closed.regress import divergence
from datafree.context import Ctx
from datafree.method import Method
from datafree.synth.noise import Recipe as Painting
from datafree.synth.prior import pictures
from datafree.tune import pooled as module_under_test
from datafree.tune import taught
from datafree.tune.distill import Recipe
from datafree.zoo.digits import digits
from networks import same

MODEL, TASK = digits()
TARGET = Target(3, 3, protocol="paper")
QUICK = {"pictures": 16, "picture_steps": 3, "steps": 4, "batch": 8, "range_batches": 1}
NAMES = ("intraq", "hast")


def method(name: str, **fields: object) -> Method:
    return datafree.methods()[name](**QUICK | fields)


def settings(name: str, large: bool = False, **fields: object) -> tuple[Painting, Recipe]:
    """The recipes of pictures and student, taken where the method hands them on."""
    chosen, found = datafree.methods()[name](**fields), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module(f"datafree.methods.{name}"), "is_large", lambda task: large)
        patch.setattr(taught, "is_large", lambda task: large)
        patch.setattr(module_under_test.Pooled, "pooled", lambda self, teacher, task, setting, recipe, *rest, **named: found.append(recipe))
        patch.setattr(taught.Trained, "teach", lambda self, *args: found.append(args[-1]))
        chosen.run(MODEL, TASK, TARGET, Ctx.create(0))
    return found[0], found[1]


@pytest.mark.parametrize("name", NAMES)
def test_training_comes_nearer_to_the_network_on_pictures_it_has_not_seen(name: str) -> None:
    fields, target = {"batch": 16, "picture_steps": 5, "pictures": 32, "range_batches": 2}, Target(2, 2, protocol="paper")
    before, after = (method(name, **fields | {"steps": steps}).run(MODEL, TASK, target, Ctx.create(0)) for steps in (0, 20))
    unseen = pictures("mix", 64, TASK, torch.Generator().manual_seed(9))
    assert divergence(MODEL, after, TASK, unseen) < 0.9 * divergence(MODEL, before, TASK, unseen)


FIELDS = (
    ("intraq", {"certainty": 0.5}), ("intraq", {"nearest": 0.9}), ("intraq", {"farthest": 0.0}), ("intraq", {"reinforce": 0.0}),
    ("intraq", {"cross_entropy": 1.0}), ("intraq", {"augment": False}), ("intraq", {"pictures": 17}), ("intraq", {"picture_steps": 2}),
    ("hast", {"class_weight": 1.0}), ("hast", {"focus": 0.0}), ("hast", {"perturb": 0.0}), ("hast", {"features": 0.0}),
    ("hast", {"temperature": 4.0}), ("hast", {"budget": "paper"}),
)  # fmt: skip


@pytest.fixture(scope="module")
def plain() -> dict[str, nn.Module]:
    return {name: quantized(name) for name in NAMES}


def quantized(name: str, **fields: object) -> nn.Module:
    """Two batches of pictures, so that the later ones of a class have earlier ones."""
    with pytest.MonkeyPatch.context() as patch:
        painting = module_under_test.Pooled.painting
        patch.setattr(module_under_test.Pooled, "painting", lambda self, setting: dataclasses.replace(painting(self, setting), batch=10))
        return method(name, **fields).run(MODEL, TASK, TARGET, Ctx.create(0))


@pytest.mark.parametrize(("name", "fields"), FIELDS, ids=str)
def test_every_choice_changes_the_student(name: str, fields: dict[str, object], plain: dict[str, nn.Module]) -> None:
    assert not same(plain[name], quantized(name, **fields))


@pytest.mark.parametrize("name", NAMES)
def test_the_paper_budget_is_the_published_setting(name: str) -> None:
    painting, recipe = settings(name, budget="paper")
    assert (painting.steps, painting.rate, painting.patience, painting.batch, painting.lowest_rate) == (1000, 0.5, 50, 256, 1e-4)
    assert (painting.per_image, painting.spread, painting.share, painting.views) == (False, "variance", "layer", 0.5)
    assert (recipe.batch, recipe.weight, recipe.temperature, recipe.distance) == (256, 20, 20, "kl")
    assert (recipe.act_range, recipe.gradient, recipe.clip, recipe.average, recipe.flip, recipe.crop) == (
        "moving",
        "identity",
        None,
        0,
        True,
        0.5,
    )
    assert [round(each * 151) for each in recipe.milestones] == [20, 40, 60] and recipe.falling == "steps"
    if name == "intraq":
        assert (painting.certainty, painting.margin, painting.classes, recipe.classes, recipe.rate) == (0.95, (0.05, 0.8), 0, 1, 1e-4)
        assert (painting.flip, painting.crop) == (True, 0.5)
    else:
        assert (painting.classes, painting.focus, recipe.classes, recipe.rate) == (10, 2, 0, 1e-5)
        assert (recipe.perturb, recipe.feature_weight, painting.flip) == (0.01, 1000, False)


def test_large_pictures_and_many_classes_have_settings_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        painting, recipe = settings(name, large=True, budget="paper")
        assert (recipe.batch, recipe.rate) == (16, 1e-6) and painting.flip
        monkeypatch.setattr(importlib.import_module(f"datafree.methods.{name}"), "count_classes", lambda *args: 100)
    assert (settings("hast", budget="paper")[1].feature_weight, settings("hast", budget="paper")[1].perturb) == (2000, 0.02)
    assert settings("hast", large=True, budget="paper")[0].focus == 0.5
    assert settings("intraq")[0].margin == (0.02, 1.0) and settings("intraq", large=True)[0].margin == (0.0, 2.0)


def test_features_keep_their_weight_beside_the_distance_in_every_budget() -> None:
    paper, fast = (settings("hast", budget=budget)[1] for budget in ("paper", "fast"))
    assert paper.feature_weight / paper.weight == fast.feature_weight / fast.weight == 50


@pytest.mark.parametrize(("pictures", "hold_out"), ((3, 0), (9, 5), (20, 0)))
def test_a_step_takes_no_more_than_the_pool_holds_and_the_pool_is_shown(pictures: int, hold_out: int) -> None:
    result = datafree.quantize(MODEL, TASK, method=method("intraq", pictures=pictures, hold_out=hold_out), target=TARGET)
    assert result.pictures is not None and result.pictures.shape == (pictures, *TASK.shape)


def test_the_time_is_kept_and_told() -> None:
    run = datafree.quantize(
        MODEL, TASK, method=method("intraq", budget="standard", max_seconds=1.0, steps=5000, picture_steps=500), target=TARGET
    ).run
    assert isinstance(run["seconds"], float) and run["seconds"] < 10
    notes = run["notes"]
    assert isinstance(notes, list) and [note.split(":")[0] for note in notes] == ["pictures", "distill"]


def test_killed_among_the_pictures_it_resumes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(Exception):
        """Stands for the end of the process."""

    monkeypatch.setattr(loop, "CHECKPOINT_STEPS", 1)

    def kill(event: Event) -> None:
        if (event.name, event.step) == ("pictures, batch 1 of 1", 2):
            raise Killed

    def students(folder: Path | None) -> dict[str, Tensor]:
        return datafree.quantize(MODEL, TASK, method=method("hast"), target=TARGET, folder=folder).student.state_dict()

    with pytest.raises(Killed):
        datafree.quantize(MODEL, TASK, method=method("hast"), target=TARGET, folder=tmp_path, on_event=kill)
    expected, again = students(None), students(tmp_path)
    assert all(torch.equal(each, expected[name]) for name, each in again.items())
