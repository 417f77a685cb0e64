"""The command ``search`` as a user types it, and the plan that it hands to ``quantize``."""

import json
from pathlib import Path

import pytest

from datafree import Plan, cli, cli_search

PLAIN = ("search", "digits", "--method", "rtn")
SEARCH = (*PLAIN, "--widths", "3,5,8", "--protocol", "paper", "--by", "closed")
Output = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "60")
    return tmp_path


def failed(capsys: Output, *argv: str) -> str:
    assert cli.main(list(argv)) == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("flags", (SEARCH, (*PLAIN, "--widths", "3,8", "--act-bits", "8")), ids=("closed", "kl"))
def test_from_search_to_the_student(flags: tuple[str, ...], capsys: Output) -> None:
    assert cli.main([*flags, "--max-bytes", "80000", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    picked, frontier = found["picked"], found["frontier"]
    assert picked["bytes"] <= 80000 and picked in frontier and found["plan"] == "plan.json"
    assert not [each for each in frontier if picked["bytes"] < each["bytes"] <= 80000]
    protocol = "paper" if flags is SEARCH else "deploy"
    assert cli.main(["quantize", "digits", "--method", "rtn", "--plan", "plan.json", "--protocol", protocol, "--out", "run", "--json"]) == 0
    run = json.loads(capsys.readouterr().out)
    made = Plan.read("run/plan.json")
    assert made == Plan.read("plan.json") and bool(made.activations) == (protocol == "deploy")
    assert {name: layer.weight.bits for name, layer in made.layers.items()} == picked["widths"]
    assert run["packed_bytes"] == picked["bytes"]
    assert cli.main(["compare", "run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"]["weight_bits"] == sorted(set(picked["widths"].values()))


def test_the_table_fits_sixty_columns(capsys: Output) -> None:
    assert cli.main([*SEARCH, "--max-drop", "0.05", "--out", "mine.json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 60
    rows = [line for line in lines if " to " in line and "mean" in line]
    (chosen,) = [line for line in rows if line.startswith("*")]
    sizes = [int(line.lstrip("* ").split()[0].replace(",", "")) for line in rows]
    losses = [float(line.lstrip("* ").split()[1]) for line in rows]
    assert len(rows) in (12, 13) and sizes == sorted(sizes) and losses == sorted(losses, reverse=True)
    assert float(chosen.split()[2]) <= 0.05 and "plan: mine.json" in lines
    told = " ".join(lines)
    assert "noise-to-signal" in told and "accuracy" not in told
    capsys.readouterr()
    assert cli.main(["quantize", "digits", "--method", "rtn", "--plan", "mine.json", "--protocol", "paper"]) == 0
    assert "as the plan says" in capsys.readouterr().out and Path("runs/digits-rtn-plan-paper").is_dir()


def test_without_a_bound_the_frontier_is_told_with_its_latency_and_nothing_written(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.setattr(cli_search, "SHOWN", 2)
    assert cli.main([*SEARCH, "--latency"]) == 0
    header, _, *rows = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert header.split() == ["bytes", "loss", "ms", "bits"] and len(rows) == 2
    assert all(0 < float(row.split()[2]) < 1000 for row in rows)
    assert not list(place.iterdir())


def test_the_help_calls_loss_by_its_name(capsys: Output) -> None:
    assert cli.main(["search", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert "it is no drop of accuracy" in told and "nats per input" in told


def test_bad_input_is_told(place: Path, capsys: Output) -> None:
    assert "--max-bytes and --max-drop both choose" in failed(capsys, *SEARCH, "--max-bytes", "1", "--max-drop", "1")
    assert "max_bytes = 1000 is out of reach" in failed(capsys, *SEARCH, "--max-bytes", "1000")
    assert "unknown method 'none': choose from" in failed(capsys, "search", "digits", "--method", "none", "--max-bytes", "1")
    assert "two widths at least" in failed(capsys, *PLAIN, "--widths", "4")
    assert "there is no folder nowhere" in failed(capsys, *SEARCH, "--max-drop", "9", "--out", "nowhere/plan.json")
    (place / "plan.json").write_text('{"layers": {"a": 3}, "tensors": {}}')
    assert "plan.json is there already" in failed(capsys, *SEARCH, "--max-drop", "1")
    assert "plan.json is damaged" in failed(capsys, "quantize", "digits", "--plan", "plan.json")
    assert "a plan says the bits" in failed(capsys, "quantize", "digits", "--plan", str(_plan_of_another(place)), "--weight-bits", "4")
    assert "the plan of another one" in failed(capsys, "quantize", "digits", "--plan", str(_plan_of_another(place)))


def _plan_of_another(place: Path) -> Path:
    file = place / "other.json"
    spec = {"bits": 4, "symmetric": True, "axis": 0, "grid": "uniform"}
    file.write_text(json.dumps({"layers": {"features.0": {"weight": spec, "input": None}}, "tensors": {}}))
    return file
