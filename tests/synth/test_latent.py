"""Pictures from latents: a generator for every batch, both learning together, strided layers shown moved inputs."""

import dataclasses
import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from datafree import fit as loop
from datafree.context import Ctx, Event
from datafree.errors import NetworkError
from datafree.synth import latent as module_under_test
from datafree.synth.latent import Latent, Recipe, latent_source, swung
from datafree.synth.source import NONE, Prior
from datafree.synth.terms import gaps, norm_moments, statistics, stored_moments
from datafree.task import Task
from networks import build

QUICK = Recipe(steps=4, batch=8, widths=(8, 8), latent=16)


def made(recipe: Recipe = QUICK, n: int = 8, network: str = "cifar_resnet", ctx: Ctx | None = None) -> tuple[Tensor, Latent]:
    model, task = build(network)
    source = Latent(model, task, ctx or Ctx.create(0), recipe)
    return source.sample(n).inputs, source


@functools.cache
def plain() -> Tensor:
    return made()[0]


def distance(inputs: Tensor, network: str) -> float:
    """Of the statistics of a batch from the stored ones, nothing moved."""
    model, task = build(network)
    with norm_moments(model) as seen, torch.no_grad():
        task.run(model, inputs)
    return float(statistics(gaps(seen, stored_moments(model), per_image=False), "layer"))


@pytest.mark.parametrize("network", ("cifar_resnet", "sequence"))
def test_a_batch_comes_near_to_the_stored_statistics(network: str) -> None:
    recipe = dataclasses.replace(QUICK, batch=16)
    before, after = (distance(made(dataclasses.replace(recipe, steps=steps), 16, network)[0], network) for steps in (0, 40))
    assert after < 0.5 * before


def hooks(model: nn.Module) -> int:
    return sum(len(each._forward_pre_hooks) for each in model.modules())


def test_inputs_are_moved_while_a_batch_is_made_and_no_hook_stays() -> None:
    during: list[int] = []
    source: Latent

    def listen(event: Event) -> None:
        if event.name.startswith("pictures"):
            during.append(hooks(source.teacher))

    model, task = build("cifar_resnet")
    for swing in (True, False):
        source = Latent(model, task, Ctx.create(0, on_event=listen), dataclasses.replace(QUICK, steps=1, swing=swing))
        assert hooks(source.teacher) == 0
        source.sample(8)
        assert hooks(source.teacher) == hooks(model) == 0
    strided = sum(isinstance(each, nn.Conv2d) and max(each.stride) > 1 for each in model.modules())
    assert during[0] - during[1] == strided > 0


def test_latents_and_generators_learn_both() -> None:
    for still in ({"rate": 0.0}, {"generator_rate": 0.0}):
        _, source = made(dataclasses.replace(QUICK, steps=20, swing=False, **still))
        assert source.losses[0][-1] < source.losses[0][0]
    _, source = made(dataclasses.replace(QUICK, rate=0.0, generator_rate=0.0, swing=False))
    assert len(set(source.losses[0])) == 1


def test_every_batch_is_made_afresh_and_standardised() -> None:
    inputs, source = made(n=20)
    assert inputs.shape == (20, 3, 16, 16) and [len(each) for each in source.losses] == [4, 4, 4] and not inputs.requires_grad
    assert source.losses[0][0] != source.losses[1][0] and source.update(nn.Identity()) is NONE
    torch.testing.assert_close(inputs[:8].mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(inputs[:8].std((0, 2, 3), correction=0), torch.ones(3), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "change",
    ({"steps": 5}, {"batch": 4}, {"rate": 0.3}, {"generator_rate": 0.1}, {"latent": 8}, {"widths": (4, 4)}, {"swing": False}), ids=str
)  # fmt: skip
def test_every_choice_matters(change: dict[str, object]) -> None:
    assert not torch.equal(made(dataclasses.replace(QUICK, **change))[0], plain())


def test_rates_fall_each_in_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[tuple[float, ...]] = []
    handle = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append(tuple(group["lr"] for group in optimizer.param_groups)))
    monkeypatch.setattr(module_under_test, "_PERIOD", 3)
    monkeypatch.setattr(module_under_test, "statistics", lambda found, share: 1 + 0 * found[0].mean.sum())
    try:
        made(dataclasses.replace(QUICK, steps=7, patience=4))
    finally:
        handle.remove()
    assert [each[0] for each in rates] == pytest.approx([0.1] * 6 + [0.01])
    assert [each[1] for each in rates] == pytest.approx([0.01] * 3 + [0.0095] * 3 + [0.009025])


