"""The only optimisation loop of the package: steps of an optimizer on a loss, resumed bit for bit after a kill.

Where ``Ctx.folder`` is set, every :data:`CHECKPOINT_STEPS` steps and at the end a file there keeps all that the next step depends on:
the parameters, the states of optimizer, schedule and random generator, what the loss itself keeps, and the losses so far. Its name holds
a hash of all that the fit depends on: the identity of the run (:func:`resumable`), which of its fits this is, and the state in which it
begins. So the same run, started again, finds each fit where it was, and no other fit takes its checkpoint.

Several processes (:mod:`datafree.parallel`) take every step together: each computes the loss with random draws of its own, gradients and
losses are averaged, and the first writes the checkpoints. A loss that calls :func:`fit` itself works in one process only.
"""

import hashlib
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from pickle import UnpicklingError
from typing import Protocol, final, runtime_checkable

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from datafree import parallel
from datafree.context import Ctx
from datafree.errors import MethodError, OutputError

CHECKPOINT_STEPS = 50

Stop = Callable[[Sequence[float]], bool]
Loss = Callable[[], Tensor | Mapping[str, Tensor]]


@runtime_checkable
class Stateful(Protocol):
    """Keeps something from step to step that a checkpoint has to hold: tensors, numbers, lists and dictionaries of them."""

    def state_dict(self) -> dict[str, object]:
        """What is kept."""
        ...

    def load_state_dict(self, state: dict[str, object]) -> object:
        """Take back what :meth:`state_dict` gave."""
        ...


@runtime_checkable
class Timed(Protocol):
    """A stop that comes after some time, if not before."""

    def left(self) -> float:
        """Seconds until then; infinite where it never comes."""
        ...


