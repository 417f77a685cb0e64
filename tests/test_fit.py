"""The loop descends, stops, tells how far it is, and after a kill at any step goes on to the same bits."""

import dataclasses
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import Tensor

from datafree import fit as module_under_test
from datafree.context import Ctx, Event
from datafree.errors import MethodError, OutputError
from datafree.fit import Clock, FirstOf, Stalled, duration, fit, in_turn, resumable

STEPS, EVERY = 12, 5


class Killed(Exception):
    """Stands for the end of the process."""


def context(folder: Path | None = None, seed: int = 0) -> Ctx:
    return dataclasses.replace(Ctx.create(seed), folder=folder)


def run(
    ctx: Ctx, kill_at: int | None = None, kind: str = "plateau", steps: int = STEPS, name: str = "pictures 1 of 2"
) -> tuple[Tensor, list[float]]:
    """Noisy descent on a square: what it reaches depends on every draw and on the optimizer's memory."""
    x = torch.randn(4, generator=ctx.generator).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.1)
    falling = {
        "plateau": lambda: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=2),
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS),
        "none": lambda: None,
    }[kind]()
    calls = 0

    def loss() -> Tensor:
        nonlocal calls
        if calls == kill_at:
            raise Killed
        calls += 1
        return (x + 0.3 * torch.randn(4, generator=ctx.generator)).square().sum()

    losses = fit([x], loss, steps, optimizer, ctx, name, falling)
    return torch.cat([x.detach(), torch.randn(1, generator=ctx.generator)]), losses


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_under_test, "CHECKPOINT_STEPS", EVERY)


@pytest.mark.parametrize("kind", ("plateau", "cosine", "none"))
@pytest.mark.parametrize("kill_at", (0, 3, 5, 7, 11))
def test_killed_at_any_step_it_resumes_to_the_same_bits(kill_at: int, kind: str, tmp_path: Path) -> None:
    expected, losses = run(context(), kind=kind)
    with pytest.raises(Killed):
        run(context(tmp_path), kill_at, kind)
    again, all_losses = run(context(tmp_path), kind=kind)
    assert torch.equal(again, expected) and all_losses == losses and len(losses) == STEPS


def test_only_the_steps_after_the_checkpoint_are_taken_again(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(context(tmp_path), 7)
    with pytest.raises(Killed):  # five are there
        run(context(tmp_path), STEPS - EVERY - 1)
    run(context(tmp_path), STEPS - 2 * EVERY)  # and now ten


def test_a_finished_fit_is_not_done_again(tmp_path: Path) -> None:
    expected, losses = run(context(tmp_path))
    again, all_losses = run(context(tmp_path), kill_at=0)
    assert torch.equal(again, expected) and all_losses == losses


def test_fits_of_one_run_do_not_meet(tmp_path: Path) -> None:
    def both(ctx: Ctx, kill_at: int | None = None) -> list[Tensor]:
        return [run(ctx)[0], run(ctx, kill_at)[0]]

    expected = both(context())
    with pytest.raises(Killed):
        both(context(tmp_path), 8)
    assert len(list(tmp_path.iterdir())) == 2
    assert all(torch.equal(one, other) for one, other in zip(both(context(tmp_path)), expected, strict=True))
    assert torch.equal(run(context(tmp_path, seed=1))[0], run(context(seed=1))[0]), "another seed took the checkpoint"


def test_a_checkpoint_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Killed):
        run(context(tmp_path), 7)
    (before,) = tmp_path.iterdir()
    content, save = before.read_bytes(), torch.save

    def half(state: object, place: Path) -> None:
        save(state, place)
        os.truncate(place, 100)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OutputError, match="cannot write the checkpoint .*pictures-1-of-2.*No space left"):
        run(context(tmp_path))
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [content]


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "save", lambda *args: pytest.fail("a file was written"))
    run(context())


def test_progress_tells_the_loss_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 30))
    monkeypatch.setattr(module_under_test.time, "monotonic", lambda: next(clock))
    events: list[Event] = []
    _, losses = run(Ctx.create(0, on_event=events.append), steps=10)
    assert [(each.step, each.total) for each in events] == [(step, 10) for step in range(1, 11)]
    assert events[3].message == f"loss {losses[3]:.3g}, 3 min left" and events[9].message.endswith(", 0 s left")


def test_the_time_left_is_that_until_a_stop_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(module_under_test.time, "monotonic", lambda: next(clock))
    events: list[Event] = []
    x = torch.ones(1, requires_grad=True)
    stop = FirstOf((Stalled(), Clock(100.0)))
    losses = fit(
        [x], lambda: x.square().sum(), 1000, torch.optim.SGD([x], lr=0.1), Ctx.create(0, on_event=events.append), "descend", stop=stop
    )
    told = [each.message.split(", ")[1] for each in events]
    assert told == ["80 s left", "60 s left", "40 s left", "20 s left", "0 s left"][: len(losses)] and len(losses) >= 4
    assert stop.left() == 0.0


