"""Evidence, manifest, report and comparison, as a user types them."""

import builtins
import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import datafree
from datafree.cli import main
from datafree.zoo import digits

ZOO = Path(digits.__file__).parent
Output = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of zeroq, measured on the held-out digits, with its pictures."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    line = f"quantize digits --method zeroq --steps 2 --pictures 32 --weight-bits 4 --data digits --keep-pictures --out {folder}"
    assert main(line.split()) == 0
    return folder


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")


def told(capsys: Output, *argv: str) -> str:
    assert main(list(argv)) == 0
    caught = capsys.readouterr()
    assert caught.err == ""
    return caught.out


def test_what_was_read_is_recorded(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    nothing: dict[str, Sequence[str]] = {"files_read": [], "sockets_opened": [], "programs_started": []}
    assert record["evidence"] == {
        "loading": {**nothing, "files_read": [str(ZOO / "digits.safetensors")]},
        "quantizing": nothing,
        "measuring": {**nothing, "files_read": [str(ZOO / "digits_test.npz")]},
    }
    assert datetime.fromisoformat(record["started"]).tzinfo is not None


def test_a_method_that_reads_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "training.bin").write_bytes(b"1")
    rtn = datafree.methods()["rtn"]
    run = rtn.run

    def reads(self: datafree.Method, *args: object) -> torch.nn.Module:
        (tmp_path / "training.bin").read_bytes()
        return run(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(rtn, "run", reads)
    assert main(f"quantize digits --method rtn --out {tmp_path / 'run'}".split()) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["evidence"]["quantizing"]["files_read"] == [str(tmp_path / "training.bin")]


def test_own_files_are_listed_and_data_is_opened_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    """Data that cannot be read is told after the work, and the student is saved all the same."""
    net, data = tmp_path / "net.py", tmp_path / "data.npz"
    net.write_text("from datafree.zoo.digits import digits")
    data.write_bytes(b"damaged")
    opened: list[str] = []
    plain = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *args, **options: opened.append(str(self)) or plain(self, *args, **options))
    monkeypatch.setattr("datafree.cli.quantize", lambda *args, **options: opened.append("quantize") or datafree.quantize(*args, **options))
    assert main(f"quantize {net}:digits --method rtn --data {data} --out {tmp_path / 'run'}".split()) == 2
    error = capsys.readouterr().err
    assert "data.npz" in error and "the student is in" in error
    assert opened.index("quantize") < opened.index(str(data))
    evidence = json.loads((tmp_path / "run" / "run.json").read_text())["evidence"]
    assert str(net) in evidence["loading"]["files_read"] and evidence["measuring"]["files_read"] == [str(data)]


def test_the_manifest_is_plain(run: Path, capsys: Output) -> None:
    text = " ".join(told(capsys, "manifest", str(run)).split())
    for part in ("no data was given to the method", "no file: from here on all was in memory", "no socket was opened", "seed 0", "torch"):
        assert part in text
    assert "opened only when the student was done" in text and "may leak statistics" in text
    found = json.loads(told(capsys, "manifest", str(run), "--json"))
    assert found["evidence"]["quantizing"]["sockets_opened"] == [] and found["pictures_kept"] is True
    assert len(found["weights_hash"]) == len(found["student_hash"]) == 64


def test_sockets_and_programs_stand_in_the_manifest(run: Path, tmp_path: Path, capsys: Output) -> None:
    for name in ("plan.json", "student.safetensors"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    record = json.loads((run / "run.json").read_text())
    record["evidence"]["loading"] |= {"sockets_opened": ["getaddrinfo example.org"], "programs_started": ["true"]}
    (tmp_path / "run.json").write_text(json.dumps(record))
    text = told(capsys, "manifest", str(tmp_path))
    assert "while loading: getaddrinfo example.org" in text and "while loading: true" in text


def test_pictures_are_kept_when_asked_only(run: Path, tmp_path: Path, capsys: Output) -> None:
    assert load_file(run / "pictures.safetensors")["pictures"].shape == (32, 1, 8, 8)
    assert "may leak statistics" in " ".join(json.loads((run / "run.json").read_text())["notes"])
    assert main(f"quantize digits --method rtn --keep-pictures --out {tmp_path / 'a'}".split()) == 0
    assert "rtn made no pictures" in capsys.readouterr().out
    assert not (tmp_path / "a" / "pictures.safetensors").exists()


def test_pictures_are_written_when_asked_only(tmp_path: Path) -> None:
    model, task = digits.digits()
    method = datafree.methods()["zeroq"](steps=2, pictures=8)  # type: ignore[call-arg]
    result = datafree.quantize(model, task, method=method)
    assert result.pictures is not None
    result.save(tmp_path / "without")
    result.keeping_pictures().save(tmp_path / "with")
    assert {each.name for each in (tmp_path / "with").iterdir()} - {each.name for each in (tmp_path / "without").iterdir()} == {
        "pictures.safetensors"
    }


def test_report_and_comparison(run: Path, tmp_path: Path, capsys: Output) -> None:
    assert "wrote" in told(capsys, "report", str(run), "--out", str(tmp_path / "page.html"))
    twin = json.loads((tmp_path / "page.json").read_text())
    assert twin["verdict"]["estimated_loss"]["sources"] == {"leaves": 64, "pink": 64} and twin["verdict"]["accuracy"]["n"] == 360
    assert (tmp_path / "page.html").read_text().count("<svg") >= 8
    text = told(capsys, "compare", str(run), "--html", str(tmp_path / "both.html"))
    assert "kB" in text and "estimated loss" in text and "instead of" in text
    assert "side by side" in (tmp_path / "both.html").read_text()
    assert json.loads(told(capsys, "compare", str(run), "--json"))[str(run)]["packed_bytes"] > 0


@pytest.mark.parametrize("width", ("60", "120"))
def test_comparison_fits_the_terminal(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output, width: str) -> None:
    monkeypatch.setenv("COLUMNS", width)
    monkeypatch.chdir(run.parent)
    lines = told(capsys, "compare", run.name, f"../{run.parent.name}/{run.name}").splitlines()
    assert max(map(len, lines)) <= int(width)
    assert sum("estimated loss" in line for line in lines) == (2 if width == "60" else 1)


@pytest.mark.parametrize(
    ("line", "message"),
    (
        ("report nowhere", "nowhere holds no run.json"),
        ("manifest nowhere", "nowhere holds no run.json"),
        ("compare", "give the folders"),
        ("compare nowhere", "nowhere holds no run.json"),
        ("report RUN --out nowhere/page.html", "there is no folder nowhere"),
    ),
)
def test_bad_input_is_told(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output, line: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(line.replace("RUN", str(run)).split()) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("line", ("report RUN", "compare RUN --html both.html"))
def test_a_missing_extra_is_told(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output, line: str) -> None:
    """Without matplotlib the page names the command that installs it; the manifest needs nothing."""
    plain = builtins.__import__

    def without(name: str, *args: object) -> object:
        if name == "datafree.report.page":
            raise ModuleNotFoundError("no matplotlib", name="matplotlib")
        return plain(name, *args)  # type: ignore[arg-type]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(builtins, "__import__", without)
    assert main(line.replace("RUN", str(run)).split()) == 2
    assert "matplotlib is not installed: pip install 'datafree[report]'" in capsys.readouterr().err
    assert main(["manifest", str(run)]) == 0
