"""The only optimisation loop of the package: steps of an optimizer on a loss, resumed bit for bit after a kill.

Where ``Ctx.folder`` is set, every :data:`CHECKPOINT_STEPS` steps and at the end a file there keeps all that the next step depends on:
the parameters, the states of optimizer, schedule and random generator, what the loss itself keeps, and the losses so far. Its name holds
a hash of the state in which the fit began, so that the fits of one run do not meet, and the same run, started again, finds each of them
where it was. :func:`resumable` keeps different runs apart.
"""

import hashlib
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

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


@contextmanager
def resumable(ctx: Ctx, folder: Path | None, asked: str) -> Iterator[Ctx]:
    """``ctx`` with a place in ``folder`` for the checkpoints of one run, removed once the block ends well; no folder: ``ctx`` itself.

    ``asked`` names all that the run depends on, and the place belongs to that alone: checkpoints of other runs are not taken, but told.
    """
    if folder is None:
        yield ctx
        return
    place = folder / hashlib.sha256(asked.encode()).hexdigest()[:16]
    others = [each for each in folder.glob("*/") if each != place and any(each.glob("*.pt"))]
    if others:
        ctx.note(f"{folder} holds checkpoints of {len(others)} other runs (another network, method, target or seed), which are not taken")
    yield replace(ctx, folder=place)
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

    On a GPU the loss is computed in mixed precision (bfloat16). Every event of progress tells the loss and the time left.

    Args:
        params: what the optimizer changes; they end as they stand after the last step.
        loss: a scalar, or the scalars by name that add up to it, computed anew for each step; random draws take ``ctx.generator``. One
            that is :class:`Stateful` is checkpointed too.
        steps: how many at most.
        optimizer: made for ``params``.
        ctx: progress goes to it; its folder, if it has one, holds the checkpoints.
        name: of the stage, in events and file names.
        schedule: of the learning rate, told after each step; a plateau schedule is shown the loss.
        stop: given the losses so far, whether they are good enough; see :func:`stalled`.

    Raises:
        MethodError: the loss is not finite; the message names its term, and ``params`` stay as they were before the step.
        OutputError: a checkpoint cannot be written, or is damaged.
    """
    place = None if ctx.folder is None else ctx.folder / _file_name(name, params, optimizer, ctx)
    kept = loss if isinstance(loss, Stateful) else None
    losses = [] if place is None else _resume(place, params, optimizer, schedule, kept, ctx)
    start, begun = time.monotonic(), len(losses)
    if begun:
        ctx.note(f"{name}: resumed at step {begun} of {steps}")
    while len(losses) < steps and not (stop is not None and stop(losses)):
        optimizer.zero_grad()
        with torch.enable_grad(), torch.autocast(ctx.device.type, torch.bfloat16, enabled=ctx.device.type == "cuda"):
            found = loss()
            value = total(found if isinstance(found, Mapping) else {"loss": found}, name, len(losses) + 1)
        value.backward()  # type: ignore[no-untyped-call]
        losses.append(float(value.detach()))
        optimizer.step()
        if isinstance(schedule, ReduceLROnPlateau):
            schedule.step(losses[-1])
        elif schedule is not None:
            schedule.step()
        if place is not None and (len(losses) % CHECKPOINT_STEPS == 0 or len(losses) == steps):
            _save(place, params, optimizer, schedule, kept, ctx, losses)
        pace = (time.monotonic() - start) / (len(losses) - begun)
        ctx.progress(name, len(losses), steps, f"loss {losses[-1]:.3g}, {duration(pace * (steps - len(losses)))} left")
    if place is not None and begun < len(losses) < steps:
        _save(place, params, optimizer, schedule, kept, ctx, losses)
    return losses


def total(terms: Mapping[str, Tensor], name: str, step: int) -> Tensor:
    """The sum of the terms of a loss. Raises MethodError where it is not finite, naming the stage, its step and the terms to blame."""
    value = torch.stack([each.float() for each in terms.values()]).sum()
    if not torch.isfinite(value):
        found = {key: float(each.detach()) for key, each in terms.items()}
        wrong = {key: each for key, each in found.items() if not math.isfinite(each)} or found
        told = " and ".join(f"the {key} is {each}" for key, each in wrong.items())
        raise MethodError(f"{name}: {told} at step {step}: lower the learning rate")
    return value


def stalled(window: int = 50, gain: float = 0.01) -> Stop:
    """Stop once the mean of the last ``window`` losses is not less than that of the window before it by the share ``gain``."""

    def stop(losses: Sequence[float]) -> bool:
        if len(losses) < 2 * window:
            return False
        before, last = sum(losses[-2 * window : -window]), sum(losses[-window:])
        return last > before - gain * abs(before)

    return stop


def time_up(seconds: float) -> Stop:
    """Stop so many seconds from now."""
    end = time.monotonic() + seconds
    return lambda losses: time.monotonic() >= end


def duration(seconds: float) -> str:
    """Seconds as people say them: ``40 s``, ``3 min``, ``1 h 20 min``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _file_name(name: str, params: Sequence[Tensor], optimizer: Optimizer, ctx: Ctx) -> str:
    """``name``, and a hash of where the fit begins."""
    digest = hashlib.sha256(repr(sorted(optimizer.defaults.items())).encode())
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
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        raise OutputError(f"the checkpoint {place} is damaged: remove it, and the run starts anew") from error
    for param, saved in zip(params, state["params"], strict=True):
        param.copy_(saved)
    optimizer.load_state_dict(state["optimizer"])
    if schedule is not None:
        schedule.load_state_dict(state["schedule"])
    if kept is not None:
        kept.load_state_dict(state["kept"])
    ctx.generator.set_state(state["generator"].cpu())
    losses: list[float] = state["losses"]
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
    state = {
        "params": [each.detach() for each in params],
        "optimizer": optimizer.state_dict(),
        "schedule": None if schedule is None else schedule.state_dict(),
        "kept": None if kept is None else kept.state_dict(),
        "generator": ctx.generator.get_state(),
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
