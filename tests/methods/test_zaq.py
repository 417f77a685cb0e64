"""ZAQ on the embedded digits: its generator's loss, settings, what training brings, and whose turn it is."""

import functools

import pytest
import torch
from torch import Tensor, nn

import datafree
from datafree import Target
from datafree.closed.regress import divergence
from datafree.context import Ctx
from datafree.errors import MethodError
from datafree.method import Method
from datafree.methods.zaq import Apart
from datafree.synth.generator import Conditional, Look, Recipe
from datafree.synth.prior import pictures
from datafree.tune import distill as training
from datafree.tune import taught
from datafree.tune.features import captured, find_ends, relations
from datafree.zoo.digits import digits
from networks import build, same

MODEL, TASK = digits()
TARGET = Target(3, 3, protocol="paper")
QUICK = {"steps": 6, "batch": 8, "range_batches": 1}


def method(**fields: object) -> Method:
    return datafree.methods()["zaq"](**QUICK | fields)


@functools.cache
def quantized(**fields: object) -> nn.Module:
    return method(**fields).run(MODEL, TASK, TARGET, Ctx.create(0))


def damaged() -> nn.Module:
    student = digits()[0]
    with torch.no_grad():
        for each in student.parameters():
            each.mul_(0.9)
    return student


def test_the_generators_loss_is_what_the_student_is_taught_by_turned_round() -> None:
    student, inputs, ends = damaged(), TASK.noise(4, torch.Generator().manual_seed(0)), find_ends(MODEL, TASK, Ctx.create(0))
    with captured(MODEL, ends) as maps, captured(student, ends) as own:
        t, s = MODEL(inputs), student(inputs)
    terms = Apart(MODEL, TASK, ends, relation=2.0, activity=0.1)(Look(inputs, torch.zeros(4), t, []), student)
    torch.testing.assert_close(terms["distance"], -(t - s).abs().mean())
    expected = sum(relations(maps[name][0], own[name][0]).item() for name in ends)
    assert len(ends) == 6 and terms["relations"].item() == pytest.approx(-2 * expected, rel=1e-5)
    torch.testing.assert_close(terms["activity"], -0.1 * maps["stages.2.1.bn2"][0].abs().mean())


def test_a_step_of_the_generator_leaves_network_and_student_and_takes_them_apart() -> None:
    student, ends = damaged().requires_grad_(), find_ends(MODEL, TASK, Ctx.create(0))
    loss = Apart(MODEL, TASK, ends, relation=1.0, activity=0.1)
    source = Conditional(MODEL, TASK, Ctx.create(0), Recipe(batch=16, widths=(16, 16), form="unconditional", objective=loss, rate=5e-3))
    before = {name: each.clone() for name, each in student.state_dict().items()}
    losses = [sum(term.item() for term in source.update(student).values()) for _ in range(20)]
    assert sum(losses[-5:]) < 1.2 * sum(losses[:5]) < 0
    assert all(torch.equal(each, before[name]) for name, each in student.state_dict().items())
    assert all(each.grad is None for each in (*student.parameters(), *MODEL.parameters()))


def test_a_network_without_maps_differs_by_its_logits() -> None:
    model, task = build("transformer")
    terms = Apart(model, task, (), 1.0, 0.1)(Look(torch.zeros(2, *task.shape), torch.zeros(2), torch.zeros(2, 5), []), model)
    assert list(terms) == ["distance"]


def test_training_comes_nearer_to_the_network_on_pictures_it_has_not_seen() -> None:
    target = Target(2, 2, protocol="paper")
    before, after = (method(steps=steps, batch=16).run(MODEL, TASK, target, Ctx.create(0)) for steps in (0, 25))
    unseen = pictures("mix", 64, TASK, torch.Generator().manual_seed(9))
    assert divergence(MODEL, after, TASK, unseen) < 0.9 * divergence(MODEL, before, TASK, unseen)


@pytest.mark.parametrize("fields", ({"relation": 0.1}, {"activity": 10.0}, {"act_range": "extremes"}, {"warm_up": 1}), ids=str)
def test_every_choice_changes_the_student(fields: dict[str, object]) -> None:
    assert not same(quantized(), quantized(**fields))


def test_the_paper_budget_is_the_published_setting_as_coded(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[object] = []
    monkeypatch.setattr(
        taught.Taught, "generated", lambda self, teacher, task, setting, recipe, ctx: found.append((setting.warm_up, recipe))
    )
    monkeypatch.setattr(taught.Taught, "teach", lambda self, *args: found.extend(args[-2:]))
    datafree.methods()["zaq"](budget="paper").run(MODEL, TASK, TARGET, Ctx.create(0))
    (warm_up, generation), steps, recipe = found  # type: ignore[misc]
    assert isinstance(generation, Recipe) and isinstance(recipe, training.Recipe)
    assert (warm_up, steps, recipe.each) == (0, 90000, 5)
    assert (generation.latent, generation.widths, generation.milestones, generation.batch) == (256, (128, 64), (6000, 12000), 256)
    assert (recipe.rate, recipe.weight_decay, recipe.distance, recipe.act_range, recipe.classes) == (0.1, 5e-4, "l1", "extremes", 0)
    assert (recipe.features, recipe.feature_weight, recipe.milestones) == (relations, 1.0, (1 / 3, 2 / 3))


def test_inputs_have_no_classes_to_be_taught() -> None:
    with pytest.raises(MethodError, match="does not know what its inputs show"):
        quantized(cross_entropy=1.0)


def test_the_generator_takes_a_step_in_five(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    call = Apart.__call__
    monkeypatch.setattr(Apart, "__call__", lambda self, look, student: seen.append(look.inputs) or call(self, look, student))
    method().run(MODEL, TASK, TARGET, Ctx.create(0))
    assert len(seen) == 2