def test_a_clock_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(module_under_test.time, "monotonic", lambda: now)
    clock, never = Clock(10.0), Clock(None)
    now = 4.0
    assert not clock() and (clock.elapsed, clock.left(), clock.share()) == (4.0, 6.0, 0.4)
    other = Clock(10.0)
    other.resume(clock.elapsed)
    now = 9.0
    assert not other() and other.left() == 1.0
    now = 10.0
    assert other() and other.share() == 1.0 and not never() and (never.left(), never.share()) == (math.inf, 0.0)


def test_fits_in_turn_share_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(module_under_test.time, "monotonic", lambda: now)
    found = []
    for clock, ends in zip(in_turn(12.0, 3), (4.0, 7.0, 12.5), strict=True):
        found.append((clock.seconds, clock()))
        now = ends
        found.append((clock.rest(), clock()))
    # the first takes its share to the end, the second less than that, and the last has the rest, which it exceeds
    assert found == [(4.0, False), (0.0, True), (4.0, False), (1.0, False), (5.0, False), (0.0, True)]
    assert [clock.rest() for clock in in_turn(None, 2)] == [None, None]


def test_stops_by_its_own_criterion(tmp_path: Path) -> None:
    def descend(ctx: Ctx) -> list[float]:
        x = torch.ones(1, requires_grad=True)
        return fit([x], lambda: x.square().sum() + 1, 500, torch.optim.SGD([x], lr=0.1), ctx, "descend", stop=Stalled(10, 0.01))

    losses = descend(context(tmp_path))
    assert 20 <= len(losses) < 60 and losses[-1] < 1.01
    assert descend(context(tmp_path)) == losses, "it went on where it had stopped"


def test_stalled_compares_two_windows() -> None:
    stop = Stalled(3, 0.1)
    assert not stop([5, 5, 5, 5, 5]) and stop([5, 5, 5, 5, 5, 5]) and stop([9, 9, 9, 5, 5, 5, 4.6, 4.6, 4.6])
    assert not stop([5, 5, 5, 4.4, 4.4, 4.4]) and stop([-5, -5, -5, -5.1, -5.1, -5.1]) and not stop([-5, -5, -5, -6, -6, -6])


def test_a_loss_that_is_no_number_is_refused() -> None:
    x = torch.ones(1, requires_grad=True)
    with pytest.raises(MethodError, match="descend: the loss is inf at step 1: lower the learning rate"):
        fit([x], lambda: x.sum() / 0, 3, torch.optim.SGD([x], lr=0.1), context(), "descend")


def test_the_term_to_blame_is_named_and_the_parameters_stay() -> None:
    x = torch.ones(1, requires_grad=True)
    terms = [{"size": x.sum(), "shape": x.sum()}, {"size": x.sum(), "shape": x.sum() * torch.nan}]
    with pytest.raises(MethodError, match="^descend: the shape is nan at step 2: lower the learning rate"):
        fit([x], lambda: terms.pop(0), 3, torch.optim.SGD([x], lr=0.25), context(), "descend")
    assert x.item() == 0.5, "the terms did not add up, or the bad step was taken"


class Drift:
    """A loss that remembers: its aim moves with every step."""

    def __init__(self, x: Tensor, kill_at: int | None) -> None:
        self.x, self.kill_at, self.aim = x, kill_at, torch.zeros(1)

    def __call__(self) -> Tensor:
        if self.aim.item() == self.kill_at:
            raise Killed
        self.aim = self.aim + 1
        return (self.x - self.aim).square().sum()

    def state_dict(self) -> dict[str, object]:
        return {"aim": self.aim}

    def load_state_dict(self, state: dict[str, object]) -> None:
        assert isinstance(state["aim"], Tensor)
        self.aim = state["aim"]


def test_what_a_loss_keeps_is_resumed(tmp_path: Path) -> None:
    def follow(ctx: Ctx, kill_at: int | None = None) -> Tensor:
        x = torch.ones(1, requires_grad=True)
        fit([x], Drift(x, kill_at), STEPS, torch.optim.SGD([x], lr=0.1), ctx, "follow")
        return x.detach()

    expected = follow(context())
    with pytest.raises(Killed):
        follow(context(tmp_path), 7)
    assert torch.equal(follow(context(tmp_path)), expected)


