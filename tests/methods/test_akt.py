"""AKT on the embedded digits: its hosts, what it adds to them, settings, and what training brings."""

import functools
from typing import get_args

import pytest
import torch
from torch import nn

import datafree
from datafree import Target
from datafree.closed.regress import divergence
from datafree.context import Ctx, Event
from datafree.errors import MethodError
from datafree.method import Method
from datafree.methods import adadfq, akt
from datafree.synth.generator import Recipe
from datafree.synth.prior import pictures
from datafree.tune import distill as training
from datafree.tune import taught
from datafree.tune.features import refined
from datafree.zoo.digits import digits
from networks import build, same

MODEL, TASK = digits()
TARGET = Target(3, 3, protocol="paper")
QUICK = {"budget": "smoke", "steps": 2, "batch": 8, "range_batches": 1}
POOLED = ("hast", "intraq")


def method(name: str = "akt", **fields: object) -> Method:
    generated = {} if {name, fields.get("host")} & {*POOLED} else {"warm_up": 2}
    return datafree.methods()[name](**QUICK | generated | fields)


@functools.cache
def quantized(name: str = "akt", **fields: object) -> nn.Module:
    return method(name, **fields).run(MODEL, TASK, TARGET, Ctx.create(0))


def settings(large: bool = False, **fields: object) -> tuple[Recipe, training.Recipe, int]:
    """The recipes of generator and student, taken where the method hands them on, and the steps of the student."""
    chosen, found = datafree.methods()["akt"](**fields), []
    with pytest.MonkeyPatch.context() as patch:
        for module in (adadfq, akt, taught):
            patch.setattr(module, "is_large", lambda task: large)
        patch.setattr(taught.Taught, "generated", lambda self, teacher, task, setting, recipe, ctx: found.append(recipe))
        patch.setattr(taught.Taught, "teach", lambda self, *args: found.extend(args[-2:]))
        chosen.run(MODEL, TASK, TARGET, Ctx.create(0))
    return found[0], found[2], found[1]


@pytest.mark.parametrize("host", get_args(akt.Host))
def test_the_host_alone_is_the_host_and_maps_change_its_student(host: str) -> None:
    alone = quantized(host)
    assert same(quantized(host=host, refined=False), alone) and not same(quantized(host=host), alone)


def test_a_host_that_compares_maps_itself_goes_on_doing_so() -> None:
    (recipe, own) = (settings(host="zaq")[1], datafree.methods()["zaq"]().lesson(MODEL, TASK, TARGET, Ctx.create(0))[2])
    t, s = torch.randn(2, 4, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    assert own.features is not None and recipe.features is not None
    torch.testing.assert_close(
        recipe.feature_weight * recipe.features(t, s), own.feature_weight * own.features(t, s) + 1000 * 200 * refined(t, s)
    )


def test_a_host_without_a_generator_is_told_nothing_about_one() -> None:
    with pytest.raises(MethodError, match="the host hast has no generator, so no warm_up: leave it out"):
        quantized(host="hast", warm_up=3)


@pytest.mark.parametrize("fields", ({"refined_weight": 1.0}, {"refined_temperature": 1.0}, {"host": "gdfq"}), ids=str)
def test_every_choice_changes_the_student(fields: dict[str, object]) -> None:
    assert not same(quantized(), quantized(**fields))


def test_the_paper_budget_is_the_published_setting_as_coded() -> None:
    generation, recipe, steps = settings(budget="paper")
    assert (generation.batch, generation.milestones, steps) == (200, (20000,), 40000 - 800)
    assert (recipe.batch, recipe.rate, recipe.distance, recipe.temperature) == (200, 1e-4, "adaptability", 20)
    assert recipe.features is not None and recipe.feature_weight == 1000 * 200
    for fields, expected in (({"large": True}, 16), ({"host": "gdfq"}, 200)):
        assert settings(budget="paper", **fields)[1].batch == expected
    assert settings(budget="paper", host="gdfq")[1].distance == "kl"
    assert settings(refined=False)[1].features is None


def test_training_comes_nearer_to_the_network_on_pictures_it_has_not_seen() -> None:
    fields, target = {"warm_up": 5, "batch": 16}, Target(2, 2, protocol="paper")
    before, after = (method(steps=steps, **fields).run(MODEL, TASK, target, Ctx.create(0)) for steps in (0, 20))
    unseen = pictures("mix", 64, TASK, torch.Generator().manual_seed(9))
    assert divergence(MODEL, after, TASK, unseen) < 0.9 * divergence(MODEL, before, TASK, unseen)


def test_without_maps_the_host_is_left_and_a_note_says_so() -> None:
    model, task = build("transformer")
    notes: list[Event] = []
    student = method().run(model, task, TARGET, Ctx.create(0, on_event=notes.append))
    assert same(student, method("adadfq").run(model, task, TARGET, Ctx.create(0)))
    assert any("learns from its answers alone" in each.message for each in notes)
