"""Counting right answers, alone and in pairs."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from datafree.context import Event
from datafree.errors import DataError, NetworkError
from datafree.measure.accuracy import Accuracy, Paired, answers, compare, evaluate
from datafree.task import Task
from datafree.zoo.digits import digits, held_out

TASK = Task(shape=(4,))


class Rotate(nn.Module):
    """Answers with the input, its classes shifted."""

    def __init__(self, shift: int = 0) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(float(shift)))
        self.dropout = nn.Dropout(0.9)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(x.roll(int(self.shift), 1))


def one_hot(classes: list[int]) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(classes), 4).float()


DATA = (one_hot([0, 1, 2, 3, 1]), torch.tensor([0, 1, 2, 0, 2]))


def test_evaluate_counts_right_answers() -> None:
    found = evaluate(Rotate(), TASK, DATA)
    assert found == Accuracy(3, 5) and found.top1 == 60.0


def test_compare_counts_pairs_in_one_pass() -> None:
    passes = []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        passes.append(1)
        yield DATA[0][:2], DATA[1][:2]
        yield DATA[0][2:], DATA[1][2:]

    found = compare(Rotate(), Rotate(1), TASK, batches())
    assert found.paired == Paired(both=0, only_teacher=3, only_student=2, neither=0)
    assert (found.teacher, found.student, len(passes)) == (Accuracy(3, 5), Accuracy(2, 5), 1)
    assert found.paired.drop == 20.0


def test_half_width_matches_the_formula_of_agresti_and_min() -> None:
    paired = Paired(both=900, only_teacher=40, only_student=20, neither=40)
    first = (0.5 + 40) / 1002
    second = (0.5 + 20) / 1002
    expected = 196 * np.sqrt((first + second - (first - second) ** 2) / 1002)
    assert paired.half_width == pytest.approx(expected)
    assert Paired(10000, 0, 0, 0).half_width > 0


def test_half_width_covers_the_true_drop_in_95_of_100_samples() -> None:
    cells = np.array([0.80, 0.08, 0.05, 0.07])
    samples = np.random.default_rng(0).multinomial(500, cells, size=2000)
    covered = [abs(pair.drop - 3.0) <= pair.half_width for pair in (Paired(*map(int, row)) for row in samples)]
    assert 0.93 < np.mean(covered) < 0.97


def test_progress_is_told(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x_test=np.zeros((300, 2, 2), np.uint8), y_test=np.zeros(300, int))
    events: list[Event] = []
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    found = evaluate(network, Task(shape=(1, 2, 2)), tmp_path / "data.npz", events.append)
    assert found.total == 300
    assert events == [Event("accuracy", 256, 300), Event("accuracy", 300, 300)]
    evaluate(Rotate(), TASK, [DATA], events.append)
    assert events[-1] == Event("accuracy", 5, 0)  # how much there is of an iterable is not known


class Spy(nn.Module):
    """Notes the mode of the network that others may be running, and writes into its input."""

    def __init__(self, seen: list[nn.Module], modes: list[bool]) -> None:
        super().__init__()
        self.look = lambda: modes.append(seen[0].training)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        self.look()
        return self.dropout(x.mul_(2))


def test_a_network_in_training_mode_stays_in_it_while_it_is_measured() -> None:
    shown: list[nn.Module] = []
    modes: list[bool] = []
    network = Spy(shown, modes).train()
    shown.append(network)
    inputs = DATA[0].clone()
    assert torch.equal(answers(network, TASK, inputs, "network"), 2 * DATA[0])
    assert modes == [True] and torch.equal(inputs, DATA[0]), "the mode was changed, or the input"


def test_answers_come_from_eval_mode_and_the_mode_is_restored() -> None:
    network = Rotate().train()
    network.dropout.eval()
    assert torch.equal(answers(network, TASK, DATA[0], "network"), DATA[0])
    assert network.training and not network.dropout.training
    network.dropout.train()
    answer = answers(network, TASK, DATA[0], "network")
    assert torch.equal(answer, DATA[0]) and not answer.requires_grad
    assert network.dropout.training


def test_embedded_network_on_its_held_out_digits() -> None:
    model, task = digits()
    assert evaluate(model, task, held_out()).top1 > 95


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "holds no inputs"),
        ([(torch.zeros(2, 5), torch.zeros(2).long())], r"float32 \(2, 5\), but the network takes normalised floats \(n, 4\)"),
        ([(torch.zeros(2, 4).byte(), torch.zeros(2).long())], r"uint8 \(2, 4\)"),
        ([(torch.zeros(2, 4), torch.zeros(2))], r"labels of a batch are torch.float32 \(2,\)"),
        ([(torch.zeros(2, 4), torch.zeros(3).long())], r"labels of a batch are torch.int64 \(3,\) for 2 inputs"),
        ([(torch.zeros(2, 4), torch.tensor([1, 4]))], "label 4 is out of range: the network has the classes 0..3"),
        ([(torch.zeros(2, 4), torch.tensor([-1, 3]))], "label -1 is out of range"),
    ],
)
def test_batches_that_do_not_fit_are_refused(data: list[tuple[Tensor, Tensor]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        evaluate(Rotate(), TASK, data)


def test_answers_that_cannot_be_counted_are_refused() -> None:
    with pytest.raises(NetworkError, match=r"the network answers \(5, 2, 2\) to 5 inputs: accuracy needs \(n, classes\)"):
        evaluate(nn.Unflatten(1, (2, 2)), TASK, DATA)
    with pytest.raises(NetworkError, match=r"the student answers NaN or infinity \(20 of 20 values\)"):
        compare(Rotate(), nn.Threshold(2, float("nan")), TASK, DATA)
