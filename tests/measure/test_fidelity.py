"""Likeness of two networks on noise."""

import math
from dataclasses import asdict

import pytest
import torch
from torch import Tensor, nn

from datafree.errors import DataError, NetworkError
from datafree.measure.fidelity import class_axis, fidelity
from datafree.report.content import fidelity_text
from datafree.task import Task

TASK = Task(shape=(3, 8, 8))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def linear(scale: float = 1.0) -> nn.Module:
    layer = nn.Linear(192, 5)
    with torch.no_grad():
        layer.weight.copy_(scale * torch.randn(5, 192, generator=torch.Generator().manual_seed(0)))
        layer.bias.zero_()
    return nn.Sequential(nn.Flatten(), layer)


def test_network_is_faithful_to_itself() -> None:
    found = fidelity(linear(), linear(), TASK, seeded(), 300)
    assert (found.agreement, found.kl, found.sqnr, found.n, found.source) == (100.0, 0.0, math.inf, 300, "noise")


def test_scaled_network_chooses_the_same_with_other_certainty() -> None:
    found = fidelity(linear(), linear(0.9), TASK, seeded(), 300)
    logits = linear()(TASK.noise(256, (generator := seeded())))
    logits = torch.cat([logits, linear()(TASK.noise(44, generator))]).double()  # the same noise, in the same batches
    expected = nn.functional.kl_div((0.9 * logits).log_softmax(1), logits.softmax(1), reduction="batchmean")
    assert found.agreement == 100.0
    assert found.kl == pytest.approx(float(expected.detach()), rel=1e-4) and found.kl > 1e-4
    assert found.sqnr == pytest.approx(20.0, abs=1e-3)  # a tenth is missing


def test_opposite_network_never_agrees() -> None:
    assert fidelity(linear(), linear(-1.0), TASK, seeded(), 64).agreement == 0.0


def test_same_generator_gives_the_same_figures() -> None:
    student = linear()
    with torch.no_grad():
        student[1].weight.mul_(8).round_().div_(8)
    first, second = (fidelity(linear(), student, TASK, seeded(), 64) for _ in range(2))
    assert first == second and first.kl is not None and first.kl > 0


def test_maps_of_classes_are_compared_along_them() -> None:
    task = Task(shape=(3, 8, 8), classes=3)
    found = fidelity(nn.Identity(), nn.Hardtanh(-0.5, 0.5), task, seeded(), 16)
    inputs = task.noise(16, seeded()).double()
    other = inputs.clamp(-0.5, 0.5)
    expected = (inputs.argmax(1) == other.argmax(1)).float().mean()
    divergence = (inputs.softmax(1) * (inputs.log_softmax(1) - other.log_softmax(1))).sum(1).mean()
    assert found.agreement == pytest.approx(100 * float(expected)) and found.kl == pytest.approx(float(divergence))
    assert 0 < found.sqnr < 12


def test_maps_whose_channels_are_no_classes_are_not_compared_by_class() -> None:
    found = fidelity(nn.Identity(), nn.Hardtanh(-0.5, 0.5), TASK, seeded(), 16)
    assert (found.agreement, found.kl) == (None, None) and 0 < found.sqnr < 12
    assert fidelity_text(asdict(found)) == f"SQNR {found.sqnr:.1f} dB (no class axis)"


class StepsFirst(nn.Module):
    """Answers (steps, batch, classes), as networks that read lines of text do."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return (self.scale * x.flatten(2)[:, :1, :56]).unflatten(2, (8, 7)).squeeze(1).transpose(0, 1)


@pytest.mark.parametrize("scale", (0.5, -1.0))
def test_the_batch_is_no_class_axis_wherever_it_stands(scale: float) -> None:
    for classes in (7, None, 5):  # five is the size of the batch
        found = fidelity(StepsFirst(1.0), StepsFirst(scale), Task(shape=(3, 8, 8), classes=classes), seeded(), 5)
        assert found.agreement == ((100.0 if scale > 0 else 0.0) if classes == 7 else None), classes
        assert (found.kl is None) == (found.agreement is None)


@pytest.mark.parametrize(
    ("classes", "shape", "batch", "axis"),
    (
        (None, (8, 5), 0, 1),
        (None, (8, 1), 0, None),
        (None, (8, 3, 4, 4), 0, None),
        (None, (8,), 0, None),
        (5, (8, 5), 0, 1),
        (5, (8, 4), 0, None),
        (5, (5, 8), 1, 0),
        (5, (5, 4, 4), 0, None),
        (5, (8, 5, 4, 4), 0, 1),
        (5, (8, 4, 4, 5), 0, 3),
        (5, (8, 5, 5, 5), 0, 1),
        (5, (8, 4, 5, 5), 0, None),
        (("a", "b"), (8, 2), 0, 1),
        (5, (5, 5), None, None),
        (1, (8, 1), 0, None),
    ),
)
def test_the_class_axis(classes: int | tuple[str, ...] | None, shape: tuple[int, ...], batch: int | None, axis: int | None) -> None:
    assert class_axis(Task(shape=(3, 8, 8), classes=classes), shape, batch) == axis


def test_single_channel_leaves_no_choice_to_agree_on() -> None:
    found = fidelity(nn.Identity(), nn.Hardtanh(0.0, 0.5), Task(shape=(1, 4, 4)), seeded(), 8)
    assert found.agreement is None and found.kl is None and 0 < found.sqnr < 12


def test_teacher_that_answers_zero_has_no_signal() -> None:
    assert fidelity(nn.Threshold(99, 0.0), nn.Identity(), TASK, seeded(), 2).sqnr == -math.inf


def test_answers_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(NetworkError, match=r"the teacher answers \(4, 3, 8, 8\), the student \(4, 5\)"):
        fidelity(nn.Identity(), linear(), TASK, seeded(), 4)
    with pytest.raises(NetworkError, match=r"the student answers NaN or infinity \(20 of 20 values\)"):
        fidelity(linear(), linear(math.nan), TASK, seeded(), 4)
    with pytest.raises(DataError, match="at least one input, not n=0"):
        fidelity(linear(), linear(), TASK, seeded(), 0)
