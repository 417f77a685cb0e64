"""ACQ-style on the embedded digits: its terms, what is left without them, and what training brings."""

import functools

import pytest
import torch
from torch import Tensor, nn

import datafree
from datafree import Event, Target
from datafree.closed.regress import divergence
from datafree.context import Ctx
from datafree.errors import MethodError
from datafree.method import Method
from datafree.synth.attention import attention, centre
from datafree.synth.generator import Conditional, Recipe
from datafree.synth.prior import pictures
from datafree.task import Task
from datafree.tune import taught
from datafree.tune.distill import Recipe as Distillation
from datafree.zoo.digits import digits
from networks import build, same

MODEL, TASK = digits()
TARGET = Target(3, 3, protocol="paper")
NOTHING = {"centre": 0.0, "pairs": 0.0, "consistency": 0.0}
QUICK = {"warm_up": 2, "steps": 2, "batch": 4, "range_batches": 1}


def method(name: str = "acq", **fields: object) -> Method:
    return datafree.methods()[name](**QUICK | fields)


@functools.cache
def quantized(name: str = "acq", network: str = "", **fields: object) -> nn.Module:
    model, task = build(network) if network else (MODEL, TASK)
    return method(name, **fields).run(model, task, TARGET, Ctx.create(0))


def settings(name: str = "acq", model: nn.Module = MODEL, task: Task = TASK, **fields: object) -> tuple[Recipe, Distillation, list[Event]]:
    """The recipes of generator and student, taken where the method hands them on, and the notes."""
    found: list[object] = []
    notes: list[Event] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(taught.Taught, "generated", lambda self, teacher, task, setting, recipe, ctx: found.append(recipe))
        patch.setattr(taught.Taught, "teach", lambda self, *args: found.append(args[-1]))
        datafree.methods()[name](**fields).run(model, task, TARGET, Ctx.create(0, on_event=notes.append))
    generation, recipe = found
    assert isinstance(generation, Recipe) and isinstance(recipe, Distillation)
    return generation, recipe, notes


def terms(network: str = "", **fields: object) -> dict[str, Tensor]:
    """Of one update of its generator."""
    model, task = build(network) if network else (MODEL, TASK)
    return dict(Conditional(model, task, Ctx.create(0), settings("acq", model, task, batch=8, **fields)[0]).update(model))


def test_training_comes_nearer_to_the_network_on_pictures_it_has_not_seen() -> None:
    fields, target = {"warm_up": 30, "batch": 16}, Target(2, 2, protocol="paper")
    before, after = (method(steps=steps, **fields).run(MODEL, TASK, target, Ctx.create(0)) for steps in (0, 25))
    unseen = pictures("mix", 64, TASK, torch.Generator().manual_seed(9))
    assert divergence(MODEL, after, TASK, unseen) < 0.9 * divergence(MODEL, before, TASK, unseen)


def test_the_generator_learns_to_place_the_attention() -> None:
    generation, _, _ = settings(batch=16, centre=300.0, pairs=0.0, consistency=0.0)
    source = Conditional(MODEL, TASK, Ctx.create(0), generation)

    def follows() -> float:
        """Correlation of where attention is and where it was wanted, on inputs of the generator as it stands."""
        looks = [source._look() for _ in range(10)]
        found = torch.cat([centre(attention(look.features.detach())) for look in looks if look.features is not None])
        wanted = torch.cat([look.blend.place for look in looks if look.blend is not None and look.blend.place is not None])
        return float(torch.corrcoef(torch.stack((found.flatten(), wanted.flatten())))[0, 1])

    before = follows()
    source.learn(40, MODEL)
    assert abs(before) < 0.2 < 0.25 < follows(), "320 numbers: chance is 0 +- 0.06"


@pytest.mark.parametrize("fields", ({"centre": 0.0}, {"pairs": 0.0}, {"consistency": 0.0}, {"statistics": 0.1}), ids=str)
def test_every_choice_changes_the_student(fields: dict[str, object]) -> None:
    assert not same(quantized(), quantized(**fields))


def test_with_all_three_terms_off_it_is_kmdfq() -> None:
    assert same(quantized(**NOTHING), quantized("gdfq", variant="kmdfq"))
    assert not same(quantized(), quantized("gdfq", variant="kmdfq"))
    own, journal = settings(budget="paper", **NOTHING), settings("gdfq", budget="paper", variant="kmdfq", temperature=1.0)
    assert own[:2] == journal[:2]


@pytest.mark.parametrize(
    ("field", "term"), (("centre", "attention_centre"), ("pairs", "pair_sameness"), ("consistency", "mode_consistency"))
)
def test_a_weight_of_0_leaves_its_term_out(field: str, term: str) -> None:
    every = terms()
    assert list(every) == ["cross-entropy", "bn_statistics", "attention_centre", "pair_sameness", "mode_consistency"]
    assert -0.1 <= every["pair_sameness"] < 0 < min(every["attention_centre"], every["mode_consistency"])
    assert every.keys() - terms(**{field: 0.0}).keys() == {term}
    alone = NOTHING | {field: 0.1}
    assert list(terms(**alone)) == ["cross-entropy", "bn_statistics", term]


@pytest.mark.parametrize("field", ("centre", "pairs", "consistency"))
def test_a_term_weighs_as_it_is_told_to(field: str) -> None:
    (once,), (twice,) = ([list(terms(**NOTHING | {field: weight}).values())[-1]] for weight in (0.1, 0.2))
    torch.testing.assert_close(twice, 2 * once)


def test_a_term_that_is_no_number_is_named() -> None:
    with pytest.raises(MethodError, match="generator: the pair_sameness is -inf at step 1"):
        terms(pairs=1e40)


def test_an_update_leaves_the_network_as_it_is() -> None:
    kept = {name: each.clone() for name, each in MODEL.state_dict().items()}
    terms()
    assert all(torch.equal(each, kept[name]) for name, each in MODEL.state_dict().items())
    assert not any(module.training for module in MODEL.modules())


def test_without_batch_norms_both_modes_are_one() -> None:
    assert list(terms("without_norm")) == ["cross-entropy", "attention_centre", "pair_sameness"]


def test_without_spatial_features_a_note_says_that_kmdfq_is_left() -> None:
    model, task = build("transformer")
    assert ["leaves KMDFQ" in each.message for each in settings("acq", model, task)[2]] == [True]
    assert same(quantized(network="transformer"), quantized("gdfq", network="transformer", variant="kmdfq"))
