"""Top-1 accuracy on labelled data: of one network, or of teacher and student on the same inputs."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from datafree.context import Event
from datafree.errors import DataError, NetworkError
from datafree.graph.swap import frozen_copy
from datafree.measure.data import Data, Labelled, batches_of
from datafree.task import Task


@dataclass(frozen=True)
class Accuracy:
    """How many answers were right."""

    correct: int
    total: int

    @property
    def top1(self) -> float:
        """Percent of the answers that are right."""
        return 100 * self.correct / self.total


@dataclass(frozen=True)
class Paired:
    """On how many inputs both networks, only one, or neither were right."""

    both: int
    only_teacher: int
    only_student: int
    neither: int

    @property
    def total(self) -> int:
        """How many inputs were compared."""
        return self.both + self.only_teacher + self.only_student + self.neither

    @property
    def drop(self) -> float:
        """Percentage points that the student lost; negative where it gained."""
        return 100 * (self.only_teacher - self.only_student) / self.total

    @property
    def half_width(self) -> float:
        """Half the 95 % confidence interval of ``drop``, in percentage points.

        Half a count is added to each cell, so that two networks that never differ are not given certainty
        (Agresti and Min 2005, "Simple improved confidence intervals for comparing matched proportions").
        """
        lost, won, total = self.only_teacher + 0.5, self.only_student + 0.5, self.total + 2
        return 100 * 1.96 * math.sqrt(lost + won - (lost - won) ** 2 / total) / total


@dataclass(frozen=True)
class Comparison:
    """Teacher and student on the same inputs."""

    teacher: Accuracy
    student: Accuracy
    paired: Paired


def evaluate(model: nn.Module, task: Task, data: Data, on_event: Callable[[Event], None] | None = None) -> Accuracy:
    """Top-1 accuracy of one network. Raises DataError and NetworkError, see :func:`compare`."""
    right = _right((model,), ("network",), task, data, on_event)[0]
    return Accuracy(int(right.sum()), len(right))


def compare(teacher: nn.Module, student: nn.Module, task: Task, data: Data, on_event: Callable[[Event], None] | None = None) -> Comparison:
    """Top-1 accuracy of teacher and student in one pass over the data, and how their errors pair up.

    Raises:
        DataError: no data, or inputs and labels that do not fit the task.
        NetworkError: an answer that is not (n, classes), or not finite.
    """
    first, second = _right((teacher, student), ("teacher", "student"), task, data, on_event)
    counts = [int(cell.sum()) for cell in (first & second, first & ~second, ~first & second, ~first & ~second)]
    paired = Paired(*counts)
    return Comparison(Accuracy(int(first.sum()), paired.total), Accuracy(int(second.sum()), paired.total), paired)


def _right(
    models: tuple[nn.Module, ...], names: tuple[str, ...], task: Task, data: Data, on_event: Callable[[Event], None] | None
) -> list[Tensor]:
    """For each network, whether it was right on each input: bool (n,)."""
    models = tuple(frozen_copy(model) for model in models)  # in float32, as inputs are
    batches = batches_of(data, task)
    total = len(batches) if isinstance(batches, Labelled) else 0
    right: list[list[Tensor]] = [[] for _ in models]
    done = 0
    for inputs, labels in batches:
        _check_batch(inputs, labels, task)
        for model, name, found in zip(models, names, right, strict=True):
            found.append(_choices(answers(model, task, inputs, name), labels, name) == labels.cpu())
        done += len(labels)
        if on_event is not None:
            on_event(Event("accuracy", done, total))
    if not done:
        raise DataError("the labelled data holds no inputs: give at least one")
    return [torch.cat(found) for found in right]


def _check_batch(inputs: Tensor, labels: Tensor, task: Task) -> None:
    if tuple(inputs.shape[1:]) != task.shape or not inputs.is_floating_point():
        found = f"{inputs.dtype} {tuple(inputs.shape)}"
        raise DataError(f"a batch of inputs is {found}, but the network takes normalised floats (n, {', '.join(map(str, task.shape))})")
    if labels.shape != inputs.shape[:1] or labels.is_floating_point():
        found = f"{labels.dtype} {tuple(labels.shape)}"
        raise DataError(f"the labels of a batch are {found} for {len(inputs)} inputs: expected one whole number each")


def _choices(answer: Tensor, labels: Tensor, name: str) -> Tensor:
    """The class with the highest answer, (n,)."""
    if answer.ndim != 2 or len(answer) != len(labels):
        raise NetworkError(f"the {name} answers {tuple(answer.shape)} to {len(labels)} inputs: accuracy needs (n, classes)")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < answer.shape[1]:
        wrong = int(labels.min()) if int(labels.min()) < 0 else int(labels.max())
        raise DataError(f"label {wrong} is out of range: the {name} has the classes 0..{answer.shape[1] - 1}")
    return answer.argmax(1)


def answers(model: nn.Module, task: Task, inputs: Tensor, name: str) -> Tensor:
    """What ``model`` answers in eval mode, on the CPU; model and inputs stay as they are. Raises NetworkError where that is not finite."""
    if any(module.training for module in model.modules()):
        model = frozen_copy(model)  # the modes of a network that others may be running are left alone
    place = next((tensor.device for tensor in chain(model.parameters(), model.buffers())), inputs.device)
    with torch.no_grad():
        answer = task.run(model, inputs.to(place, copy=True)).cpu()
    wrong = int((~torch.isfinite(answer)).sum())
    if wrong:
        raise NetworkError(f"the {name} answers NaN or infinity ({wrong} of {answer.numel()} values): it cannot be measured")
    return answer
