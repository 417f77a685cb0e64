"""GENIE on tiny networks: settings, starts, what learning brings, time and notes."""

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from torch import nn

import datafree
from datafree import Target
from datafree.closed.regress import divergence
from datafree.context import Ctx
from datafree.method import Method, find_method
from datafree.methods import genie as module_under_test
from datafree.methods.genie import Genie, setting_of
from datafree.quant.insert import codes_of, quantized_layers, quantizers, weight_quantizer
from datafree.quant.ranges import mse
from datafree.synth.prior import pictures
from datafree.synth.source import Prior, Source
from datafree.tune.reconstruct import Recipe
from networks import build, same

TARGET = Target(3, 3, protocol="paper")
QUICK = {"pictures": 12, "picture_steps": 3, "picture_batch": 8, "steps": 3, "batch": 8, "budget": "smoke"}


def method(**fields: object) -> Method:
    return find_method("genie")(**QUICK | fields)


@functools.cache
def quantized(target: Target = TARGET, **fields: object) -> nn.Module:
    return method(**fields).run(*build("cifar_resnet"), target, Ctx.create(0))


def test_learning_comes_nearer_to_the_network_on_pictures_it_has_not_seen() -> None:
    model, task = build("cifar_resnet")
    fields = {"family": "mix", "pictures": 48, "rate": 0.2, "scale_rate": 1e-3, "range_rate": 1e-2, "rounding": 0.01, "batch": 16}
    before, after = (method(**fields | {"steps": n}).run(model, task, Target(2, 2, protocol="paper"), Ctx.create(0)) for n in (0, 15))
    unseen = pictures("mix", 64, task, torch.Generator().manual_seed(9))
    assert divergence(model, after, task, unseen) < 0.7 * divergence(model, before, task, unseen)


def test_it_starts_at_nearest_codes_in_ranges_of_exponent_2_4() -> None:
    model, _ = build("cifar_resnet")
    student = quantized(steps=0)
    for name, layer in quantized_layers(student).items():
        quantizer = weight_quantizer(layer)
        scale, zero = mse(model.get_submodule(name).weight, quantizer.spec, exponent=2.4)
        assert not quantizer.spec.symmetric and torch.equal(quantizer.scale, scale) and torch.equal(quantizer.zero, zero)
    assert quantizers(student) and all(quantizer.ready for quantizer in quantizers(student).values())


def test_or_at_the_codes_of_anchor_with_its_ranges_and_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[nn.Module] = []
    anchor, (model, task) = find_method("anchor"), build("cifar_resnet")
    run = anchor.run

    def look(*args: object) -> nn.Module:
        made.append(run(anchor(statistics="moments", own_inputs=False), *args[1:]))
        return copy.deepcopy(made[-1])

    monkeypatch.setattr(anchor, "run", look)
    still, after = (method(start="anchor", family="white", rate=0.3, steps=n).run(model, task, TARGET, Ctx.create(0)) for n in (0, 6))
    assert same(still, made[0]) and same(made[0], made[1]) and not same(after, made[1])
    assert torch.equal(after.bn1.running_mean, made[1].bn1.running_mean)
    for name, layer in quantized_layers(after).items():
        assert (codes_of(layer) - codes_of(made[1].get_submodule(name))).abs().max() <= 1


def handed(**fields: object) -> tuple[object, ...]:
    """What the method hands to the source of pictures and to reconstruction."""
    found: list[object] = []
    model, task = build("cifar_resnet")

    def source(name: str) -> Callable[..., Source]:
        return lambda *args: found.append((name, args[-1])) or Prior("white", task, args[-2].generator)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module_under_test, "latent_source", source("latent"))
        patch.setattr(module_under_test, "source_of", lambda family, *args: source(family)(*args))
        patch.setattr(module_under_test.Genie, "_started", lambda self, *args: found.append((self.start, len(args[-2]))))
        patch.setattr(module_under_test, "reconstruct", lambda *args: found.append(args[-1]))
        method(**fields).run(model, task, TARGET, Ctx.create(0))
    return tuple(found)


@pytest.mark.parametrize(
    "fields",
    (
        {"budget": "paper"}, {"family": "distilled"}, {"family": "pink"}, {"start": "anchor"}, {"pictures": 10}, {"picture_steps": 4},
        {"picture_batch": 6}, {"swing": False}, {"steps": 4}, {"batch": 7}, {"rate": 0.5}, {"scale_rate": 0.01}, {"range_rate": 0.01},
        {"rounding": 9.0}, {"drop": 0.0}, {"joint_scale": False}, {"max_seconds": 9.0},
    ),
    ids=str,
)  # fmt: skip
def test_every_choice_is_handed_on(fields: dict[str, object]) -> None:
    assert handed(**fields) != handed()


def test_the_paper_budget_is_the_published_setting() -> None:
    setting, recipe = setting_of("paper"), Recipe()
    assert (setting.pictures, setting.picture_steps, setting.picture_batch) == (1024, 4000, 128)
    assert (setting.steps, setting.rate, setting.scale_rate, setting.range_rate) == (20000, 1e-3, 1e-4, 4e-5)
    assert (recipe.batch, recipe.warm_up, recipe.drop, recipe.joint_scale, setting.rounding) == (32, 0.2, 0.5, True, 1.0)
    method = Genie()
    assert (method.batch, method.drop, method.joint_scale) == (recipe.batch, recipe.drop, recipe.joint_scale)
    assert all(getattr(setting, name) == getattr(recipe, name) for name in ("steps", "rate", "scale_rate", "range_rate", "rounding"))


def test_budgets_rise_and_a_field_that_is_given_wins() -> None:
    settings = [setting_of(budget) for budget in ("smoke", "fast", "standard", "paper")]
    for name in ("pictures", "picture_steps", "steps"):
        values = [getattr(each, name) for each in settings]
        assert values == sorted(values)
    assert method(rate=7.0)._setting().rate == 7.0 and method(rate=0)._setting().rate == 0


def test_the_time_is_kept_and_told() -> None:
    chosen = find_method("genie")(budget="paper", pictures=16, picture_batch=8, max_seconds=2.0)
    run = datafree.quantize(*build("cifar_resnet"), method=chosen, target=TARGET).run
    assert isinstance(run["seconds"], float) and run["seconds"] < 12
    notes = run["notes"]
    assert isinstance(notes, list) and [note.split(":")[0] for note in notes] == ["pictures", "reconstruct"]


@pytest.mark.parametrize("family", ("latent", "pink"))
def test_pictures_are_shown_to_whoever_keeps_them(family: str) -> None:
    shown = datafree.quantize(*build("cifar_resnet"), method=method(family=family), target=TARGET).pictures
    assert shown is not None and shown.shape == (12, 3, 16, 16)


def test_a_network_without_batch_norms_gets_procedural_pictures_and_a_note() -> None:
    notes = datafree.quantize(*build("without_norm"), method=method(), target=TARGET).run["notes"]
    assert isinstance(notes, list) and any("procedural pictures take their place" in note for note in notes)
