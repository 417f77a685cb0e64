"""Where inputs come from: whatever can give a batch, and train itself if it learns, is a source."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol, final

import torch
from torch import Tensor, nn

from datafree.errors import NetworkError
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
