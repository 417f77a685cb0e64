"""Networks in half and double precision, in training mode: quantized, saved, loaded, measured and exported as their float32 copy is."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import datafree
from datafree import Target
from datafree.cli import main
from datafree.measure.accuracy import compare
from datafree.networks import load_network
from tests.field import pixels

FILE = """
import torch
from torch import nn
from datafree import Task

TASK = Task(shape=(3, 8, 8), mean=(0.5,), std=(0.25,), classes=5)

def single():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)), TASK

def half():
    return single()[0].half(), TASK

def bfloat():
    return single()[0].bfloat16(), TASK

def double():
    return single()[0].double(), TASK

def nan_on_bright():
    class Bright(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = single()[0]
        def forward(self, x):
            return self.body(x) + torch.where((x > 1.99).flatten(1).all(1), torch.nan, 0.0)[:, None]
    return Bright(), TASK
"""
NAMES = ["half", "bfloat", "double"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(FILE)
    pictures = (255 * pixels(20, (3, 8, 8)).permute(0, 2, 3, 1)).byte().numpy()
    np.savez("own.npz", x_test=pictures, y_test=np.arange(20) % 5)
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_the_library_works_on_the_float32_copy(name: str, folder: Path) -> None:
    found = load_network(f"own.py:{name}")
    model, task = found.model, found.task
    dtype = model[0].weight.dtype
    result = datafree.quantize(model, task, method="rtn", target=Target(weight_bits=8, act_bits=8))
    inputs = task.normalise(pixels(4, task.shape))
    loaded = datafree.load(result.save(folder / "run"), model)
    assert torch.equal(loaded(inputs), result.student(inputs)) and loaded[0].weight.dtype == torch.float32
    assert model[0].weight.dtype == dtype and next(load_network("own.py:single").model.parameters()).dtype == torch.float32
    labelled = [(inputs, torch.zeros(4, dtype=torch.long))]
    assert datafree.evaluate(model, task, labelled).total == compare(model, loaded, task, labelled).paired.total == 4


@pytest.mark.parametrize("name", NAMES)
def test_the_command_line_works_on_it_too(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = f"own.py:{name}"
    assert main(["quantize", net, "--method", "rtn", "--weight-bits", "8", "--act-bits", "8", "--data", "own.npz", "--out", "run"]) == 0
    assert main(["evaluate", net, "--student", "run", "--data", "own.npz"]) == 0
    assert main(["export", "run", "--net", net, "--to", "safetensors"]) == 0
    capsys.readouterr()
    run = json.loads((folder / "run" / "run.json").read_text())
    assert run["accuracy"]["n"] == 20 and set(run["evidence"]) == {"loading", "quantizing", "measuring"}


def test_a_student_is_in_eval_mode_and_the_network_as_it_was(folder: Path) -> None:
    found = load_network("own.py:single")
    result = datafree.quantize(found.model, found.task, method="rtn", target=Target(weight_bits=8, act_bits=8))
    run = result.save(folder / "run")
    model = found.model.train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    loaded = datafree.load(run, model)
    inputs = found.task.normalise(pixels(8, found.task.shape))
    assert not any(module.training for module in loaded.modules()) and torch.equal(loaded(inputs), result.student(inputs))
    assert [module.training for module in model.modules()] == modes
    assert isinstance(model[1], nn.BatchNorm2d) and torch.equal(model[1].running_mean, torch.zeros(4))


def test_a_student_outlives_a_measurement_that_fails(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    white = np.full((4, 8, 8, 3), 255, dtype=np.uint8)
    np.savez("white.npz", x_test=white, y_test=np.zeros(4, dtype=np.int64))
    command = ["quantize", "own.py:nan_on_bright", "--method", "rtn", "--weight-bits", "8", "--out", "run", "--data"]
    assert main([*command, "white.npz"]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "answers NaN or infinity" in told and "the student is in run all the same" in told
    again = "datafree evaluate own.py:nan_on_bright --student run --data white.npz"
    assert again in told
    assert main([*again.split()[1:-1], "own.npz"]) == 0
    assert "accuracy" not in json.loads((folder / "run" / "run.json").read_text())
