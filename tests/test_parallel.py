"""Two processes, started as a user starts them, train one student; what each of them found is written by two_processes.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from datafree import parallel

HERE = Path(__file__).parent
Found = dict[str, dict[str, object]]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("two")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*start, str(HERE / "two_processes.py"), str(folder)], cwd=HERE.parent, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, folder


@pytest.fixture(scope="module")
def both(launched: tuple[str, Path]) -> tuple[Found, Found]:
    first, second = (json.loads((launched[1] / f"{rank}.json").read_text()) for rank in (0, 1))
    return first, second


def test_gradients_and_losses_are_averaged_over_draws_of_their_own(both: tuple[Found, Found]) -> None:
    one, other = (each["descend"] for each in both)
    x, losses = 0.0, []  # where the first process began, and not at 1 as the second
    assert isinstance(one["aims"], list) and isinstance(other["aims"], list)
    for step, aims in enumerate(zip(one["aims"], other["aims"], strict=True)):
        assert aims[0] != aims[1]
        losses.append(sum((x - aim) ** 2 for aim in aims) / 2 - 0.05 * step / 2)
        x -= 0.1 * sum(2 * (x - aim) for aim in aims) / 2
    assert one["x"] == other["x"] == pytest.approx(x, rel=1e-5) and one["losses"] == other["losses"] == pytest.approx(losses, rel=1e-5)
    assert one["y"] == other["y"] == pytest.approx(-0.15), "a gradient that one process has counts by half"
    assert one["next"] == other["next"], "afterwards they draw alike again"


def test_both_end_with_the_same_student_and_generator_though_their_inputs_differ(both: tuple[Found, Found]) -> None:
    one, other = (each["learn"] for each in both)
    assert [one[key] for key in ("student", "generator", "losses")] == [other[key] for key in ("student", "generator", "losses")]
    assert one["inputs"] != other["inputs"]


def test_killed_they_resume_to_the_same_bits(both: tuple[Found, Found], launched: tuple[str, Path]) -> None:
    for each in both:
        assert each["resumed"] == each["learn"]
    assert len(list((launched[1] / "checkpoints").iterdir())) == 1


def test_what_is_no_number_in_one_of_them_stops_both(both: tuple[Found, Found]) -> None:
    assert [each["blame"] for each in both] == ["descend: the shape is inf at step 1: lower the learning rate"] * 2


def test_the_first_alone_tells_how_far_it_is(both: tuple[Found, Found]) -> None:
    one, other = (each["quantized"] for each in both)
    assert one["student"] == other["student"] and one["processes"] == 2
    assert (one["told"], other["told"]) == (["distill", "generator"], [])


def test_a_method_that_trains_nothing_is_refused(both: tuple[Found, Found]) -> None:
    assert [each["refused"] for each in both] == ["rtn trains nothing that 2 processes could share: start it without torchrun"] * 2


def test_the_command_writes_and_prints_once(both: tuple[Found, Found], launched: tuple[str, Path]) -> None:
    printed, folder = launched
    assert [each["command"] for each in both] == [0, 0]
    assert printed.count("files in") == 1 and [each.name for each in folder.glob("run*")] == ["run"]
    assert json.loads((folder / "run" / "run.json").read_text())["processes"] == 2


def test_after_an_error_the_processes_draw_alike_again(monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    for rank in (0, 1):
        monkeypatch.setattr(parallel, "count", lambda: 2)
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        random = torch.Generator().manual_seed(0)
        with pytest.raises(KeyError), parallel.apart(random):
            torch.rand(1 + rank, generator=random)
            raise KeyError
        states.append(random.get_state())
    assert torch.equal(*states)


def test_alone_nothing_is_changed() -> None:
    x, random = torch.ones(2, requires_grad=True), torch.Generator().manual_seed(0)
    x.grad = torch.tensor([1.0, 2.0])
    before = random.get_state()
    parallel.average_gradients([x])
    parallel.align([x])
    with parallel.apart(random):
        assert torch.equal(random.get_state(), before)
    assert torch.equal(random.get_state(), before) and x.grad.tolist() == [1.0, 2.0] and parallel.join("cpu") == "cpu"
    assert (parallel.count(), parallel.rank(), parallel.gathered("a"), parallel.agreed("a")) == (1, 0, ["a"], "a")
    value: Tensor = x.sum()
    assert parallel.mean(value) == 2 and not parallel.mean(value).requires_grad
