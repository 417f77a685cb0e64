"""Where inputs come from: whatever can give a batch, and train itself if it learns, is a source."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from types import MappingProxyType
from typing import Protocol, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datafree.errors import MethodError, NetworkError
from datafree.fit import Stateful
from datafree.synth.prior import Family, pictures
from datafree.task import Task

Terms = Mapping[str, Tensor]
NONE: Terms = MappingProxyType({})


@dataclass(frozen=True)
class Batch:
    """Inputs, and what the source knows of them.

    Args:
        inputs: as the network takes them, (n, *shape).
        labels: what each is meant to show: its class, (n,), or its shares of all classes, (n, classes).
        answer: what the teacher answers to them.
    """

    inputs: Tensor
    labels: Tensor | None = None
    answer: Tensor | None = None


class Source(Protocol):
    """Gives inputs without data."""

    def sample(self, n: int) -> Batch:
        """``n`` inputs."""
        ...

    def update(self, student: nn.Module) -> Terms:
        """Train yourself one step, perhaps against the student: the terms of your loss by name; a fixed source has none."""
        ...


@final
@dataclass(frozen=True)
class Gaussian:
    """Standard normal noise, new for every sample."""

    task: Task
    generator: torch.Generator

    def sample(self, n: int) -> Batch:
        """``n`` inputs of independent standard normal entries."""
        return Batch(self.task.noise(n, self.generator))

    def update(self, student: nn.Module) -> Terms:
        """Nothing to learn."""
        return NONE


@final
@dataclass(frozen=True)
class Prior:
    """Procedural pictures (``synth.prior``), new for every sample."""

    family: Family
    task: Task
    generator: torch.Generator

    def sample(self, n: int) -> Batch:
        """``n`` pictures, standardised as one batch."""
        return Batch(pictures(self.family, n, self.task, self.generator))

    def update(self, student: nn.Module) -> Terms:
        """Nothing to learn."""
        return NONE


@final
@dataclass(frozen=True)
class Pool:
    """A fixed set of inputs, such as another source has made, of which every sample is a random part."""

    batch: Batch
    generator: torch.Generator

    def sample(self, n: int) -> Batch:
        """``n`` different inputs of the pool. Raises NetworkError where it holds fewer."""
        size = len(self.batch.inputs)
        if not 1 <= n <= size:
            raise NetworkError(f"{n} inputs were asked of a pool of {size}: take 1 to {size}")
        chosen = torch.randperm(size, generator=self.generator, device=self.generator.device)[:n]
        labels = self.batch.labels
        return Batch(self.batch.inputs[chosen], None if labels is None else labels[chosen])

    def update(self, student: nn.Module) -> Terms:
        """Nothing to learn."""
        return NONE


@final
@dataclass(frozen=True)
class Shown:
    """Another source, every batch of which is shown to a listener."""

    source: Source
    listener: Callable[[Tensor], None]

    def sample(self, n: int) -> Batch:
        """What the other source gives."""
        batch = self.source.sample(n)
        self.listener(batch.inputs)
        return batch

    def update(self, student: nn.Module) -> Terms:
        """What the other source has to learn."""
        return self.source.update(student)

    def state_dict(self) -> dict[str, object]:
        """What the other source keeps."""
        return state_of(self.source)

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Hand back what :meth:`state_dict` gave."""
        restore(self.source, state)


@final
@dataclass(frozen=True)
class Mixed:
    """Several sources at once: each gives its part of every batch, and learns at every update.

    Args:
        sources: in the order in which a batch holds their inputs.
        shares: of the inputs, one a source, that add up to 1; parts are rounded by chance, so that shares hold on average for any ``n``.
        generator: of that chance.

    Raises:
        MethodError: the shares are not such.
    """

    sources: tuple[Source, ...]
    shares: tuple[float, ...]
    generator: torch.Generator

    def __post_init__(self) -> None:
        if len(self.shares) != len(self.sources) or min(self.shares, default=-1.0) < 0 or abs(sum(self.shares) - 1) > 1e-6:
            raise MethodError(f"shares {self.shares} of {len(self.sources)} sources: give each source one, together 1")

    def sample(self, n: int) -> Batch:
        """``n`` inputs; with labels, or the teacher's answer, where all parts know them."""
        if n < 1:
            raise NetworkError(f"{n} inputs were asked for: at least 1 is needed")
        chance = float(torch.rand((), generator=self.generator, device=self.generator.device))
        ends = [math.floor(n * share + chance) for share in accumulate(self.shares)]
        counts = [end - begin for begin, end in pairwise((0, *ends[:-1], n))]
        parts = [source.sample(count) for source, count in zip(self.sources, counts, strict=True) if count]
        labels, answers = _present(part.labels for part in parts), _present(part.answer for part in parts)
        return Batch(
            torch.cat([part.inputs for part in parts]), _joined(labels) if labels else None, torch.cat(answers) if answers else None
        )

    def update(self, student: nn.Module) -> Terms:
        """What the sources have to learn; names of terms begin with the number of the source."""
        found = [source.update(student) for source in self.sources]
        return {f"{number}, {name}": term for number, terms in enumerate(found, 1) for name, term in terms.items()}

    def state_dict(self) -> dict[str, object]:
        """What each source keeps."""
        return {str(number): state_of(source) for number, source in enumerate(self.sources, 1)}

    def load_state_dict(self, state: dict[str, dict[str, object]]) -> None:
        """Hand back what :meth:`state_dict` gave."""
        for number, source in enumerate(self.sources, 1):
            restore(source, state[str(number)])


def state_of(source: Source) -> dict[str, object]:
    """What a source keeps from step to step, for a checkpoint; a fixed one keeps nothing."""
    return source.state_dict() if isinstance(source, Stateful) else {}


def restore(source: Source, state: dict[str, object]) -> None:
    """Hand back to a source what :func:`state_of` gave."""
    if isinstance(source, Stateful):
        source.load_state_dict(state)


def _present(parts: Iterable[Tensor | None]) -> list[Tensor] | None:
    """The parts, unless one is missing."""
    found = list(parts)
    present = [part for part in found if part is not None]
    return present if len(present) == len(found) else None


def _joined(labels: Sequence[Tensor]) -> Tensor:
    """One tensor of classes, (n,); or of shares, (n, classes), where one part has shares."""
    classes = max((each.shape[1] for each in labels if each.dim() == 2), default=None)
    if classes is None:
        return torch.cat(list(labels))
    return torch.cat([each if each.dim() == 2 else F.one_hot(each, classes).float() for each in labels])
