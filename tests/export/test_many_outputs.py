"""Networks that return several tensors: all are in the file, by name, and all are verified."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import datafree
from datafree import Target, Task
from datafree.errors import ExportError
from datafree.export.onnx import export_onnx, prepare
from datafree.export.openvino import export_openvino
from datafree.export.runtime import open_file
from datafree.measure.verification import OutputDifference
from datafree.measure.verify import verify
from tests.field import trained
from tests.networks import conv_bn


@dataclass
class Found:
    boxes: Tensor
    scores: Tensor


class Heads(nn.Module):
    """A trunk and three heads, whose results ``form`` puts together."""

    def __init__(self, form: Callable[[Tensor, Tensor, Tensor], object]) -> None:
        super().__init__()
        self.trunk = nn.Sequential(*conv_bn(3, 8), nn.ReLU(), *conv_bn(8, 8), nn.ReLU())
        self.boxes, self.scores, self.unused = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 3, 1), nn.Conv2d(8, 2, 1)
        self.form = form

    def forward(self, x: Tensor) -> object:
        x = self.trunk(x)
        return self.form(self.boxes(x).flatten(2), self.scores(x).softmax(1).mean((2, 3)), self.unused(x))


def student(form: Callable[[Tensor, Tensor, Tensor], object], output: int | str | None) -> tuple[nn.Module, Task]:
    torch.manual_seed(0)
    task = Task(shape=(3, 16, 16), mean=(0.45,), std=(0.25,), output=output)
    model = trained(Heads(form), task)
    return datafree.quantize(model, task, method="rtn", target=Target(8, 8)).student, task


FORMS: tuple[tuple[str, Callable[[Tensor, Tensor, Tensor], object], int | str | None, list[str]], ...] = (
    ("tuple", lambda b, s, u: (b, s, u), 1, ["output", "output_0", "output_2"]),
    ("mapping", lambda b, s, u: {"boxes": b, "scores": s}, "scores", ["scores", "boxes"]),
    ("dataclass", lambda b, s, u: Found(b, s), "boxes", ["boxes", "scores"]),
    ("nested", lambda b, s, u: {"scores": s, "maps": [b, u]}, "scores", ["scores", "maps_0", "maps_1"]),
    ("names of ours", lambda b, s, u: {"v0": s, "c0": b, "v1": u}, "v0", ["v0", "c0", "v1"]),
    ("one tensor twice", lambda b, s, u: (s, s, s.argmax(1)), 0, ["output", "output_1", "output_2"]),
)


@pytest.mark.parametrize(("form", "output", "names"), [each[1:] for each in FORMS], ids=[each[0] for each in FORMS])
def test_all_outputs_are_in_the_file(
    form: Callable[[Tensor, Tensor, Tensor], object], output: int | str, names: list[str], tmp_path: Path
) -> None:
    made, task = student(form, output)
    prepared = prepare(made, task)
    files = [export_onnx(prepared, tmp_path / "m.onnx")]
    if find_spec("openvino"):
        files.append(export_openvino(prepared, tmp_path / "m.xml"))
    x = task.noise(3, torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = task.run(made, x)
    for file in files:
        found = verify(file, made, task, prepared=prepared, threads=1)
        assert list(found.outputs) == names and not found.differences and not found.missing
        answer = torch.from_numpy(open_file(file, 1).run(x.numpy())[names[0]])
        assert answer.shape == expected.shape and (answer - expected).abs().max() < 0.02 * expected.abs().max()


def test_the_answer_is_the_first_output_and_the_batch_has_its_name(tmp_path: Path) -> None:
    made, task = student(lambda b, s, u: (b, s, u.permute(1, 0, 2, 3)), 1)
    outputs = onnx.load(datafree.export(made, task, tmp_path / "m.onnx")).graph.output
    shapes = {each.name: [size.dim_param or size.dim_value for size in each.type.tensor_type.shape.dim] for each in outputs}
    assert list(shapes.items()) == [("output", ["batch", 3]), ("output_0", ["batch", 4, 256]), ("output_2", [2, "batch", 16, 16])]


def test_layers_are_counted_in_the_file(tmp_path: Path) -> None:
    """Not those whose results the network throws away."""
    made, task = student(lambda b, s, u: {"boxes": b, "scores": s}, "boxes")
    found = datafree.verify(datafree.export(made, task, tmp_path / "m.onnx"), made, task, threads=1)
    assert found.layers == found.integer_layers == 4 and not found.fell_back


def test_the_worst_output_is_named(tmp_path: Path) -> None:
    """The answer of this file is right, another output is not."""
    made, task = student(lambda b, s, u: {"boxes": b, "scores": s}, "boxes")
    file = datafree.export(made, task, tmp_path / "m.onnx")
    with torch.no_grad():
        made.get_submodule("scores").bias.add_(torch.tensor([3.0, 0.0, 0.0]))  # type: ignore[operator, union-attr]
    found = datafree.verify(file, made, task, threads=1)
    assert found.worst == "scores" and found.outputs["boxes"].close and not found.outputs["scores"].close
    (difference,) = found.differences
    assert difference.startswith("given equal codes, scores differs by")


def test_a_file_that_lacks_an_output_fails(tmp_path: Path) -> None:
    made, task = student(lambda b, s, u: (b, s, u), 1)
    file = datafree.export(made, task, tmp_path / "m.onnx")
    model = onnx.load(file)
    del model.graph.output[2]
    onnx.save(model, file)
    found = verify(file, made, task, threads=1)
    assert found.missing == {"output_2": "its outputs are output, output_0"}
    assert "the file has no output 'output_2' like the student's" in " ".join(found.differences)


def test_a_list_for_each_input_cannot_be_exported(tmp_path: Path) -> None:
    made, task = student(lambda b, s, u: [{"boxes": box, "scores": score} for box, score in zip(b, s, strict=True)], "boxes")
    with pytest.raises(ExportError, match="a list with boxes, scores for each input, and a file has no lists: let its forward return tens"):
        datafree.export(made, task, tmp_path / "m.onnx")


def test_what_is_no_tensor_is_named(tmp_path: Path) -> None:
    made, task = student(lambda b, s, u: {"boxes": b, "size": 16, "aux": None}, "boxes")
    found = datafree.verify(datafree.export(made, task, tmp_path / "m.onnx"), made, task, threads=1)
    assert found.left_out == ("size",) and list(found.outputs) == ["boxes"]


def test_a_norm_behind_an_output_is_not_folded_into_it(tmp_path: Path) -> None:
    """The map before the norm is an output of its own."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = conv_bn(3, 8)
            self.head = nn.Conv2d(8, 3, 1)

        def forward(self, x: Tensor) -> object:
            before = self.conv(x)
            return {"answer": self.head(self.norm(before).relu()), "before": before}

    torch.manual_seed(0)
    task = Task(shape=(3, 16, 16), mean=(0.45,), std=(0.25,), output="answer")
    made = datafree.quantize(trained(Net(), task), task, method="rtn", target=Target(8, 8)).student
    found = datafree.verify(datafree.export(made, task, tmp_path / "m.onnx"), made, task, threads=1)
    assert not found.differences and found.outputs["before"].sqnr > 60


def test_a_class_that_a_tie_decides_is_no_difference() -> None:
    found = OutputDifference(1.0, 0.0, 40.0, 1.0, 9.0, differing=0.5)
    assert found.close and not replace(found, differing=5.0).close
