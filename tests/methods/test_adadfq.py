"""AdaDFQ and AdaSG on the embedded digits: bounds, loss, settings, what training brings, and what a step may touch."""

import dataclasses
import functools
import math

import pytest
import torch
from torch import Tensor, nn

import datafree
from datafree import Target
from datafree.closed.regress import divergence
from datafree.context import Ctx
from datafree.errors import MethodError
from datafree.method import Method
from datafree.methods import adadfq as module_under_test
from datafree.methods.adadfq import Adaptable, undecided
from datafree.quant.insert import quantizers
from datafree.synth.generator import Conditional, Look, Recipe
from datafree.synth.prior import pictures
from datafree.synth.terms import Gap
from datafree.tune import distill as training
from datafree.tune import taught
from datafree.zoo.digits import digits
from networks import build, same

MODEL, TASK = digits()
TARGET = Target(3, 3, protocol="paper")
QUICK = {"warm_up": 2, "steps": 2, "batch": 8, "range_batches": 1}
PLAIN = Adaptable(task=TASK, lower=0.1, upper=0.8, disagreement=0.2, agreement=0.1, statistics=1.0)


def method(**fields: object) -> Method:
    return datafree.methods()["adadfq"](**QUICK | fields)


@functools.cache
def quantized(**fields: object) -> nn.Module:
    return method(**fields).run(MODEL, TASK, TARGET, Ctx.create(0))


def settings(bits: int = 3, large: bool = False, **fields: object) -> tuple[Recipe, Adaptable, training.Recipe]:
    """What generator and student learn by, taken where the method hands it on."""
    chosen, found = datafree.methods()["adadfq"](**fields), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module_under_test, "is_large", lambda task: large)
        patch.setattr(taught, "is_large", lambda task: large)
        patch.setattr(taught.Taught, "generated", lambda self, teacher, task, setting, recipe, ctx: found.append(recipe))
        patch.setattr(taught.Taught, "teach", lambda self, *args: found.append(args[-1]))
        chosen.run(MODEL, TASK, Target(bits, bits, protocol="paper"), Ctx.create(0))
    return found[0], found[0].objective, found[1]


def softmax(row: list[float]) -> list[float]:
    parts = [math.exp(each) for each in row]
    return [each / sum(parts) for each in parts]


@pytest.mark.parametrize("n", (1, 3, 16))
def test_undecided_is_the_entropy_between_the_least_of_the_batch_and_that_of_all_classes(n: int) -> None:
    logits = 3 * torch.randn(n, 5, generator=torch.Generator().manual_seed(n))
    entropies = [-sum(p * math.log(p) for p in softmax(row)) for row in logits.double().tolist()]
    least = min(entropies)
    expected = [(each - least) / (math.log(5) - least) for each in entropies]
    found = undecided(logits)
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=1e-4)
    assert found.min() == 0.0 and found.max() <= 1.0


def test_undecided_of_logits_that_are_all_alike_is_a_number() -> None:
    assert bool(((undecided(torch.zeros(4, 5)) >= 0) & (undecided(torch.full((4, 5), 3.0)) <= 1)).all())


