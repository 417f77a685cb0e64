"""What a run carries along: device, randomness, progress, a folder to work in."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from datafree.errors import TargetError


@dataclass(frozen=True)
class Event:
    """One step of progress: ``step`` of ``total`` of the stage ``name``, or a remark (``total`` 0)."""

    name: str
    step: int = 0
    total: int = 0
    message: str = ""


@dataclass(frozen=True)
class Ctx:
    """Handed to every method and every part of it.

    Args:
        device: where tensors live.
        generator: the only source of randomness, on ``device``.
        on_event: called with each :class:`Event`.
        folder: a place for large intermediate files; None if there is none.
        on_pictures: called with every batch of inputs that a method has made, (n, *shape), where they are to be kept; None: nobody asks.
    """

    device: torch.device
    generator: torch.Generator
    on_event: Callable[[Event], None] = field(default=lambda event: None)
    folder: Path | None = None
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

    def progress(self, name: str, step: int = 0, total: int = 0, message: str = "") -> None:
        """Tell the listener how far the stage ``name`` has come."""
        self.on_event(Event(name, step, total, message))

    def note(self, message: str) -> None:
        """Tell the listener something that belongs into the record of the run."""
        self.on_event(Event("note", message=message))
