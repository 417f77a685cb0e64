"""What a run carries along: device, randomness, progress, a folder to work in."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Generic, TypeVar, final

import torch
from torch import Tensor, nn

from datafree.errors import TargetError


@dataclass(frozen=True)
class Event:
    """One step of progress: ``step`` of ``total`` of the stage ``name``, or a remark (``total`` 0)."""

    name: str
    step: int = 0
    total: int = 0
    message: str = ""


T = TypeVar("T")


@final
class Made(Generic[T]):
    """What was made so far, to be given again where the very same is asked for: an explicit cache."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[T, Tensor]] = {}

    def once(self, what: str, model: nn.Module, generator: torch.Generator, make: Callable[[], T]) -> T:
        """What ``make`` gives, or gave before to the same words, weights and random state; ``generator`` ends as if it were made anew."""
        digest = hashlib.sha256(what.encode())
        for each in (*model.parameters(), *model.buffers(), generator.get_state()):
            digest.update(each.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        key = digest.hexdigest()
        if key not in self._known:
            self._known[key] = make(), generator.get_state()
        found, state = self._known[key]
        generator.set_state(state)
        return found


@dataclass(frozen=True)
class Ctx:
    """Handed to every method and every part of it.

    Args:
        device: where tensors live.
        generator: the only source of randomness, on ``device``.
        on_event: called with each :class:`Event`.
        folder: a place for checkpoints; None if there is none.
        identity: all that the run depends on, in words, and what part of it this is: checkpoints of anything else are not taken.
        stages: numbers the fits of the run in their order.
        pictures: optimised inputs, where several runs for the same network share them; None: each makes its own.
        mixed_precision: whether losses are computed in bfloat16 where the device is a GPU.
        on_pictures: called with every batch of inputs that a method has made, (n, *shape), where they are to be kept; None: nobody asks.
    """

    device: torch.device
    generator: torch.Generator
    on_event: Callable[[Event], None] = field(default=lambda event: None)
    folder: Path | None = None
    identity: str = ""
    stages: Iterator[int] = field(default_factory=count, compare=False, repr=False)
    pictures: Made[Tensor] | None = None
    mixed_precision: bool = True
    on_pictures: Callable[[Tensor], None] | None = None

    @staticmethod
    def create(seed: int = 0, device: str | torch.device | None = None, on_event: Callable[[Event], None] | None = None) -> "Ctx":
        """A context with a freshly seeded generator; the device is the CPU unless told otherwise.

        Raises TargetError for a seed that is no whole number in [0, 2^63), and for a device that cannot be used here.
        """
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
            raise TargetError(f"seed cannot be {seed!r}: expected a whole number from 0 to 2^63 - 1")
        try:
            place = torch.device("cpu" if device is None else device)
            generator = torch.Generator(place).manual_seed(seed)
            torch.empty(0, device=place)
        except (RuntimeError, TypeError, AssertionError) as error:
            raise TargetError(f"device {str(device)!r} cannot be used here: choose cpu, or cuda where torch finds it") from error
        return Ctx(place, generator) if on_event is None else Ctx(place, generator, on_event)

    def part(self, what: object) -> "Ctx":
        """The context of a part of the run, whose checkpoints are its own; the text of ``what`` is the same in every process."""
        return replace(self, identity=f"{self.identity}\n{what}")

    def progress(self, name: str, step: int = 0, total: int = 0, message: str = "") -> None:
        """Tell the listener how far the stage ``name`` has come."""
        self.on_event(Event(name, step, total, message))

    def note(self, message: str) -> None:
        """Tell the listener something that belongs into the record of the run."""
        self.on_event(Event("note", message=message))
