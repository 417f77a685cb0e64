"""From a student to a file and back through ONNX Runtime, at every width; and the traps on the way, each as a test."""

import errno
import os
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from datafree import quantize
from datafree.errors import ExportError, OutputError
from datafree.export.lower import Style
from datafree.export.onnx import Prepared, export_onnx, prepare
from datafree.export.runtime import open_file
from datafree.measure.verification import Verification
from datafree.measure.verify import verify
from datafree.plan import WEIGHT_BITS, Target
from datafree.task import Task
from networks import NAMES, build

RUNNABLE = [name for name in NAMES if name != "branching"]  # which torch.export cannot follow


def student_of(name: str, target: Target) -> tuple[nn.Module, Task]:
    model, task = build(name)
    return quantize(model, task, method="rtn", target=target).student, task


def checked(student: nn.Module, task: Task, folder: Path, style: Style | None = None) -> tuple[Prepared, Verification]:
    prepared = prepare(student, task)
    file = export_onnx(prepared, folder / "model.onnx", style)
    return prepared, verify(file, student, task, prepared=prepared, threads=1)


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_every_width_of_weights_and_activations(bits: int, tmp_path: Path) -> None:
    student, task = student_of("mobilenet", Target(bits, bits))
    prepared, found = checked(student, task, tmp_path)
    assert found.points and not found.differences and not found.fell_back
    assert len(prepared.integer) == found.layers == sum(kernel.integer for kernel in found.kernels.values())


@pytest.mark.parametrize("name", RUNNABLE)
def test_networks_of_all_kinds(name: str, tmp_path: Path) -> None:
    _, found = checked(*student_of(name, Target(4, 8)), tmp_path)
    assert not found.differences and found.same_top1 == 100.0
    assert list(found.fell_back) == (["up.0"] if name == "grouped" else [])
    assert all("no integer kernel for transposed" in reason for reason in found.fell_back.values())


def test_a_branch_on_the_data_is_refused() -> None:
    with pytest.raises(ExportError, match=r"torch.export cannot follow the network"):
        prepare(*student_of("branching", Target(4, 8)))


@pytest.fixture(scope="module")
def digits() -> Prepared:
    return prepare(*student_of("resnet_basic", Target(4, 8)))


@pytest.fixture(scope="module")
def file(digits: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(digits, tmp_path_factory.mktemp("files") / "digits.onnx")


def test_weights_are_signed_and_activations_unsigned(file: Path) -> None:
    """Unsigned weights take kernels that are several times slower; INT4 and INT2 themselves are refused by those kernels."""
    graph = onnx.load(file).graph
    made = {node.output[0]: node for node in graph.node}
    kinds = {each.name: each.data_type for each in graph.initializer}
    layers = [node for node in graph.node if node.op_type == "Conv"]
    assert layers
    for node in layers:
        stored = made[node.input[1]].input[0]
        cast = made.get(stored)
        kind = kinds[stored] if cast is None else next(each.i for each in cast.attribute if each.name == "to")
        assert kind == onnx.TensorProto.INT8
        codes = made[made[node.input[0]].input[0]]
        assert kinds[made[node.input[0]].input[2]] == onnx.TensorProto.UINT8 and codes.op_type in ("QuantizeLinear", "Clip", "MaxPool")


def test_no_layer_finds_its_scale_while_it_runs(file: Path) -> None:
    """Dynamic quantization is several times slower than float."""
    assert not any("Dynamic" in node.op_type for node in onnx.load(file).graph.node)


def test_weights_of_float_layers_are_unpacked_once(tmp_path: Path) -> None:
    """A dequantizer that stays in the graph would work anew for every input: slower than float."""
    student, task = student_of("resnet_basic", Target(4, protocol="paper"))
    prepared, found = checked(student, task, tmp_path)
    assert not prepared.integer and not found.differences and not found.fell_back
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "optimised.onnx").graph
    assert not {"Cast", "Mul", "DequantizeLinear"} & {node.op_type for node in graph.node}


def test_packed_weights_lie_in_the_file_without_gaps(file: Path) -> None:
    """Written as numbers one by one they would take as many bytes as in int32."""
    initializers = onnx.load(file).graph.initializer
    packed = [each for each in initializers if each.data_type == onnx.TensorProto.INT4]
    assert packed
    for each in packed:
        assert not each.int32_data and len(each.raw_data) == (torch.Size(each.dims).numel() + 1) // 2


def test_a_tensor_that_is_negative_too_has_a_zero_point_and_stays_integer(tmp_path: Path) -> None:
    student, task = student_of("mobilenet", Target(8, 8))
    prepared, found = checked(student, task, tmp_path)
    assert any(grid.zero not in (0, 128) for grid in prepared.grids.values()) and not found.fell_back


def test_an_opset_that_the_runtime_does_not_know(file: Path, tmp_path: Path) -> None:
    model = onnx.load(file)
    model.opset_import[0].version = 99
    (tmp_path / "late.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match=r"refuses .*late.onnx"):
        open_file(tmp_path / "late.onnx")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_file(file: Path, share: float, tmp_path: Path) -> None:
    data = file.read_bytes()
    (tmp_path / "half.onnx").write_bytes(data[: int(share * len(data))])
    with pytest.raises(ExportError, match=r"half.onnx"):
        open_file(tmp_path / "half.onnx")


def test_a_full_disk_leaves_nothing(digits: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.onnx").write_bytes(b"what was there before")

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match=r"model.onnx.*No space left"):
        export_onnx(digits, tmp_path / "model.onnx")
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_bytes() == b"what was there before"