class Fixed(nn.Module):
    """A student with one answer, whatever it is shown."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor) -> Tensor:
        return self.answer


@pytest.mark.parametrize("n", (4, 7))
def test_the_loss_is_the_published_one_for_any_batch(n: int) -> None:
    generator = torch.Generator().manual_seed(0)
    t, s = (2 * torch.randn(n, 3, generator=generator) for _ in range(2))
    labels = torch.arange(n) % 3
    look = Look(torch.empty(n, *TASK.shape), labels, t, [Gap(torch.full((1, 2), 2.0), torch.full((1, 2), 1.0))])
    terms = dataclasses.replace(PLAIN, lower=0.4, upper=0.1)(look, Fixed(s))
    found = undecided(t - s).tolist()
    assert terms["lower bound"].item() == pytest.approx(sum(max(0.0, 0.4 - each) for each in found) / n, rel=1e-5)
    assert terms["upper bound"].item() == pytest.approx(sum(max(0.0, each - 0.1) for each in found) / n, rel=1e-5)
    assert terms["lower bound"] > 0 and terms["upper bound"] > 0
    for name, logits, weight in (("disagreement", t - s, 0.2), ("agreement", t + s, 0.1)):
        rows = logits.double().tolist()
        expected = -sum(math.log(softmax(row)[label]) for row, label in zip(rows, labels.tolist(), strict=True)) / n
        assert terms[name].item() == pytest.approx(weight * expected, rel=1e-5)
    assert terms["bn_statistics"].item() == pytest.approx(5.0)


def test_bounds_of_0_and_1_cost_nothing() -> None:
    t, s = (torch.randn(8, 5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    look = Look(torch.empty(8, *TASK.shape), torch.arange(8) % 5, t, [])
    terms = dataclasses.replace(PLAIN, lower=0.0, upper=1.0)(look, Fixed(s))
    assert terms["lower bound"] == terms["upper bound"] == 0.0 and "bn_statistics" not in terms


@pytest.mark.parametrize("ready", (False, True))
def test_a_step_of_the_generator_goes_through_the_student_which_stays(ready: bool) -> None:
    student = method(warm_up=0, steps=0).run(MODEL, TASK, TARGET, Ctx.create(0)).requires_grad_()
    if not ready:
        for each in quantizers(student).values():
            each.scale.fill_(math.nan)
    alone = dataclasses.replace(PLAIN, disagreement=0.0, agreement=0.0, statistics=0.0, lower=1.0, upper=1.0)
    source = Conditional(MODEL, TASK, Ctx.create(0), Recipe(batch=8, widths=(8, 8), objective=alone))
    look = source._look()
    (through,) = torch.autograd.grad(alone(dataclasses.replace(look, answer=look.answer.detach()), student)["lower bound"], [look.inputs])
    assert torch.isfinite(through).all() and bool(through.abs().max() > 0), "the student alone leads to the inputs"
    before = {name: each.clone() for name, each in student.state_dict().items()}
    generator = [each.detach().clone() for each in source.params]
    source.update(student)
    assert any(not torch.equal(each, old) for each, old in zip(source.params, generator, strict=True))
    assert all(torch.equal(each, before[name]) or bool(each.isnan().all()) for name, each in student.state_dict().items())
    assert all(each.grad is None for each in student.parameters())
    assert all(each.ready == ready and not each._forward_hooks for each in quantizers(student).values())


def test_training_comes_nearer_to_the_network_on_pictures_it_has_not_seen() -> None:
    fields, target = {"warm_up": 5, "batch": 16}, Target(2, 2, protocol="paper")
    before, after = (method(steps=steps, **fields).run(MODEL, TASK, target, Ctx.create(0)) for steps in (0, 20))
    unseen = pictures("mix", 64, TASK, torch.Generator().manual_seed(9))
    assert divergence(MODEL, after, TASK, unseen) < 0.9 * divergence(MODEL, before, TASK, unseen)


@pytest.mark.parametrize(
    "fields",
    (
        {"variant": "adasg"}, {"lower": 0.5}, {"upper": 0.1}, {"disagreement": 1.0}, {"agreement": 1.0},
        {"statistics": 0.1}, {"temperature": 1.0},
    ),
    ids=str,
)  # fmt: skip
def test_every_choice_changes_the_student(fields: dict[str, object]) -> None:
    assert not same(quantized(), quantized(**fields))


def test_the_paper_budget_is_the_published_setting_as_coded() -> None:
    generation, objective, recipe = settings(budget="paper")
    assert (generation.batch, generation.rate, generation.widths, generation.milestones) == (16, 1e-3, (128, 64), (20000, 40000, 60000))
    assert objective == PLAIN
    assert (recipe.batch, recipe.rate, recipe.distance, recipe.temperature, recipe.weight, recipe.classes) == (
        16,
        1e-4,
        "adaptability",
        20,
        1,
        0,
    )
    generation, objective, recipe = settings(large=True, budget="paper")
    assert (recipe.rate, recipe.temperature, generation.milestones) == (1e-5, 5, (70000,))


def test_bounds_and_weights_are_those_published_for_the_bits() -> None:
    found = {(bits, large): settings(bits, large)[1] for bits in (2, 3, 4, 5, 8) for large in (False, True)}
    assert all((each.lower, each.disagreement) == (0.1, 0.2) for (_, large), each in found.items() if not large)
    assert [(found[bits, True].lower, found[bits, True].disagreement) for bits in (2, 3, 4, 5, 8)] == [
        (0.1, 0.2), (0.1, 0.2), (0.3, 0.2), (0.3, 0.3), (0.3, 0.3),
    ]  # fmt: skip
    for bits, large in found:
        first = settings(bits, large, variant="adasg")[1]
        assert (first.lower, first.upper, first.disagreement, first.agreement) == (0.3, 0.8, 0.1, 0.1)
    given = settings(5, True, lower=0.0, upper=1.0, disagreement=0.0)[1]
    assert (given.lower, given.upper, given.disagreement) == (0.0, 1.0, 0.0)


def test_a_term_that_is_no_number_is_named() -> None:
    student = Fixed(torch.full((8, 10), math.nan))
    with pytest.raises(MethodError, match="generator: the lower bound is nan"):
        Conditional(MODEL, TASK, Ctx.create(0), Recipe(batch=8, widths=(8, 8), objective=PLAIN)).update(student)


def test_without_norms_there_are_no_statistics() -> None:
    model, task = build("without_norm")
    source = Conditional(model, task, Ctx.create(0), Recipe(batch=4, widths=(8, 8), objective=dataclasses.replace(PLAIN, task=task)))
    assert "bn_statistics" not in source.update(model)
