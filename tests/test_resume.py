"""A command killed in the middle of synthesis, given again, comes to the same student bit for bit, and says so."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from datafree import cli

ROOT = Path(__file__).parents[1]
COMMAND = ("quantize", "digits", "--method", "zeroq", "--steps", "70", "--pictures", "2", "--weight-bits", "4", "--act-bits", "4")


def notes(run: Path) -> list[str]:
    found = json.loads((run / "run.json").read_text())["notes"]
    assert isinstance(found, list)
    return found


def weights(run: Path) -> bytes:
    return (run / "student.safetensors").read_bytes()


def kill_at_first_checkpoint(run: Path) -> None:
    """Start the command as a process of its own, and end it by SIGKILL once a checkpoint is there."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-m", "datafree", *COMMAND, "--out", str(run)], env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not any(run.parent.glob(f".{run.name}.resume/*/*.pt")):
        assert process.poll() is None and time.monotonic() < deadline, "it ended without a checkpoint"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not run.exists()


def test_killed_in_the_middle_it_resumes_to_the_same_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, run, other = tmp_path / "whole", tmp_path / "run", tmp_path / "run-of-other-settings"
    assert cli.main([*COMMAND, "--out", str(whole)]) == 0
    kill_at_first_checkpoint(run)

    (tmp_path / ".run.resume").rename(tmp_path / f".{other.name}.resume")
    assert cli.main([*COMMAND, "--seed", "1", "--out", str(other)]) == 0  # not taken, but told
    assert ["not taken" in note for note in notes(other)] == [True]
    (tmp_path / f".{other.name}.resume").rename(tmp_path / ".run.resume")

    capsys.readouterr()
    assert cli.main([*COMMAND, "--out", str(run)]) == 0
    assert weights(run) == weights(whole) != weights(other)
    (note,) = notes(run)
    assert note.startswith("pictures, batch 1 of 1: resumed at step ") and note in " ".join(capsys.readouterr().out.split())
    assert sorted(each.name for each in tmp_path.iterdir()) == ["run", "run-of-other-settings", "whole"]


def test_what_needs_no_checkpoint_leaves_none(tmp_path: Path) -> None:
    assert cli.main(["quantize", "digits", "--method", "rtn", "--out", str(tmp_path / "run")]) == 0
    assert [each.name for each in tmp_path.iterdir()] == ["run"]
