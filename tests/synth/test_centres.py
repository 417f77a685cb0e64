"""Centres are those of deep norms and of classes that are recognised, and cost nothing to those who are there."""

import functools

import pytest
import torch
from torch import Tensor, nn

from datafree.context import Ctx
from datafree.synth.centres import Centred, Centres, centre_gap, centres_of, each_input
from datafree.synth.generator import Conditional, Recipe
from datafree.synth.noise import Pixels
from datafree.synth.noise import Recipe as Painting
from datafree.synth.source import Batch
from datafree.synth.terms import Moments, by_depth, first_deep, norm_moments, stored_moments
from datafree.zoo.digits import digits
from networks import build

MODEL, TASK = digits()


@functools.cache
def drawn() -> Batch:
    """A picture of each class, in an order by chance."""
    return Pixels(MODEL, TASK, Ctx.create(0), Painting(steps=30, rate=0.1, classes=1.0, batch=10)).sample(10)


def seen_of(inputs: Tensor) -> dict[str, list[Moments]]:
    with torch.no_grad(), norm_moments(MODEL) as seen:
        MODEL(inputs)
    return seen


@pytest.mark.parametrize(("layers", "first"), ((1, 0), (2, 0), (5, 1), (15, 6), (20, 8), (21, 9)))
def test_deep_layers_begin_where_they_are_told_to(layers: int, first: int) -> None:
    assert first_deep(layers) == first
    weight = by_depth(layers, 0.0, 1.0)
    assert not weight[:first].any() and weight[first:].all()


def test_shallow_norms_have_no_centre() -> None:
    names = list(stored_moments(MODEL))
    centres, seen = centres_of(MODEL, TASK, drawn()), seen_of(drawn().inputs)
    assert set(centres.moments) == set(list(seen)[first_deep(len(names)) :]) and len(centres.moments) < len(names)
    assert all(mean.shape == var.shape == (10, MODEL.get_submodule(name).num_features) for name, (mean, var) in centres.moments.items())


def test_inputs_that_are_the_picture_of_their_class_cost_nothing() -> None:
    batch = drawn()
    assert batch.labels is not None
    centres = centres_of(MODEL, TASK, batch)
    assert centres.known.all()
    two = torch.tensor([3, 3, 7, 3])
    inputs = batch.inputs[batch.labels.argsort()[two]]
    assert float(centre_gap(seen_of(inputs), two, centres)) < 1e-9
    assert float(centre_gap(seen_of(inputs), torch.tensor([3, 3, 3, 3]), centres)) > 1e-3
    assert float(centre_gap(seen_of(inputs), two, centres.distorted(torch.Generator().manual_seed(0)))) > 0.1


def test_the_gap_of_a_class_is_that_of_its_inputs_together() -> None:
    inputs, labels = TASK.noise(6, torch.Generator().manual_seed(0)), torch.tensor([1, 0, 1, 1, 0, 2])
    centres = centres_of(MODEL, TASK, drawn())
    known = torch.ones(10, dtype=torch.bool)
    known[2] = False
    inside: dict[str, Tensor] = {}
    handles = [
        MODEL.get_submodule(name).register_forward_pre_hook(lambda m, a, name=name: inside.update({name: a[0]})) for name in centres.moments
    ]
    with torch.no_grad():
        MODEL(inputs)
    for handle in handles:
        handle.remove()
    total = 0.0
    for name, (mean, var) in centres.moments.items():
        for label in (0, 1):
            x = inside[name][labels == label].transpose(0, 1).flatten(1).double()
            gap = (x.mean(1) - mean[label]).square().mean() + (x.var(1, correction=0) - var[label]).square().mean()
            total += float(gap) / 2 / len(centres.moments)
    assert float(centre_gap(seen_of(inputs), labels, Centres(centres.moments, known))) == pytest.approx(total, rel=1e-3)


def test_distortion_is_drawn_anew_and_as_wide_as_told() -> None:
    centres, generator = centres_of(MODEL, TASK, drawn()), torch.Generator().manual_seed(0)
    one, other = centres.distorted(generator), centres.distorted(generator)
    name = list(centres.moments)[-1]
    moved = [after - before for after, before in zip(one.moments[name], centres.moments[name], strict=True)]
    assert float(moved[0].std()) == pytest.approx(0.5, rel=0.1) and float(moved[1].std()) == pytest.approx(1.0, rel=0.1)
    assert not torch.equal(one.moments[name][0], other.moments[name][0])


def test_a_class_whose_picture_is_not_recognised_costs_nothing() -> None:
    batch = drawn()
    assert batch.labels is not None
    swapped = torch.where(batch.labels == 4, 5, torch.where(batch.labels == 5, 4, batch.labels))
    centres = centres_of(MODEL, TASK, Batch(batch.inputs, swapped))
    assert centres.known.tolist() == [each not in (4, 5) for each in range(10)]
    inputs = TASK.noise(4, torch.Generator().manual_seed(0))
    assert float(centre_gap(seen_of(inputs), torch.tensor([4, 5, 5, 4]), centres)) == 0
    assert torch.equal(
        centre_gap(seen_of(inputs), torch.tensor([4, 1, 5, 1]), centres),
        centre_gap(seen_of(inputs[1::2]), torch.tensor([1, 1]), centres),
    )


def test_many_classes_pass_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = centres_of(MODEL, TASK, drawn())
    monkeypatch.setattr("datafree.synth.centres._PART", 3)  # the last of them alone
    parts = centres_of(MODEL, TASK, drawn())
    assert torch.equal(whole.known, parts.known) and whole.moments.keys() == parts.moments.keys()
    for name, moments in whole.moments.items():
        torch.testing.assert_close(parts.moments[name], moments)


def test_norms_without_positions_or_called_twice() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6)).eval()
    with torch.no_grad(), norm_moments(flat) as seen:
        flat(torch.ones(3, 64))
    assert each_input(seen, 3) == {}
    model, task = build("twice")
    with torch.no_grad(), norm_moments(model) as seen:
        model(task.noise(3, torch.Generator().manual_seed(0)))
    assert [len(calls) for calls in seen.values()].count(2) and all(mean.shape[0] == 3 for mean, _ in each_input(seen, 3).values())


def test_a_generator_comes_nearer_to_the_centres() -> None:
    centres = centres_of(MODEL, TASK, drawn())
    found = {}
    for centre in (0.0, 20.0):
        ctx = Ctx.create(0)
        objective = Centred(centres, ctx.generator, statistics=0.4, centre=centre, distorted=0.0)
        source = Conditional(MODEL, TASK, ctx, Recipe(batch=32, widths=(16, 8), rate=5e-3, objective=objective))
        source.learn(25, nn.Identity())
        batch = source.sample(64)
        assert batch.labels is not None
        found[centre] = float(centre_gap(seen_of(batch.inputs), batch.labels, centres))
    assert found[20.0] < 0.9 * found[0.0]


def test_weights_of_zero_leave_terms_out() -> None:
    centres, ctx = centres_of(MODEL, TASK, drawn()), Ctx.create(0)
    for centre, distorted, names in ((0.1, 0.1, {"centre", "distorted centre"}), (0.1, 0.0, {"centre"}), (0.0, 0.0, set())):
        objective = Centred(centres, ctx.generator, 0.4, centre, distorted)
        source = Conditional(MODEL, TASK, ctx, Recipe(batch=8, widths=(8, 8), objective=objective))
        assert set(source.update(nn.Identity())) == {"cross-entropy", "bn_statistics", *names}
