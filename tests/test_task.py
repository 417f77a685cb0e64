"""The task: what it refuses, how it normalises, where it finds the answer."""

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from datafree.errors import NetworkError
from datafree.outputs import named_outputs
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


@dataclass
class Found:
    """As detectors return it."""

    logits: Tensor
    boxes: Tensor | None = None


class Pair(NamedTuple):
    boxes: Tensor
    logits: Tensor


OTHER = torch.zeros(1)


@pytest.mark.parametrize(
    ("result", "output"),
    [
        (LOGITS, None),
        ((LOGITS,), None),
        ([LOGITS], None),
        ({"logits": LOGITS}, None),
        (Found(LOGITS), None),
        ((OTHER, LOGITS), 1),
        ((OTHER, LOGITS), -1),
        ({"logits": LOGITS, "loss": OTHER}, "logits"),
        ({0: OTHER, 1: LOGITS}, 1),
        (Found(LOGITS, OTHER), "logits"),
        (Pair(OTHER, LOGITS), "logits"),
        (Pair(OTHER, LOGITS), 1),
        (({"a": LOGITS}, OTHER), 0),
        ({"maps": [OTHER, LOGITS]}, "maps_1"),
        ([{"logits": LOGITS[:2]}, {"logits": LOGITS[2:]}], None),
        ([{"logits": LOGITS[:2], "b": OTHER}, {"logits": LOGITS[2:], "b": LOGITS}], "logits"),
        ([Found(LOGITS[:2], OTHER), Found(LOGITS[2:], OTHER)], "logits"),
    ],
)
def test_the_answer_is_found(result: object, output: int | str | None) -> None:
    found = Task(output=output).run(Answers(result), LOGITS)
    assert torch.equal(found.flatten(), LOGITS)
    assert next(iter(named_outputs(result, output).values())).equal(found)  # exported files have the same answer, as their first output


@pytest.mark.parametrize(
    ("result", "output", "message"),
    [
        (LOGITS, 0, "Task.output is 0, but the network returned a Tensor: leave it out"),
        (
            (LOGITS, OTHER),
            None,
            "the network returned output_0 (4,), output_1 (1,): choose the answer with Task.output, a position from 0 to 1",
        ),
        (
            Found(LOGITS, OTHER),
            None,
            "the network returned logits (4,), boxes (1,): choose the answer with Task.output, one of 'logits', 'boxes'",
        ),
        (
            Found(LOGITS, OTHER),
            0,
            "the network returned logits (4,), boxes (1,): Task.output 0 is none of its parts; choose one of 'logits', 'boxes'",
        ),
        ({"logits": LOGITS}, "boxes", "the network returned logits (4,): Task.output 'boxes' is none of its parts; choose one of 'logits'"),
        ((LOGITS,), 3, "the network returned output_0 (4,): Task.output 3 is none of its parts; choose a position from 0 to 0"),
        (
            {"maps": [OTHER, LOGITS]},
            "maps",
            "the network returned maps_0 (1,), maps_1 (4,): Task.output 'maps' holds 2 tensors; choose one of 'maps_0', 'maps_1'",
        ),
        (None, None, "the network returned a NoneType without a tensor: let its forward return its answer"),
        (
            {"a": [LOGITS], "a_0": OTHER},
            "a",
            "two parts of what the network returned are called 'a_0': rename one",
        ),
    ],
)
def test_an_answer_that_is_not_there_is_reported(result: object, output: int | str | None, message: str) -> None:
    with pytest.raises(NetworkError) as caught:
        Task(output=output).run(Answers(result), LOGITS)
    assert str(caught.value) == message


def test_boxes_that_differ_in_number_are_no_answer() -> None:
    """As those of a detector that throws away most of what it finds."""
    with pytest.raises(NetworkError, match=r"boxes_0 \(3, 4\), boxes_1 \(5, 4\).*a different shape for each input"):
        Task(output="boxes").answer([{"boxes": torch.zeros(n, 4)} for n in (3, 5)])


@pytest.mark.parametrize(
    ("result", "output", "names"),
    [
        (LOGITS, None, ["output"]),
        ((OTHER, LOGITS, OTHER.clone()), 1, ["output", "output_0", "output_2"]),
        ({"boxes": OTHER, "logits": LOGITS}, "logits", ["logits", "boxes"]),
        (Found(LOGITS, OTHER), "boxes", ["boxes", "logits"]),
        ((LOGITS, [OTHER, {"a": OTHER.clone()}], 3), 0, ["output", "output_1_0", "output_1_1_a"]),
        ({"logits": LOGITS, "maps": (OTHER, OTHER.clone()), "loss": None}, "logits", ["logits", "maps_0", "maps_1"]),
    ],
)
def test_outputs_are_named(result: object, output: int | str | None, names: list[str]) -> None:
    assert list(named_outputs(result, output)) == names