@contextmanager
def resumable(ctx: Ctx, folder: Path | None, asked: str) -> Iterator[Ctx]:
    """``ctx`` with a place in ``folder`` for the checkpoints of one run, removed once the block ends well; no folder: ``ctx`` itself.

    ``asked`` names all that the run depends on, and the place belongs to that alone: checkpoints of other runs are not taken, but told.
    """
    if folder is None:
        yield ctx
        return
    place = folder / hashlib.sha256(parallel.agreed(asked).encode()).hexdigest()[:16]
    others = [each for each in folder.glob("*/") if each != place and any(each.glob("*.pt"))]
    if others:
        ctx.note(f"{folder} holds checkpoints of {len(others)} other runs (another network, method, target or seed), which are not taken")
    yield replace(ctx, folder=place, identity=asked, stages=count())
    parallel.gathered(None)  # no process needs them any more
    if parallel.rank():
        return
    shutil.rmtree(place, ignore_errors=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def fit(
    params: Sequence[Tensor],
    loss: Loss,
    steps: int,
    optimizer: Optimizer,
    ctx: Ctx,
    name: str,
    schedule: LRScheduler | None = None,
    stop: Stop | None = None,
) -> list[float]:
    """Take ``steps`` steps of ``optimizer`` on ``params``; returns the loss before each of them.

    On a GPU the loss is computed in mixed precision (bfloat16) unless ``ctx`` says otherwise. Every event of progress tells the loss and
    the time left.

    Args:
        params: what the optimizer changes; they end as they stand after the last step.
        loss: a scalar, or the scalars by name that add up to it, computed anew for each step; random draws take ``ctx.generator``. One
            that is :class:`Stateful` is checkpointed too.
        steps: how many at most.
        optimizer: made for ``params``.
        ctx: progress goes to it; its folder, if it has one, holds the checkpoints.
        name: of the stage, in events and file names.
        schedule: of the learning rate, told after each step; a plateau schedule is shown the loss.
        stop: given the losses so far, whether they are good enough; see :class:`Stalled`.

    Raises:
        MethodError: the loss is not finite; the message names its term, and ``params`` stay as they were before the step.
        OutputError: a checkpoint cannot be written, or is damaged.
    """
    place = None if ctx.folder is None else ctx.folder / _file_name(name, params, loss, steps, optimizer, ctx)
    kept = loss if isinstance(loss, Stateful) else None
    mixed = ctx.mixed_precision and ctx.device.type == "cuda"
    with parallel.apart(ctx.generator):
        losses = [] if place is None else _resume(place, params, optimizer, schedule, kept, ctx)
        parallel.align(params)
        start, begun = time.monotonic(), len(losses)
        if begun:
            ctx.note(f"{name}: resumed at step {begun} of {steps}")
        while len(losses) < steps and not (stop is not None and parallel.agreed(stop(losses))):
            optimizer.zero_grad()
            with torch.enable_grad(), torch.autocast(ctx.device.type, torch.bfloat16, enabled=mixed):
                found = loss()
                value = total(found if isinstance(found, Mapping) else {"loss": found}, name, len(losses) + 1)
            value.backward()  # type: ignore[no-untyped-call]
            parallel.average_gradients(params)
            losses.append(float(parallel.mean(value)))
            optimizer.step()
            if isinstance(schedule, ReduceLROnPlateau):
                schedule.step(losses[-1])
            elif schedule is not None:
                schedule.step()
            if place is not None and (len(losses) % CHECKPOINT_STEPS == 0 or len(losses) == steps):
                _save(place, params, optimizer, schedule, kept, ctx, losses)
            pace = (time.monotonic() - start) / (len(losses) - begun)
            left = min(pace * (steps - len(losses)), _left(stop))
            ctx.progress(name, len(losses), steps, f"loss {losses[-1]:.3g}, {duration(left)} left")
        if place is not None and begun < len(losses) < steps:
            _save(place, params, optimizer, schedule, kept, ctx, losses)
    return losses


def total(terms: Mapping[str, Tensor], name: str, step: int) -> Tensor:
    """The sum of the terms of a loss.

    Raises MethodError where it is not finite, in whichever process, naming the stage, its step and the terms to blame.
    """
    value = torch.stack([each.float() for each in terms.values()]).sum()
    if not torch.isfinite(parallel.mean(value)):
        told = [each for each in parallel.gathered(_blamed(terms, value)) if each] or ["the sum of the losses of all processes is infinite"]
        raise MethodError(f"{name}: {told[0]} at step {step}: lower the learning rate")
    return value


def _blamed(terms: Mapping[str, Tensor], value: Tensor) -> str:
    """The terms that are not finite, all of them where only their sum is not; nothing where that is finite."""
    if torch.isfinite(value):
        return ""
    found = {key: float(each.detach()) for key, each in terms.items()}
    wrong = {key: each for key, each in found.items() if not math.isfinite(each)} or found
    return " and ".join(f"the {key} is {each}" for key, each in wrong.items())


@final
@dataclass(frozen=True)
class Stalled:
    """Stops once the mean of the last ``window`` losses is not less than that of the window before it by the share ``gain``."""

    window: int = 50
    gain: float = 0.01

    def __call__(self, losses: Sequence[float]) -> bool:
        """Whether they have stalled."""
        if len(losses) < 2 * self.window:
            return False
        before, last = sum(losses[-2 * self.window : -self.window]), sum(losses[-self.window :])
        return last > before - self.gain * abs(before)


@final
class Clock:
    """Stops a fit once so many ``seconds`` are over since it was made; None: never. All processes go by the clock of the first.

    ``elapsed`` holds the seconds up to the last look at it, those before a kill included.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds, self.elapsed, self.begun = parallel.agreed(seconds), 0.0, time.monotonic()

    def __call__(self, losses: Sequence[float] = ()) -> bool:
        """Look whether the time is up."""
        if self.seconds is None:
            return False
        self.elapsed = parallel.agreed(time.monotonic() - self.begun)
        return self.elapsed >= self.seconds

    def left(self) -> float:
        """Seconds that were left at the last look."""
        return math.inf if self.seconds is None else max(0.0, self.seconds - self.elapsed)

    def rest(self) -> float | None:
        """Seconds that are left now; None: any number."""
        self()
        return None if self.seconds is None else self.left()

    def share(self) -> float:
        """How much of its time was over at the last look, 0 to 1."""
        return 0.0 if self.seconds is None else min(1.0, self.elapsed / max(self.seconds, 1e-9))

    def resume(self, elapsed: float) -> None:
        """Go on as if so many seconds were over."""
        self.elapsed, self.begun = elapsed, time.monotonic() - elapsed


def in_turn(seconds: float | None, count: int) -> Iterator[Clock]:
    """A clock for each of ``count`` fits, made when it begins: what is left of the time is shared evenly among those to come."""
    whole = Clock(seconds)
    for number in range(count):
        rest = whole.rest()
        yield Clock(None if rest is None else rest / (count - number))


@final
@dataclass(frozen=True)
class FirstOf:
    """Stops a fit as soon as any of ``stops`` does."""

    stops: tuple[Stop, ...]

    def __call__(self, losses: Sequence[float]) -> bool:
        """Whether any says so."""
        return any(stop(losses) for stop in self.stops)

    def left(self) -> float:
        """Seconds until the first that is :class:`Timed`."""
        return min(map(_left, self.stops))


def _left(stop: object) -> float:
    return stop.left() if isinstance(stop, Timed) else math.inf


def duration(seconds: float) -> str:
    """Seconds as people say them: ``40 s``, ``3 min``, ``1 h 20 min``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _file_name(name: str, params: Sequence[Tensor], loss: Loss, steps: int, optimizer: Optimizer, ctx: Ctx) -> str:
    """``name``, and a hash of what the fit depends on."""
    groups = [sorted((key, value) for key, value in group.items() if key != "params") for group in optimizer.param_groups]
    kind = getattr(loss, "__qualname__", type(loss).__qualname__)
    run = (ctx.identity, next(ctx.stages), ctx.mixed_precision, parallel.count())
    digest = hashlib.sha256(repr((run, kind, steps, type(optimizer).__qualname__, groups)).encode())
    for each in (*params, ctx.generator.get_state()):
        digest.update(repr(tuple(each.shape)).encode() + each.detach().cpu().contiguous().view(-1).numpy().tobytes())
    return f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}-{digest.hexdigest()[:16]}.pt"


