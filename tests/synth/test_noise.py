"""Pixels come to the stored statistics, each option changes them, and a kill in the middle does not."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from datafree import fit as loop
from datafree.context import Ctx, Event
from datafree.errors import NetworkError
from datafree.synth.noise import Pixels, Recipe, augmented, source_of
from datafree.synth.prior import pictures
from datafree.synth.terms import entering
from datafree.zoo.digits import digits
from networks import NAMES, build

QUICK = Recipe(steps=4, batch=8)


def draw(recipe: Recipe, n: int = 8, ctx: Ctx | None = None) -> Tensor:
    return Pixels(*digits(), ctx or Ctx.create(0), recipe).sample(n).inputs


def test_the_statistics_are_approached_and_the_smoothed_loss_falls_all_the_way() -> None:
    source = Pixels(*digits(), Ctx.create(0), Recipe(steps=100, batch=8, rate=0.1))
    source.sample(8)
    (losses,) = source.losses
    smoothed = [sum(losses[i : i + 20]) for i in range(0, 100, 20)]
    assert all(after < before for before, after in zip(smoothed, smoothed[1:], strict=False))
    assert losses[-1] < 0.2 * losses[0]


def test_batches_make_the_sample_and_the_network_stays() -> None:
    model, task = digits()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    events: list[Event] = []
    source = Pixels(model, task, Ctx.create(0, on_event=events.append), QUICK)
    batch = source.sample(18)
    assert batch.inputs.shape == (18, *task.shape) and batch.labels is None and not batch.inputs.requires_grad
    assert [len(each) for each in source.losses] == [4, 4, 4] and source.update(nn.Identity()) == {}
    assert list(dict.fromkeys(each.name for each in events)) == [f"pictures, batch {i} of 3" for i in (1, 2, 3)]
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert all(each.grad is None for each in model.parameters()) and not any(each._forward_pre_hooks for each in model.modules())


def test_the_seed_decides() -> None:
    assert torch.equal(draw(QUICK), draw(QUICK))
    assert not torch.equal(draw(QUICK), draw(QUICK, ctx=Ctx.create(1)))


@pytest.mark.parametrize("network", [name for name in NAMES if name not in ("without_norm", "transformer")])
def test_every_network_with_batch_norms_has_pictures(network: str) -> None:
    model, task = build(network)
    inputs = Pixels(model, task, Ctx.create(0), Recipe(steps=3, batch=4, flip=True, roll=1, crop=0.5)).sample(5).inputs
    assert inputs.shape == (5, *task.shape) and torch.isfinite(inputs).all()


def test_pictures_of_classes_are_taken_for_them() -> None:
    model, task = digits()
    batch = Pixels(model, task, Ctx.create(0), Recipe(steps=60, rate=0.1, classes=1.0, batch=40)).sample(40)
    assert batch.labels is not None and batch.labels.bincount().tolist() == [4] * 10
    with torch.no_grad():
        assert (model(batch.inputs).argmax(1) == batch.labels).float().mean() > 0.9


def test_pictures_of_classes_need_a_classifier() -> None:
    model, task = digits()
    with pytest.raises(NetworkError, match="leave the classes out"):
        Pixels(nn.Sequential(*model.children())[:3], task, Ctx.create(0), Recipe(classes=1.0)).sample(2)


@pytest.mark.parametrize(
    "fields",
    (
        {"start": "gaussian"}, {"start": "mix"}, {"per_image": False}, {"spread": "variance"}, {"share": "layer"}, {"slack": 50.0},
        {"layers": "turns"}, {"layers": "depth"}, {"classes": 1.0}, {"entropy": 1.0}, {"prior": 0.1}, {"flip": True}, {"roll": 2},
        {"crop": 0.6}, {"rate": 0.1}, {"falling": "cosine"}, {"classes": 1.0, "focus": 2.0}, {"certainty": 0.9}, {"texture": 0.1},
    ),
    ids=str,
)  # fmt: skip
def test_every_option_tells(fields: dict[str, object]) -> None:
    assert not torch.equal(draw(QUICK), draw(dataclasses.replace(QUICK, **fields)))


def test_certainties_are_one_or_drawn_for_the_whole_batch() -> None:
    source = Pixels(*digits(), Ctx.create(0), dataclasses.replace(QUICK, certainty=0.8))
    wanted = source._wanted(torch.arange(400) % 10, None, None).certainty
    assert wanted is not None and wanted.min() >= 0.8 and 0.4 < (wanted == 1).float().mean() < 0.6
    assert wanted[wanted < 1].mean() == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize(("margin", "low", "high"), ((None, 0.05, 0.15), ((0.3, 1.0), 0.25, 0.4), ((0.0, 0.01), 0.0, 0.04)), ids=str)
def test_pictures_keep_within_the_margin_of_the_earlier_ones_of_their_class(
    margin: tuple[float, float] | None, low: float, high: float
) -> None:
    model, task = digits()
    recipe = Recipe(steps=25, rate=0.2, classes=0.1, batch=10, margin=margin, per_image=False, start="mix")
    source, features = Pixels(model, task, Ctx.create(0), recipe), []
    for batch in (source.sample(10), source.sample(10)):
        assert batch.labels is not None
        with torch.no_grad(), entering(model, "fc") as seen:
            model(batch.inputs[batch.labels.argsort()])
        features += seen
    assert low < float(1 - torch.cosine_similarity(*features, dim=1).mean()) < high


def test_views_by_chance() -> None:
    source = Pixels(*digits(), Ctx.create(0), dataclasses.replace(QUICK, flip=True, crop=0.5, views=0.5))
    pixels = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert 0 < sum(source._view(pixels) is pixels for _ in range(20)) < 20


def test_time_is_shared_by_the_batches_of_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100_000))
    monkeypatch.setattr(loop.time, "monotonic", lambda: next(clock) / 4)
    events: list[Event] = []
    source = Pixels(*digits(), Ctx.create(0, on_event=events.append), Recipe(steps=500, batch=4, max_seconds=20.0))
    assert torch.isfinite(source.sample(12).inputs).all()
    taken = [len(each) for each in source.losses]
    assert max(taken) < 2 * min(taken) and max(taken) < 200
    assert events[-1].message == f"pictures: stopped after {sum(taken)} of 1500 steps, when their 20 s were over"


def test_a_network_without_batch_norms_has_pictures_for_its_classes() -> None:
    model, task = build("without_norm")
    events: list[Event] = []
    batch = Pixels(model, task, Ctx.create(0, on_event=events.append), Recipe(steps=30, rate=0.1, classes=1.0, batch=10)).sample(10)
    assert batch.labels is not None and "for their classes alone" in events[0].message
    with torch.no_grad():
        assert (model(batch.inputs).argmax(1) == batch.labels).float().mean() > 0.9


def test_slack_lets_gaps_be() -> None:
    """With all that Gaussian inputs bring about allowed, Gaussian inputs cost next to nothing."""
    losses = []
    for slack in (None, 50.0, 100.0):
        source = Pixels(*digits(), Ctx.create(0), dataclasses.replace(QUICK, start="gaussian", slack=slack))
        source.sample(8)
        losses.append(source.losses[0][0])
    assert losses[0] > losses[1] > losses[2] and losses[2] < 0.01 * losses[0]


def test_killed_in_the_middle_the_sample_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_STEPS", 3)
    recipe = Recipe(steps=8, batch=4, flip=True, roll=1, crop=0.7, classes=1.0)
    expected = draw(recipe, 12)
    steps = 0

    def kill(event: Event) -> None:
        nonlocal steps
        if (steps := steps + 1) == 8 + 5:  # in the second batch of three
            raise InterruptedError

    def ctx(**fields: object) -> Ctx:
        return dataclasses.replace(Ctx.create(0), folder=tmp_path, **fields)

    with pytest.raises(InterruptedError):
        draw(recipe, 12, ctx(on_event=kill))
    assert torch.equal(draw(recipe, 12, ctx()), expected)


def test_what_the_network_is_shown_keeps_its_size_and_its_pixels() -> None:
    x = torch.randn(6, 3, 8, 10, generator=torch.Generator().manual_seed(0))

    def shown(**fields: object) -> Tensor:
        return augmented(x, Recipe(**fields), torch.Generator().manual_seed(1))

    assert torch.equal(shown(), x)
    flipped = shown(flip=True)
    turned = [bool(torch.equal(one, other.flip(-1))) for one, other in zip(flipped, x, strict=True)]
    assert 0 < sum(turned) < 6 and all(t or torch.equal(one, other) for t, one, other in zip(turned, flipped, x, strict=True))
    rolled = shown(roll=3)
    assert not torch.equal(rolled, x) and torch.equal(rolled.flatten().sort()[0], x.flatten().sort()[0])
    cropped = shown(crop=0.5)
    assert cropped.shape == x.shape and cropped.amax() <= x.amax() and not torch.equal(cropped, x)
    assert torch.equal(augmented(x[:, :, 0, 0], Recipe(flip=True, roll=1, crop=0.5), torch.Generator()), x[:, :, 0, 0])


def test_names_of_pictures_lead_to_their_source() -> None:
    model, task = digits()
    assert torch.equal(source_of("pink", model, task, Ctx.create(0)).sample(4).inputs, pictures("pink", 4, task, Ctx.create(0).generator))
    assert torch.equal(source_of("distilled", model, task, Ctx.create(0), QUICK).sample(8).inputs, draw(QUICK))


@pytest.mark.parametrize("name", ["without_norm", "transformer"])
def test_without_batch_norms_procedural_pictures_take_their_place_and_a_note_says_so(name: str) -> None:
    model, task = build(name)
    events: list[Event] = []
    found = source_of("distilled", model, task, Ctx.create(0, on_event=events.append)).sample(6).inputs
    assert torch.equal(found, pictures("mix", 6, task, Ctx.create(0).generator))
    assert [(each.name, "procedural pictures take their place" in each.message) for each in events] == [("note", True)]
    with pytest.raises(NetworkError, match="take a Prior instead"):
        Pixels(model, task, Ctx.create(0))


def test_no_pictures_are_refused() -> None:
    with pytest.raises(NetworkError, match="at least 1"):
        draw(QUICK, 0)
