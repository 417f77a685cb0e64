"""Verification of networks from the field: what they do to their inputs, what their answers mean, what precision they ran in."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import datafree
from datafree import Target, Task, cli
from datafree.cli_export import verification_rows
from datafree.errors import ExportError
from datafree.export.lower import Style
from datafree.export.onnx import Prepared, export_onnx, prepare
from datafree.measure.verify import verify
from tests.field import sqnr, trained
from tests.networks import Scripted, conv_bn

TASK = Task(shape=(3, 16, 16), mean=(0.45,), std=(0.25,), classes=5)


class Net(nn.Module):
    """A small classifier that may normalise its input in place."""

    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(*conv_bn(3, 8), nn.ReLU(), *conv_bn(8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(8, 5)
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        x = x.sub_(0.4).div_(0.3) if self.in_place else (x - 0.4) / 0.3
        return self.fc(self.body(x))


def student(model: nn.Module | None = None, task: Task = TASK, seed: int = 0) -> nn.Module:
    if model is None:
        torch.manual_seed(seed)
        model = trained(Net(), task)
    return datafree.quantize(model, task, method="rtn", target=Target(8, 8)).student


@pytest.fixture(scope="module")
def made() -> nn.Module:
    return student()


@pytest.fixture(scope="module")
def prepared(made: nn.Module) -> Prepared:
    return prepare(made, TASK)


def test_a_network_that_writes_into_its_input(tmp_path: Path) -> None:
    """Arrays of numpy share the memory of tensors: file and student would get different inputs."""
    torch.manual_seed(0)
    model = trained(Net(), TASK)
    made = student(model)
    for module in (model, made):
        module.in_place = True  # type: ignore[assignment]
    found = datafree.verify(datafree.export(made, TASK, tmp_path / "m.onnx"), made, TASK, threads=1)
    assert not found.differences and found.same_top1 == 100
    assert found.precision == "f32" and found.default_precision is None  # ONNX Runtime has one


def test_a_student_that_draws_random_numbers_is_named_as_the_cause(prepared: Prepared, tmp_path: Path) -> None:
    made = student()
    file = export_onnx(prepared, tmp_path / "m.onnx")
    made.fc.register_forward_hook(lambda module, args, result: nn.functional.dropout(result, 0.5))  # type: ignore[operator, union-attr]
    with pytest.raises(ExportError, match="answers the same inputs otherwise when it is called again"):
        verify(file, made, TASK, threads=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_students_of_networks_in_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = student(trained(Net(), TASK).to(dtype))
    found = datafree.verify(datafree.export(made, TASK, tmp_path / "m.onnx"), made, TASK, threads=1)
    assert not found.differences and found.integer_layers == 3


@pytest.mark.parametrize(
    ("answer", "classes", "same"),
    [
        (lambda x: x.flatten(1), None, True),  # (n, classes)
        (lambda x: x, 8, True),  # (n, classes, height, width)
        (lambda x: x.flatten(2).permute(2, 0, 1), 8, True),  # (steps, n, classes)
        (lambda x: x.flatten(2).permute(2, 0, 1), None, False),
        (lambda x: x[:, :, :1].flatten(2).repeat(1, 1, 2), 8, True),  # (n, classes, 8): the first beside the batch
        (lambda x: x[:, :7], 8, False),
    ],
)
def test_classes_are_compared_only_where_there_are_some(answer: object, classes: int | None, same: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = Task(shape=(3, 4, 4), mean=(0.45,), std=(0.25,), classes=classes)
    conv = nn.Conv2d(3, 8, 3, padding=1)
    made = student(Scripted(lambda net, x: answer(net.conv(x)), conv=conv).eval(), task)  # type: ignore[operator]
    found = datafree.verify(datafree.export(made, task, tmp_path / "m.onnx"), made, task, threads=1)
    if same:
        assert found.same_top1 is not None and found.same_top1 > 95
    else:
        assert found.same_top1 is None
    assert ("same top-1" in dict(verification_rows(found, 0))["answers"]) == same


def test_float_kernels_tell_how_far_they_are_from_the_student(prepared: Prepared, tmp_path: Path) -> None:
    made = student()
    file = export_onnx(prepared, tmp_path / "m.onnx", Style(float_kernels=True))
    found = verify(file, made, TASK, prepared=prepared, threads=1)
    x = TASK.noise(found.inputs, torch.Generator().manual_seed(0))
    with torch.no_grad():
        own = made(x.clone())
        for module in made.modules():
            for side in ("input", "output"):
                if f"{side}_quantizer" in module._modules:
                    setattr(module, f"{side}_quantizer", nn.Identity())
        unrounded = made(x.clone())
    output = found.outputs["output"]
    assert not found.differences and output.local <= 1e-3 * output.largest_value
    assert output.sqnr == pytest.approx(sqnr(own, unrounded), abs=0.1)
    rows = dict(verification_rows(found, 0))
    assert "activations are float in this file" in rows["step by step"] and f"SQNR {output.sqnr:.1f} dB" in rows["answers"]


def test_float_kernels_of_another_student_fail(prepared: Prepared, tmp_path: Path) -> None:
    """That the file rounds no activation is no excuse for other weights."""
    file = export_onnx(prepared, tmp_path / "m.onnx", Style(float_kernels=True))
    found = verify(file, student(seed=1), TASK, prepared=prepared, threads=1)
    (difference,) = found.differences
    assert difference.startswith("without the student's activation quantizers") and difference.endswith("is this the file of that student?")


def test_fastest_ends_with_3_where_the_file_is_another_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = tmp_path / "net.py"
    net.write_text(
        "import torch\nfrom torch import nn\nfrom datafree import Task\n"
        "def net():\n    torch.manual_seed(0)\n"
        "    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))\n"
        "    return model.eval(), Task(shape=(3, 12, 12))\n"
    )
    runs = [str(tmp_path / name) for name in ("one", "two")]
    for run, bits in zip(runs, ("8", "2"), strict=True):
        assert cli.main(["quantize", f"{net}:net", "--method", "rtn", "--weight-bits", bits, "--act-bits", "8", "--out", run]) == 0
    monkeypatch.setattr("datafree.measure.fastest.fastest_style", lambda *args: Style(float_kernels=True))
    file = str(tmp_path / "one" / "fast.onnx")
    assert cli.main(["export", runs[0], "--net", f"{net}:net", "--fastest", "--out", file, "--allow-fallback"]) == 0
    (kept,) = json.loads((tmp_path / "one" / "verification.json").read_text()).values()
    assert kept["float_kernels"] and kept["outputs"]["output"]["sqnr"] > 20
    assert cli.main(["verify", file, "--against", runs[1], "--net", f"{net}:net", "--allow-fallback"]) == 3


def test_the_default_precision_of_openvino_is_measured(made: nn.Module, prepared: Prepared, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install 'datafree[openvino]'")
    from datafree.export.openvino import export_openvino

    file = export_openvino(prepared, tmp_path / "m.xml")
    found = verify(file, made, TASK, prepared=prepared, threads=1)
    assert found.precision == "f32" and found.default_precision is not None and not found.differences
    assert found.default_precision.precision == openvino.Core().get_property("CPU", "INFERENCE_PRECISION_HINT").get_type_name()
    x = TASK.noise(found.inputs, torch.Generator().manual_seed(0))
    with torch.no_grad():
        own = made(x.clone())
    plain = torch.from_numpy(openvino.Core().compile_model(file, "CPU")(x.numpy())[0])
    assert found.default_precision.largest == pytest.approx(float((own - plain).abs().max()), rel=0.3)
    row = dict(verification_rows(found, 0))["precision"]
    assert row.startswith("f32, which 'verify' asks for") and f"takes {found.default_precision.precision}" in row