@pytest.mark.parametrize("sizes", ((5,), (5, 4), (3, 4, 5), (1, 6)))
def test_a_swung_input_is_moved_by_one_position_at_most_and_reflected(sizes: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, *sizes, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    found = [swung(x, generator) for _ in range(60)]
    assert all(each.shape == x.shape for each in found)
    moved = {tuple(each.flatten().tolist()) for each in found}
    free = sum(size > 1 for size in sizes)
    assert len(moved) == {1: 3, 2: 9, 3: 27}[free] or (free == 3 and len(moved) > 15)
    assert tuple(x.flatten().tolist()) in moved
    line = torch.arange(4.0).expand(1, 1, 4)
    assert {tuple(swung(line, generator).flatten().tolist()) for _ in range(30)} == {(1, 0, 1, 2), (0, 1, 2, 3), (1, 2, 3, 2)}


def test_only_strided_convolutions_swing_and_only_in_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    monkeypatch.setattr(module_under_test, "swung", lambda x, generator: seen.append(tuple(x.shape)) or x)
    model, task = build("resnet_basic")
    source = Latent(model, task, Ctx.create(0), dataclasses.replace(QUICK, steps=1))
    source.sample(2)
    assert seen == [(2, 3, 16, 16), (2, 8, 4, 4), (2, 8, 4, 4)]
    with torch.no_grad():
        model(torch.zeros(1, *task.shape))
    assert len(seen) == 3


class Killed(Exception):
    """Stands for the end of the process."""


def test_killed_it_resumes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_STEPS", 2)
    monkeypatch.setattr(module_under_test, "_PERIOD", 2)
    expected = made(n=16)[0]

    def kill(event: Event) -> None:
        if event.name == "pictures, batch 2 of 2" and event.step == 3:
            raise Killed

    with pytest.raises(Killed):
        made(n=16, ctx=dataclasses.replace(Ctx.create(0, on_event=kill), folder=tmp_path))
    notes: list[str] = []
    listener = lambda event: notes.append(event.message) if event.name == "note" else None  # noqa: E731
    again = made(n=16, ctx=dataclasses.replace(Ctx.create(0, on_event=listener), folder=tmp_path))[0]
    assert torch.equal(again, expected) and [each.split(": ")[1] for each in notes] == ["resumed at step 4 of 4", "resumed at step 2 of 4"]


@pytest.mark.parametrize("odd", ("norms", "axes"))
def test_where_nothing_can_be_met_or_drawn_procedural_pictures_take_its_place(odd: str) -> None:
    notes: list[str] = []
    ctx = Ctx.create(0, on_event=lambda event: notes.append(event.message))
    model, task = build("without_norm")
    if odd == "axes":
        model, task = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).eval(), Task(shape=(6,))
    source = latent_source(model, task, ctx)
    assert isinstance(source, Prior) and source.sample(3).inputs.shape == (3, *task.shape)
    assert len(notes) == 1 and notes[0].endswith("procedural pictures take their place")


def test_what_cannot_be_asked_is_refused() -> None:
    with pytest.raises(NetworkError, match="no batch norm with statistics"):
        made(network="without_norm")
    with pytest.raises(NetworkError, match="at least 1 is needed"):
        made(n=0)
