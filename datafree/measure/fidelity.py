"""How closely the student answers like the teacher, measured on noise: no data is needed."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from datafree.errors import DataError, NetworkError
from datafree.measure.accuracy import answers
from datafree.measure.data import inputs_per_batch
from datafree.task import Task


@dataclass(frozen=True)
class Fidelity:
    """Likeness of student and teacher on inputs that are not real: this is fidelity, never accuracy.

    Args:
        agreement: percent of the answers whose highest channel (axis 1) is the same; None where there is no choice of channels.
        kl: mean Kullback-Leibler divergence KL(teacher || student) in nats; None where the answer is not (n, classes).
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
    """Compare the answers of both networks to ``n`` standard normal inputs: this is fidelity, never accuracy.

    Raises:
        DataError: ``n`` is not positive.
        NetworkError: an answer that is not finite, or answers of different shapes.
    """
    if n < 1:
        raise DataError(f"fidelity needs at least one input, not n={n}")
    agreed: list[Tensor] = []
    divergences: list[Tensor] = []
    signal = noise = 0.0
    for size in _sizes(n, inputs_per_batch(task.shape)):
        inputs = task.noise(size, generator)
        first = answers(teacher, task, inputs, "teacher").double()
        second = answers(student, task, inputs, "student").double()
        if first.shape != second.shape:
            raise NetworkError(f"the teacher answers {tuple(first.shape)}, the student {tuple(second.shape)}: they cannot be compared")
        signal += float(first.square().sum())
        noise += float((first - second).square().sum())
        if first.ndim >= 2 and first.shape[1] > 1:
            agreed.append((first.argmax(1) == second.argmax(1)).flatten())
        if first.ndim == 2 and first.shape[1] > 1:
            divergences.append(divergence(first, second))
    agreement = 100 * float(torch.cat(agreed).double().mean()) if agreed else None
    kl = float(torch.cat(divergences).mean()) if divergences else None
    return Fidelity(agreement, kl, _decibels(signal, noise), n, "standard normal noise")


def _sizes(n: int, most: int) -> list[int]:
    full, rest = divmod(n, most)
    return [most] * full + [rest] * bool(rest)


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) of each row of logits, (n,)."""
    first, second = teacher.log_softmax(1), student.log_softmax(1)
    return (first.exp() * (first - second)).sum(1).clamp(min=0)  # rounding may leave a tiny negative


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
