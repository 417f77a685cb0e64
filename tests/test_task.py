"""The task: what it refuses, how it normalises, where it finds the answer."""

import pytest
import torch
from torch import Tensor, nn

from datafree.errors import NetworkError
from datafree.task import Task

REFUSED: tuple[tuple[dict[str, object], str], ...] = (
    ({"shape": ()}, "Task.shape () must be positive sizes such as (3, 32, 32)"),
    ({"shape": (3, 0, 32)}, "Task.shape (3, 0, 32) must be positive sizes such as (3, 32, 32)"),
    ({"shape": (3, -1, 32)}, "Task.shape (3, -1, 32) must be positive sizes such as (3, 32, 32)"),
    ({"mean": (0.1, 0.2)}, "Task.mean has 2 values for 3 channels: give 1 or 3"),
    ({"std": ()}, "Task.std has 0 values for 3 channels: give 1 or 3"),
    ({"std": (1.0, 0.0, 1.0)}, "Task.std must be positive, not (1.0, 0.0, 1.0)"),
    ({"std": (-1.0,)}, "Task.std must be positive, not (-1.0,)"),
)


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_a_task_that_makes_no_sense_is_told(values: dict[str, object], message: str) -> None:
    with pytest.raises(NetworkError) as caught:
        Task(**values)  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_normalise() -> None:
    pixels = torch.full((2, 3, 4, 4), 0.5)
    task = Task(shape=(3, 4, 4), mean=(0.5, 0.25, 0.0), std=(1.0, 0.5, 0.25))
    assert torch.equal(task.normalise(pixels)[0, :, 0, 0], torch.tensor([0.0, 0.5, 2.0]))
    assert torch.equal(Task(shape=(3, 4, 4), mean=(0.25,), std=(0.5,)).normalise(pixels), pixels)
    assert torch.equal(Task(shape=(8,), mean=(1.0,)).normalise(torch.ones(2, 8)), torch.zeros(2, 8))


def test_noise_comes_from_the_generator() -> None:
    task = Task(shape=(3, 4, 4))
    first, again = (task.noise(5, torch.Generator().manual_seed(1)) for _ in range(2))
    assert first.shape == (5, 3, 4, 4) and torch.equal(first, again)


class Answers(nn.Module):
    """A network that returns what it was given."""

    def __init__(self, result: object) -> None:
        super().__init__()
        self.result = result

    def forward(self, x: Tensor) -> object:
        return self.result


LOGITS = torch.arange(4.0)


@pytest.mark.parametrize(
    ("result", "output"),
    [
        (LOGITS, None),
        ((LOGITS,), None),
        ([LOGITS], None),
        ((torch.zeros(1), LOGITS), 1),
        ({"logits": LOGITS, "loss": torch.zeros(1)}, "logits"),
    ],
)
def test_the_answer_is_found(result: object, output: int | str | None) -> None:
    assert torch.equal(Task(output=output).run(Answers(result), LOGITS), LOGITS)


@pytest.mark.parametrize(
    ("result", "output", "message"),
    [
        (LOGITS, 0, "Task.output is 0, but the network returned a Tensor: leave it out"),
        ((LOGITS, LOGITS), None, "the network returned a tuple, not a tensor: name its part with Task.output"),
        ({"logits": LOGITS}, None, "the network returned a dict, not a tensor: name its part with Task.output"),
        ({"logits": LOGITS}, "boxes", "the network's answer has no part 'boxes': 'boxes'"),
        ((LOGITS,), 3, "the network's answer has no part 3: tuple index out of range"),
        (({"a": LOGITS}, LOGITS), 0, "the network returned a dict, not a tensor: name its part with Task.output"),
    ],
)
def test_an_answer_that_is_not_there_is_told(result: object, output: int | str | None, message: str) -> None:
    with pytest.raises(NetworkError) as caught:
        Task(output=output).run(Answers(result), LOGITS)
    assert str(caught.value) == message