def test_gradients_flow_where_they_were_switched_off() -> None:
    with torch.no_grad():
        assert run(context())[1] == run(context())[1]


@pytest.mark.parametrize(("seconds", "told"), ((0.4, "0 s"), (99, "99 s"), (100, "2 min"), (3000, "50 min"), (4800, "1 h 20 min")))
def test_durations_read_well(seconds: float, told: str) -> None:
    assert duration(seconds) == told


def test_runs_that_ask_for_different_things_do_not_meet(tmp_path: Path) -> None:
    expected, _ = run(context())
    notes: list[Event] = []
    base = Ctx.create(0, on_event=lambda event: notes.append(event) if event.name == "note" else None)
    with pytest.raises(Killed), resumable(context(), tmp_path, "one network") as ctx:
        run(ctx, 7)
    with resumable(base, tmp_path, "another network") as ctx:
        assert torch.equal(run(ctx)[0], expected)
    (told,) = notes
    assert "checkpoints of 1 other runs" in told.message and "not taken" in told.message
    notes.clear()
    base.generator.manual_seed(0)
    with resumable(base, tmp_path, "one network") as ctx:
        assert torch.equal(run(ctx, STEPS - EVERY)[0], expected)
    assert [each.message for each in notes] == ["pictures 1 of 2: resumed at step 5 of 12"]
    assert not tmp_path.exists(), "checkpoints of a complete run are left"


def test_a_folder_of_checkpoints_keeps_what_else_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("")
    with resumable(context(), tmp_path, "a run") as ctx:
        run(ctx)
        assert ctx.folder is not None and ctx.folder.is_dir()
    assert [each.name for each in tmp_path.iterdir()] == ["mine.txt"]


def cut(place: Path) -> None:
    place.write_bytes(place.read_bytes()[:500])


def lacking(*keys: str) -> Callable[[Path], None]:
    """Takes a part out of the state that a checkpoint holds."""

    def spoil(place: Path) -> None:
        state = torch.load(place, weights_only=True)
        inner = state
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]
        torch.save(state, place)

    return spoil


def other_shape(place: Path) -> None:
    state = torch.load(place, weights_only=True)
    torch.save({**state, "params": [torch.zeros(7)]}, place)


@pytest.mark.parametrize(
    "spoil",
    (
        cut,
        *(lacking(key) for key in ("params", "optimizer", "schedule", "generators", "losses")),
        lacking("optimizer", "param_groups"),
        lambda place: torch.save([1, 2], place),
        lambda place: torch.save({"losses": [], "generators": []}, place),
        other_shape,
    ),
)
def test_a_damaged_checkpoint_is_told(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    run(context(tmp_path))
    (place,) = tmp_path.iterdir()
    spoil(place)
    with pytest.raises(OutputError, match="is damaged: remove it, and the run starts anew"):
        run(context(tmp_path))


def descended(ctx: Ctx, aim: float) -> float:
    """Where a step towards ``aim`` leads from 0: the parameter, the optimizer and the random state say nothing of the aim."""
    x = torch.zeros(1, requires_grad=True)
    fit([x], lambda: (x - aim).square().sum(), 1, torch.optim.SGD([x], lr=0.5), ctx, "descend")
    return x.item()


def test_fits_of_one_run_that_differ_in_their_loss_alone_do_not_meet(tmp_path: Path) -> None:
    for _ in range(2):  # and each is found again when the run is repeated
        with resumable(context(), tmp_path / "run", "a run") as ctx:
            assert (descended(ctx, 1.0), descended(ctx, 2.0)) == (1.0, 2.0)


def test_runs_in_one_folder_do_not_meet_whatever_they_differ_in(tmp_path: Path) -> None:
    base = context(tmp_path)
    one, other = (dataclasses.replace(base, identity=each, stages=count()) for each in ("2 bits", "8 bits"))
    assert (descended(one, 1.0), descended(other, 2.0)) == (1.0, 2.0)
    again = dataclasses.replace(base, identity="2 bits", stages=count())
    assert descended(again, 9.0) == 1.0, "the same run did not find its checkpoint"


@pytest.mark.parametrize(("mixed", "device", "expected"), ((True, "cuda", True), (False, "cuda", False), (True, "cpu", False)))
def test_mixed_precision_can_be_switched_off(mixed: bool, device: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def autocast(kind: str, dtype: torch.dtype, enabled: bool) -> AbstractContextManager[None]:
        seen.append(enabled)
        return nullcontext()

    monkeypatch.setattr(torch, "autocast", autocast)
    descended(dataclasses.replace(Ctx.create(0), device=torch.device(device), mixed_precision=mixed), 1.0)
    assert seen == [expected]
