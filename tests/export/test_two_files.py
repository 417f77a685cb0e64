"""Weights that one protobuf message cannot hold stand in a second file: written, run, verified and measured with it."""

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from datafree import quantize
from datafree.errors import ExportError, OutputError
from datafree.export.files import size_of
from datafree.export.lower import Style
from datafree.export.onnx import Prepared, export_float_onnx, export_onnx, prepare
from datafree.export.runtime import open_file
from datafree.measure.verify import verify
from datafree.plan import Target
from datafree.task import Task
from tests.networks import build

LIMIT = 2000  # bytes of a file


@pytest.fixture(scope="module")
def made() -> tuple[nn.Module, Task, Prepared]:
    model, task = build("resnet_basic")
    student = quantize(model, task, method="rtn", target=Target(4, 8)).student
    return student, task, replace(prepare(student, task), limit=LIMIT)


@pytest.mark.parametrize("packing", ["ort", "portable"])
def test_two_files_do_what_one_does(made: tuple[nn.Module, Task, Prepared], packing: str, tmp_path: Path) -> None:
    student, task, prepared = made
    style = Style(packing)  # type: ignore[arg-type]
    two = export_onnx(prepared, tmp_path / "two.onnx", style)
    one = export_onnx(replace(prepared, limit=2**31), tmp_path / "one.onnx", style)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["one.onnx", "two.onnx", "two.onnx.data"]
    x = task.noise(4, torch.Generator().manual_seed(3)).numpy()
    assert (open_file(one, 1).run(x)["output"] == open_file(two, 1).run(x)["output"]).all()
    found = verify(two, student, task, prepared=prepared, threads=1)  # its float reference stands in two files as well
    assert not found.differences and not found.fell_back and found.integer_layers == found.layers == len(found.kernels)
    assert found.file_bytes == size_of(two) == two.stat().st_size + (tmp_path / "two.onnx.data").stat().st_size


def test_the_float_network_in_two_files(made: tuple[nn.Module, Task, Prepared], tmp_path: Path) -> None:
    _, task, prepared = made
    x = task.noise(4, torch.Generator().manual_seed(3)).numpy()
    two = export_float_onnx(prepared, tmp_path / "two.onnx")
    one = export_float_onnx(replace(prepared, limit=2**31), tmp_path / "one.onnx")
    assert (tmp_path / "two.onnx.data").exists()
    assert (open_file(one, 1).run(x)["output"] == open_file(two, 1).run(x)["output"]).all()


def test_openvino_reads_what_takes_two_files(made: tuple[nn.Module, Task, Prepared], tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install 'datafree[openvino]'")
    from datafree.export.openvino import export_openvino

    student, task, prepared = made
    found = verify(export_openvino(prepared, tmp_path / "m.xml"), student, task, prepared=prepared, threads=1)
    assert not found.differences


def test_a_missing_second_file_is_reported(made: tuple[nn.Module, Task, Prepared], tmp_path: Path) -> None:
    file = export_onnx(made[2], tmp_path / "m.onnx")
    (tmp_path / "m.onnx.data").unlink()
    with pytest.raises(ExportError, match=r"m.onnx: .*possible cause: a damaged file, a missing .data beside it"):
        open_file(file)


def test_the_second_file_of_another_export_is_not_counted(made: tuple[nn.Module, Task, Prepared], tmp_path: Path) -> None:
    export_onnx(made[2], tmp_path / "m.onnx")
    file = export_onnx(replace(made[2], limit=2**31), tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx.data").exists() and size_of(file) == file.stat().st_size


def test_both_files_or_none(made: tuple[nn.Module, Task, Prepared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.onnx").write_bytes(b"what was there before")
    move = os.replace

    def full(source: Path, target: Path) -> None:
        if target == tmp_path / "m.onnx.data":
            raise OSError(errno.ENOSPC, "No space left on device")
        move(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match=r"m.onnx.*No space left"):
        export_onnx(made[2], tmp_path / "m.onnx")
    assert [each.name for each in tmp_path.iterdir()] == ["m.onnx"] and (tmp_path / "m.onnx").read_bytes() == b"what was there before"
