"""How closely the student answers like the teacher, measured on noise: no data is needed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from datafree.errors import DataError, NetworkError
from datafree.measure.accuracy import answers
from datafree.measure.data import inputs_per_batch
from datafree.task import Task

SOURCE = "noise"  # what ``Task.noise`` gives


@dataclass(frozen=True)
class Fidelity:
    """Likeness of student and teacher on inputs that are not real: this is fidelity, never accuracy.

    Args:
        agreement: percent of the choices that are the same, along the class axis; None where there is no class axis.
        kl: mean Kullback-Leibler divergence KL(teacher || student) in nats along the class axis; None where there is none.
        sqnr: signal to quantization noise of the raw answers in dB; infinite where they are equal.
        n: how many inputs.
        source: what the inputs were.
    """

    agreement: float | None
    kl: float | None
    sqnr: float
    n: int
    source: str


def fidelity(teacher: nn.Module, student: nn.Module, task: Task, generator: torch.Generator, n: int = 256) -> Fidelity:
    """Compare the answers of both networks to ``n`` inputs of noise: this is fidelity, never accuracy.

    Raises:
        DataError: ``n`` is not positive.
        NetworkError: an answer that is not finite, or answers of different shapes.
    """
    if n < 1:
        raise DataError(f"fidelity needs at least one input, not n={n}")
    agreed: list[Tensor] = []
    divergences: list[Tensor] = []
    signal = noise = 0.0
    batch = batch_axis(teacher, task)
    for size in _sizes(n, inputs_per_batch(task.shape)):
        inputs = task.noise(size, generator)
        first = answers(teacher, task, inputs, "teacher").double()
        second = answers(student, task, inputs, "student").double()
        if first.shape != second.shape:
            raise NetworkError(f"the teacher answers {tuple(first.shape)}, the student {tuple(second.shape)}: they cannot be compared")
        signal += float(first.square().sum())
        noise += float((first - second).square().sum())
        axis = class_axis(task, first.shape, batch)
        if axis is not None:
            agreed.append((first.argmax(axis) == second.argmax(axis)).flatten())
            divergences.append(divergence(first, second, axis).flatten())
    agreement = 100 * float(torch.cat(agreed).double().mean()) if agreed else None
    kl = float(torch.cat(divergences).mean()) if divergences else None
    return Fidelity(agreement, kl, _decibels(signal, noise), n, SOURCE)


def class_axis(task: Task, shape: Sequence[int], batch: int | None = 0) -> int | None:
    """The axis of an answer of this shape along which classes compete; None where there is none, or it cannot be told.

    Where ``task.classes`` is known it is the one axis of that size, and the first beside the batch if several have it; else an answer
    (n, classes) alone has one. ``batch`` is the axis of the inputs, which never counts; None where no axis is.
    """
    if batch is None:
        return None
    others = [axis for axis in range(len(shape)) if axis != batch]
    classes = len(task.classes) if isinstance(task.classes, tuple) else task.classes
    if classes is None:
        return others[0] if len(others) == 1 and shape[others[0]] > 1 else None
    found = [axis for axis in others if shape[axis] == classes > 1]
    return found[0] if found and (len(found) == 1 or found[0] == others[0]) else None


def batch_axis(model: nn.Module, task: Task) -> int | None:
    """The axis of the network's answer whose size follows the number of inputs; None where none does, or several do."""
    noise = task.noise(3, torch.Generator().manual_seed(0))
    one, other = (answers(model, task, noise[:n], "network").shape for n in (2, 3))
    changed = [axis for axis, sizes in enumerate(zip(one, other, strict=False)) if sizes[0] != sizes[1]]
    return changed[0] if len(changed) == 1 and len(one) == len(other) else None


def _sizes(n: int, most: int) -> list[int]:
    full, rest = divmod(n, most)
    return [most] * full + [rest] * bool(rest)


def divergence(teacher: Tensor, student: Tensor, axis: int = 1) -> Tensor:
    """KL(teacher || student) of logits along the axis of the classes, which the result lacks: (n,) of (n, classes)."""
    first, second = teacher.log_softmax(axis), student.log_softmax(axis)
    return (first.exp() * (first - second)).sum(axis).clamp(min=0)  # rounding may leave a tiny negative


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
