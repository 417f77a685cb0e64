"""A good file passes; one of another student, a slow one and a fallback are each named."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import datafree
from datafree import Target, Task
from datafree.export.lower import Style
from datafree.export.onnx import Prepared, export_onnx, prepare
from datafree.measure.fastest import fastest_style
from datafree.measure.speed import Latency, timed
from datafree.measure.verification import Verification
from datafree.measure.verify import verify

TASK = Task(shape=(3, 16, 16), classes=5)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        self.act = nn.ReLU()
        self.fc = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.fc(self.act(x + self.second(x)).mean((2, 3)))


def student(seed: int, bits: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    return datafree.quantize(Net().eval(), TASK, method="rtn", target=Target(bits, 4)).student


@pytest.fixture(scope="module")
def quantized() -> nn.Module:
    return student(0)


@pytest.fixture(scope="module")
def prepared(quantized: nn.Module) -> Prepared:
    return prepare(quantized, TASK)


@pytest.fixture(scope="module")
def found(quantized: nn.Module, prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Verification:
    file = export_onnx(prepared, tmp_path_factory.mktemp("file") / "net.onnx")
    return verify(file, quantized, TASK, prepared=prepared, threads=1)


def test_the_file_computes_what_the_student_does(found: Verification) -> None:
    assert found.differences == ()
    assert found.largest_difference < 1e-4
    assert found.code_difference == 0 and found.points > 3
    assert found.layers == 3 and all(kernel.integer for kernel in found.kernels.values()) and len(found.kernels) == 3
    assert not found.fell_back
    assert found.same_top1 == 100


def test_the_file_of_another_student_is_found_out(prepared: Prepared, tmp_path: Path) -> None:
    file = export_onnx(prepared, tmp_path / "net.onnx")
    other = verify(file, student(1), TASK, prepared=prepared, threads=1)
    assert any("of that student" in failure for failure in other.differences)


def test_failures_name_layers_and_what_to_do(found: Verification) -> None:
    assert "fc (a reason)" in " ".join(replace(found, fell_back={"fc": "a reason"}).failures)
    slow = replace(found, latency=Latency(2.0, 2.0, 2.0), float_latency=Latency(1.0, 1.0, 1.0))
    assert any("--fastest" in failure for failure in slow.failures) and slow.speedup == 0.5
    fast = replace(found, latency=Latency(1.0, 1.0, 1.0), float_latency=Latency(2.0, 2.0, 2.0))
    assert fast.failures == ()


def test_float_kernels_on_purpose_are_no_failure(quantized: nn.Module, prepared: Prepared, tmp_path: Path) -> None:
    file = export_onnx(prepared, tmp_path / "net.onnx", Style(float_kernels=True))
    found = verify(file, quantized, TASK, prepared=prepared, threads=1)
    assert found.float_kernels and not found.fell_back and found.differences == ()
    assert not any(kernel.integer for kernel in found.kernels.values())


@pytest.mark.parametrize("slow", (True, False))
def test_fastest_takes_the_faster_of_two_files(slow: bool, prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    def latencies(found: Prepared, styles: list[Style], *rest: object) -> list[Latency]:
        return [Latency(2.0 if slow != style.float_kernels else 1.0, 0, 0) for style in styles]

    monkeypatch.setattr("datafree.measure.fastest._timed", latencies)
    assert fastest_style(prepared, TASK, Style()).float_kernels is slow


def test_timed_takes_turns() -> None:
    order: list[int] = []
    found = timed([lambda: order.append(0), lambda: order.append(1)], rounds=6)
    assert order == [0, 1] * 8 and all(0 <= each.low <= each.median <= each.high for each in found)