@torch.no_grad()
def _resume(
    place: Path, params: Sequence[Tensor], optimizer: Optimizer, schedule: LRScheduler | None, kept: Stateful | None, ctx: Ctx
) -> list[float]:
    """Put everything back as the checkpoint has it; returns the losses up to it, none where there is no checkpoint."""
    if not place.is_file():
        return []
    try:
        state = torch.load(place, map_location=ctx.device, weights_only=True)
        losses: list[float] = state["losses"]
        generator = state["generators"][parallel.rank()].cpu()
        for param, saved in zip(params, state["params"], strict=True):
            param.copy_(saved)
        optimizer.load_state_dict(state["optimizer"])
        if schedule is not None:
            schedule.load_state_dict(state["schedule"])
        if kept is not None:
            kept.load_state_dict(state["kept"])
        ctx.generator.set_state(generator)
    except (OSError, RuntimeError, EOFError, UnpicklingError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise OutputError(f"the checkpoint {place} is damaged: remove it, and the run starts anew") from error
    return losses


def _save(
    place: Path,
    params: Sequence[Tensor],
    optimizer: Optimizer,
    schedule: LRScheduler | None,
    kept: Stateful | None,
    ctx: Ctx,
    losses: list[float],
) -> None:
    """Write the checkpoint beside its place, then move it there: a kill leaves the old one or the new one, never a part."""
    generators = parallel.gathered(ctx.generator.get_state())
    if parallel.rank():
        return
    state = {
        "params": [each.detach() for each in params],
        "optimizer": optimizer.state_dict(),
        "schedule": None if schedule is None else schedule.state_dict(),
        "kept": None if kept is None else kept.state_dict(),
        "generators": generators,
        "losses": losses,
    }
    beside = place.with_suffix(f".{os.getpid()}.part")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, beside)
        beside.replace(place)
    except OSError as error:
        raise OutputError(f"cannot write the checkpoint {place}: {error.strerror or error}") from error
    finally:
        beside.unlink(missing_ok=True)
