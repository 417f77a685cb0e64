"""The commands around exported files, as a user types them."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

import datafree
from datafree import cli
from datafree.networks import load_network
from datafree.report.content import verdict
from datafree.report.runs import open_folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, traced_once: None) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "digits"
    assert cli.main(["quantize", "digits", "--method", "rtn", "--weight-bits", "4", "--act-bits", "4", "--out", str(folder)]) == 0
    assert cli.main(["export", str(folder), "--allow-fallback"]) == 0
    return folder


def test_export_tells_kernels_and_differences(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(run / "model.onnx"), "--against", str(run), "--allow-fallback"]) == 0
    told = capsys.readouterr().out
    assert "16 of 16 layers are integer; 0 fell back" in told and "times as fast" in told


def test_json_of_verify(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(run / "model.onnx"), "--against", str(run), "--allow-fallback", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["code_difference"] == 0 and found["same_top1"] == 100 and found["file_bytes"] < 1.25 * found["packed_bytes"]


def test_a_file_of_another_student_ends_with_3(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    assert cli.main(["quantize", "digits", "--method", "rtn", "--weight-bits", "2", "--act-bits", "4", "--out", str(other)]) == 0
    assert cli.main(["verify", str(run / "model.onnx"), "--against", str(other), "--allow-fallback"]) == 3
    assert "is this the file of that student" in capsys.readouterr().err
    assert not (other / "verification.json").exists()  # where the report would take it for the student's


def test_what_came_of_it_stays_with_the_run(run: Path) -> None:
    found = verdict(open_folder(run))["runtime"]
    assert isinstance(found, dict) and found["layers"] == found["integer_layers"] == 16 and found["latency_ms"] > 0


def test_every_file_keeps_its_verification(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("verification.json"))
    shutil.copy(folder / "model.onnx", folder / "other.onnx")
    for name in ("model.onnx", "other.onnx", "model.onnx"):
        assert cli.main(["verify", str(folder / name), "--against", str(folder), "--allow-fallback"]) == 0
    assert list(open_folder(folder).verifications) == ["other.onnx", "model.onnx"]  # the latest last


def test_openvino(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install 'datafree[openvino]'")
    assert cli.main(["export", str(run), "--to", "openvino", "--allow-fallback", "--threads", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    weights = (run / "model.bin").stat().st_size
    assert found["file"] == "model.xml" and found["file_bytes"] == (run / "model.xml").stat().st_size + weights
    assert weights < found["packed_bytes"] and found["fell_back"] == {} and found["runtime"].startswith("openvino")
    assert found["code_difference"] <= 1 and found["same_top1"] == 100 and found["layers"] == len(found["kernels"]) == 16
    packed = str(run / "openvino.onnx")
    command = ["export", str(run), "--packing", "openvino-onnx", "--out", packed, "--allow-fallback", "--fastest"]
    assert cli.main(command) == 0 and "openvino 20" in capsys.readouterr().out
    assert cli.main(["verify", packed, "--against", str(run), "--runtime", "openvino", "--allow-fallback"]) == 0
    capsys.readouterr()
    assert cli.main(["bench-speed", str(run / "model.onnx"), str(run / "model.xml"), "--json", "--threads", "1"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["runtime"].split()[0] for row in rows] == ["onnxruntime", "openvino"]
    assert cli.main(["verify", str(run / "model.xml"), "--against", str(run), "--runtime", "ort"]) == 2
    assert "which ONNX Runtime cannot read" in capsys.readouterr().err.replace("\n", " ")


def test_without_openvino(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    for command in (
        ["export", str(run), "--to", "openvino"],
        ["verify", str(run / "model.onnx"), "--against", str(run), "--runtime", "openvino"],
    ):
        assert cli.main([*command, "--allow-fallback"]) == 2
        assert "pip install 'datafree[openvino]'" in capsys.readouterr().err.replace("\n", " ")


def test_other_forms(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", str(run), "--to", "safetensors"]) == 0
    assert cli.main(["export", str(run), "--to", "program"]) == 0
    task = load_network("digits").task
    inputs = task.noise(3, torch.Generator().manual_seed(0))
    student = datafree.load(run, load_network("digits").model)
    program = torch.export.load(run / "model.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(program(inputs), student(inputs), rtol=1e-5, atol=1e-5)
    assert (run / "model.safetensors").read_bytes() == (run / "student.safetensors").read_bytes()


def test_bench_speed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(run / "model.onnx")
    assert cli.main(["bench-speed", file, file, "--json", "--threads", "1"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["file"] for row in rows] == [file, file] and rows[0]["times_as_fast"] == 1


@pytest.mark.parametrize(
    ("command", "told"),
    (
        (["export", "nowhere"], "nowhere holds no run.json"),
        (["verify", "nowhere.onnx", "--against", "RUN"], "there is no file nowhere.onnx"),
        (["verify", "RUN/short.onnx", "--against", "RUN"], "damaged"),
        (["export", "RUN", "--out", "nowhere/model.onnx"], "there is no folder nowhere"),
        (["bench-speed"], "one file at least"),
        (["bench-speed", "RUN/model.onnx", "--batch", "0"], "--batch must be 1 or more"),
    ),
)
def test_bad_input_is_told(run: Path, command: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "short.onnx").write_bytes((run / "model.onnx").read_bytes()[:3000])
    assert cli.main([each.replace("RUN", str(run)) for each in command]) == 2
    assert told in capsys.readouterr().err.replace("\n", " ")


def test_a_damaged_record_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.json").write_text("{}")
    assert cli.main(["export", str(tmp_path)]) == 2
    assert "damaged" in capsys.readouterr().err


def test_code_that_only_the_folder_names_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run may come from a stranger, whose run.json names a file of code."""
    net, folder = tmp_path / "own.py", tmp_path / "run"
    net.write_text(
        "from pathlib import Path\nfrom torch import nn\nfrom datafree import Task\n"
        "def net():\n    Path(__file__).with_name('ran').touch()\n    return nn.Sequential(nn.Linear(4, 3)), Task(shape=(4,))\n"
    )
    source = f"{net}:net"
    assert cli.main(["quantize", source, "--method", "rtn", "--weight-bits", "8", "--out", str(folder)]) == 0
    (tmp_path / "ran").unlink()
    capsys.readouterr()
    file = str(tmp_path / "model.onnx")
    for command in (["export", str(folder)], ["verify", file, "--against", str(folder)]):
        assert cli.main(command) == 2
        assert " ".join(("datafree", *command, "--net", source)) in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert cli.main(["export", str(folder), "--to", "safetensors", "--net", source]) == 0 and (tmp_path / "ran").exists()
