"""Qimera on the embedded digits: published settings, what each field changes, and what training brings."""

import functools

import pytest
import torch
from torch import nn

import datafree
from datafree import Event, Target
from datafree.closed.regress import divergence
from datafree.context import Ctx
from datafree.method import Method
from datafree.methods import qimera as module_under_test
from datafree.synth.generator import Recipe
from datafree.synth.labels import Superposed
from datafree.synth.prior import pictures
from datafree.task import Task
from datafree.tune import taught
from datafree.tune.distill import Recipe as Distillation
from datafree.zoo.digits import digits
from networks import Scripted, build, same

MODEL, TASK = digits()
TARGET = Target(3, 3, protocol="paper")


def method(**fields: object) -> Method:
    return datafree.methods()["qimera"](**{"warm_up": 2, "steps": 2, "batch": 4, "range_batches": 1} | fields)


@functools.cache
def quantized(**fields: object) -> nn.Module:
    return method(**fields).run(MODEL, TASK, TARGET, Ctx.create(0))


def settings(model: nn.Module = MODEL, task: Task = TASK, **fields: object) -> tuple[Recipe, Distillation, list[Event]]:
    """The recipes of generator and student, taken where the method hands them on, and the notes."""
    found: list[object] = []
    notes: list[Event] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(taught.Taught, "generated", lambda self, teacher, task, setting, recipe, ctx: found.append(recipe))
        patch.setattr(taught.Taught, "teach", lambda self, *args: found.append(args[-1]))
        datafree.methods()["qimera"](**fields).run(model, task, TARGET, Ctx.create(0, on_event=notes.append))
    generation, recipe = found
    assert isinstance(generation, Recipe) and isinstance(recipe, Distillation)
    return generation, recipe, notes


def test_training_comes_nearer_to_the_network_on_pictures_it_has_not_seen() -> None:
    fields, target = {"warm_up": 10, "batch": 16, "superposed": 0.5}, Target(2, 2, protocol="paper")
    before, after = (method(steps=steps, **fields).run(MODEL, TASK, target, Ctx.create(0)) for steps in (0, 25))
    unseen = pictures("mix", 64, TASK, torch.Generator().manual_seed(9))
    assert divergence(MODEL, after, TASK, unseen) < 0.9 * divergence(MODEL, before, TASK, unseen)


@pytest.mark.parametrize(
    "fields",
    ({"superposed": 0.0}, {"superposed": 1.0}, {"embedding": "classifier"}, {"mapping": False}, {"statistics": 1.0}, {"temperature": 1.0}),
    ids=str,
)
def test_every_choice_changes_the_student(fields: dict[str, object]) -> None:
    assert not same(quantized(superposed=0.5), quantized(**{"superposed": 0.5} | fields))


def test_the_number_of_slots_changes_the_student_where_any_are_superposed() -> None:
    assert not same(quantized(superposed=1.0), quantized(superposed=1.0, slots=5))
    assert same(quantized(superposed=0.0), quantized(superposed=0.0, slots=5))


def test_the_published_setting() -> None:
    generation, recipe, notes = settings(budget="paper")
    assert generation.policy == Superposed(0.4, 2) and not notes
    assert generation.objective == module_under_test.Convincing(classes=1.0, statistics=0.1)
    assert (recipe.distance, recipe.temperature, recipe.classes, recipe.weight, recipe.rate) == ("kl", 20, 1, 0.1, 1e-4)
    added = generation.added
    assert added is not None and (added.width, added.start, added.mapped, added.divided) == (MODEL.fc.in_features, None, True, False)


@pytest.mark.parametrize(("classes", "slots"), ((10, 2), (100, 10), (1000, 100)))
def test_slots_are_as_published_for_so_many_classes(classes: int, slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_under_test, "count_classes", lambda *args: classes)
    assert settings()[0].policy == Superposed(0.4, slots)
    assert settings(slots=3)[0].policy == Superposed(0.4, 3)


def test_as_coded() -> None:
    added = settings(mapping=False, gains="mean")[0].added
    assert added is not None and (added.mapped, added.divided) == (False, True)


def test_embeddings_start_as_the_weights_of_the_last_layer() -> None:
    added = settings(embedding="classifier")[0].added
    assert added is not None and added.start is not None and torch.equal(added.start, MODEL.fc.weight)
    model, task = build("grouped")  # whose last layer is a convolution
    added = settings(model, task, embedding="classifier")[0].added
    assert added is not None and added.start is not None and torch.equal(added.start, model.head.weight[:, :, 0, 0])


def test_where_no_layer_tells_the_classes_apart_a_note_says_so() -> None:
    model = Scripted(lambda self, x: self.conv(x).flatten(1)[:, :10], conv=nn.Conv2d(TASK.shape[0], 4, 3)).eval()
    generation, _, notes = settings(model, embedding="classifier")
    assert generation.added is not None and generation.added.width == 100 and generation.added.start is None
    assert ["start at random" in each.message for each in notes] == [True]
