"""The command line: every command through ``main``, and a clean error for everything that a user can get wrong."""

import inspect
import json
import re
import shlex
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import pytest

import datafree
from datafree import cli
from datafree.cli import main
from datafree.context import Event
from datafree.errors import MethodError
from datafree.method import methods, option

README = Path(__file__).parents[1] / "README.md"
NETWORK = """
from torch import nn
from datafree import Target, Task

def net():
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
    return nn.Sequential(*layers).eval(), Task(shape=(3, 8, 8), classes=5)
"""
Output = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, and a terminal of known width."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path


@pytest.fixture
def own(place: Path) -> str:
    """A network of the user's own, in a file; its labelled data beside it in own.npz."""
    (place / "own.py").write_text(NETWORK)
    rng = np.random.default_rng(0)
    np.savez(place / "own.npz", x_test=rng.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8), y_test=rng.integers(0, 5, 20))
    return "own.py:net"


def told(capsys: Output, *argv: str) -> str:
    """What a command that must succeed writes."""
    assert main(list(argv)) == 0
    caught = capsys.readouterr()
    assert caught.err == ""
    return caught.out


def as_json(capsys: Output, *argv: str) -> dict[str, object]:
    found = json.loads(told(capsys, *argv, "--json"), parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    assert isinstance(found, dict)
    return found


# ---------------------------------------------------------------- quantize


def test_quantize_digits(capsys: Output, place: Path) -> None:
    text = told(capsys, "quantize", "digits", "--protocol", "dfmpc", "--data", "digits", "--out", "runs/a")
    for part in (
        "digits",
        "anchor",
        "2/6",
        "activations float",
        "bytes packed",
        "fidelity on noise",
        "estimated top-1 drop",
        "only original",
        "runs/a",
    ):
        assert part in text
    assert sorted(file.name for file in (place / "runs/a").iterdir()) == ["layers.json", "plan.json", "run.json", "student.safetensors"]
    run = json.loads((place / "runs/a/run.json").read_text())
    assert run["network"] == "digits" and run["protocol"] == "dfmpc"
    accuracy = run["accuracy"]
    assert accuracy["n"] == 360 == sum(accuracy["paired"].values())
    assert accuracy["drop"] == pytest.approx(accuracy["top1_full_precision"] - accuracy["top1_quantized"])


def test_fidelity_is_not_called_accuracy(capsys: Output) -> None:
    text = told(capsys, "quantize", "digits", "--method", "rtn", "--weight-bits", "4", "--out", "run")
    assert "fidelity on noise" in text and "accuracy" not in text
    assert "accuracy" not in json.loads(Path("run/run.json").read_text())


def test_quantize_own_network(capsys: Output, own: str) -> None:
    run = as_json(capsys, "quantize", own, "--weight-bits=4", "--act-bits", "8", "--keep", "3", "--seed", "7", "--data", "own.npz")
    folder = Path(str(run["folder"]))
    assert folder == Path("runs/net-anchor-w4-a8-deploy") and (folder / "student.safetensors").is_file()
    assert run["seed"] == 7 and run["target"]["weight_bits"] == 4 and run["target"]["keep"] == ["3"]
    assert run["target"] == {**asdict(datafree.Target(4, 8)), "keep": ["3"]}
    assert isinstance(run["accuracy"], dict) and run["accuracy"]["data"] == "own.npz" and run["accuracy"]["n"] == 20
    layers = json.loads((folder / "plan.json").read_text())["layers"]
    assert set(layers) == {"0", "6"}


def test_default_folders_are_fresh(capsys: Output, own: str) -> None:
    folders = [as_json(capsys, "quantize", own, "--method", "rtn")["folder"] for _ in range(3)]
    assert folders == [f"runs/net-rtn-w2-6-afloat-deploy{end}" for end in ("", "-2", "-3")]


def test_summary_has_as_many_lines_for_many_layers(capsys: Output, monkeypatch: pytest.MonkeyPatch, own: str) -> None:
    monkeypatch.setenv("COLUMNS", "1000")  # no line is folded
    lines = [len(told(capsys, "quantize", net, "--out", f"out{index}").splitlines()) for index, net in enumerate((own, "digits"))]
    assert lines[0] >= lines[1]  # the small network has a note on its missing norms, if anything


def test_default_method_is_that_of_the_library() -> None:
    assert inspect.signature(datafree.quantize).parameters["method"].default == cli.DEFAULT_METHOD


# ---------------------------------------------------------------- flags from dataclasses


@pytest.mark.parametrize("width", ["50", "120"])
@pytest.mark.parametrize("method", list(methods()))
def test_every_field_is_in_the_help(capsys: Output, monkeypatch: pytest.MonkeyPatch, method: str, width: str) -> None:
    monkeypatch.setenv("COLUMNS", width)
    text = told(capsys, "quantize", "--method", method, "--help")
    words = plain(text)
    for each in fields(methods()[method]):  # type: ignore[arg-type]
        assert re.search(rf"--{each.name.replace('_', '-')}\b", text)
        assert plain(each.metadata["help"]) in words
        if isinstance(each.default, bool):
            assert f"--no-{each.name.replace('_', '-')}" in text
    assert f"Method {method}" in text and all(name in text for name in methods())
    assert max(map(len, text.splitlines())) <= int(width)


def test_help_without_a_method_is_that_of_the_default(capsys: Output) -> None:
    assert told(capsys, "quantize", "--help") == told(capsys, "quantize", "--method", cli.DEFAULT_METHOD, "--help")


@pytest.mark.parametrize("method", list(methods()))
def test_every_field_can_be_given(capsys: Output, own: str, method: str) -> None:
    """Each field as a flag with a value other than its default, as far as its type tells one."""
    flags: list[str] = []
    expected: dict[str, object] = {}
    for each in fields(methods()[method]):  # type: ignore[arg-type]
        flag, choices = f"--{each.name.replace('_', '-')}", getattr(each.type, "__args__", ())
        if isinstance(each.default, bool):
            expected[each.name] = not each.default
            flags.append(flag if not each.default else flag.replace("--", "--no-", 1))
            continue
        if isinstance(each.default, str):
            value: object = next(choice for choice in choices if choice != each.default)
        elif isinstance(each.default, float):
            value = 0.6 * each.default or 0.25
        else:
            value = 2
        if each.default is not None:
            expected[each.name] = value
            flags += [flag, str(value)]
    run = as_json(capsys, "quantize", own, "--method", method, *flags)
    assert isinstance(run["fields"], dict)
    assert expected.items() <= run["fields"].items()


def test_a_field_called_like_a_common_flag_is_refused() -> None:
    @dataclass(frozen=True)
    class Mine(methods()["rtn"]):  # type: ignore[misc]
        seed: int = option(0, "its own seed")

    with pytest.raises(MethodError, match="the field seed is called like a flag"):
        cli._quantize_command(Mine)


def plain(text: str) -> str:
    """Only letters and digits: what is left whatever the folding and the boxes."""
    return re.sub(r"[^0-9A-Za-z]", "", text)


# ---------------------------------------------------------------- the other commands


@pytest.mark.usefixtures("few_pictures")
def test_demo(capsys: Output, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = told(capsys, "demo")
    assert "held-out digits served only to measure" in text and "full precision" in text
    for name, bits in (("anchor", "2/6"), ("dfmpc", "2/6"), ("anchor", "4"), ("dfmpc", "4"), ("rtn", "4")):
        assert f"{name}, {bits} bits" in text
    runs = sorted(folder.name for folder in (place / "datafree-demo").iterdir())
    assert runs == ["anchor-w2-6", "anchor-w4", "dfmpc-w2-6", "dfmpc-w4", "rtn-w4"]
    monkeypatch.setattr(cli, "DEMO_RUNS", (("rtn", (4,)),))
    told(capsys, "demo")
    assert (place / "datafree-demo-2" / "rtn-w4" / "run.json").is_file()


def test_evaluate(capsys: Output) -> None:
    expected = {"network": "digits", "data": "held-out digits", "n": 360}
    report = as_json(capsys, "evaluate", "digits")
    assert expected.items() <= report.items() and isinstance(report["top1_full_precision"], float) and report["top1_full_precision"] > 95
    assert "full precision" in told(capsys, "evaluate", "digits")


def test_evaluate_own_network(capsys: Output, own: str) -> None:
    text = told(capsys, "evaluate", own, "--data", "own.npz")
    assert "own.npz" in text and "of 20)" in text


def test_evaluate_is_what_quantize_recorded(capsys: Output) -> None:
    run = as_json(capsys, "quantize", "digits", "--data", "digits", "--out", "run")
    report = as_json(capsys, "evaluate", "digits", "--student", "run")
    assert isinstance(run["accuracy"], dict)
    assert {"network": "digits", **run["accuracy"], "notes": []} == report
    assert "only quantized" in told(capsys, "evaluate", "digits", "--student", "run")


def test_inspect(capsys: Output) -> None:
    report = as_json(capsys, "inspect", "digits")
    assert isinstance(report["layers"], list)
    layers = {layer["name"]: layer for layer in report["layers"]}
    assert layers["conv"]["role"] == "first" and layers["fc"]["role"] == "last" and layers["fc"]["weight_shape"] == [10, 64]
    assert layers["stages.0.0.conv1"]["partner"] == "stages.0.0.conv2" and layers["stages.0.0.conv2"]["partner"] == "stages.0.0.conv1"
    assert layers["fc"]["bytes"] == 4 * layers["fc"]["parameters"] == 4 * 650
    text = told(capsys, "inspect", "digits")
    assert all(name in text for name in layers) and "699,880 bytes" in text


def test_inspect_tells_layers_that_stay_in_float(capsys: Output, place: Path) -> None:
    (place / "two.py").write_text(NETWORK.replace("return nn", "return Spare(nn").replace(".eval(), Task", ").eval(), Task") + SPARE)
    assert "spare stays in float: its forward was not called" in told(capsys, "inspect", "two.py:net")
    assert as_json(capsys, "inspect", "two.py:net")["coverage"]["floats"] == {"spare": "its forward was not called"}


SPARE = """
class Spare(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body, self.spare = body, nn.Linear(3, 3)

    def forward(self, x):
        return self.body(x)
"""


@pytest.mark.parametrize("width", [40, 50, 80, 120, 200])
@pytest.mark.parametrize(
    "argv", [["inspect", "digits"], ["methods"], ["methods", "--verbose"], ["--help"], ["evaluate", "--help"]], ids=" ".join
)
def test_nothing_is_wider_than_the_terminal(capsys: Output, monkeypatch: pytest.MonkeyPatch, argv: list[str], width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert max(map(len, told(capsys, *argv).splitlines())) <= width


def test_task_flags(capsys: Output, own: str) -> None:
    text = told(
        capsys, "inspect", own, "--input-shape", "3,8,8", "--mean", "-0.5,0.25,0.5", "--std", "1,1,0.5", "--classes", "5", "--resize", "9"
    )
    assert "3 layers" in text


def test_methods(capsys: Output) -> None:
    text = told(capsys, "methods")
    assert all(name in text for name in methods()) and "2307.00498" in text
    in_full = told(capsys, "methods", "rtn")
    assert "--" not in in_full and all(each.name in in_full for each in fields(methods()["rtn"]))  # type: ignore[arg-type]
    everything = told(capsys, "methods", "--verbose")
    assert all(each.name in everything for method in methods().values() for each in fields(method))  # type: ignore[arg-type]
    listed = json.loads(told(capsys, "methods", "--json"))
    assert [each["name"] for each in listed] == list(methods())
    rtn = next(each for each in listed if each["name"] == "rtn")
    assert next(each for each in rtn["fields"] if each["name"] == "weight_range")["choices"] == ["mse", "minmax", "aciq"]


def test_version_and_bare_call(capsys: Output) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", told(capsys, "--version"))
    assert "quantize" in told(capsys)
    assert told(capsys, "--help", "quantize") == told(capsys, "quantize", "--help")


@pytest.mark.usefixtures("few_pictures")
def test_the_commands_of_the_readme(capsys: Output) -> None:
    """But for the demo, which has its own test."""
    lines = [line for line in README.read_text().splitlines() if re.match("datafree (?!demo)", line)]
    assert len(lines) >= 5
    for line in lines:
        told(capsys, *shlex.split(line, comments=True)[1:])


# ---------------------------------------------------------------- what can go wrong

BAD = (
    ("quantize digits --method nope", f"unknown method 'nope': choose from {', '.join(methods())}"),
    ("quantize digits --method dfmpc --lamda1 1", "Did you mean --lambda1?"),
    ("quantize digits --correct-bias", "Unknown option: --correct-bias"),
    ("quantize digits --protocol deplo", 'Choose from: "deploy", "paper", "dfmpc"'),
    ("quantize digits --protocol dfmpc --act-bits 8", "protocol dfmpc quantizes weights only"),
    ("quantize digits --method dfmpc --mode best", 'Choose from: "plus", "faithful"'),
    ("quantize digits --method dfmpc --rho high", 'unable to convert "high" into float'),
    ("quantize digits --weight-bits 1,6", "weight_bits: 1 is not supported"),
    ("quantize digits --weight-bits two", "no list of ints"),
    ("quantize digits --weight-bits 2,,6", "an empty part"),
    ("quantize digits --act-bits 9", "act_bits: 9 is not supported"),
    ("quantize digits --act-bits half", "neither a number of bits nor float"),
    ("quantize digits --max-bytes 10", "more than max_bytes = 10"),
    ("quantize digits --keep conv9", "no layer 'conv9'"),
    ("quantize digits --seed -1", "Must be >= 0"),
    ("quantize digits --device toaster", "device 'toaster' cannot be used"),
    ("quantize digits --out full", "is there already"),
    ("quantize digits --weights no.safetensors", "no file no.safetensors"),
    ("quantize digits --data no.npz", "no.npz does not exist"),
    ("quantize digits --input-shape 1,8", "the network fails on an input of shape"),
    ("quantize", "NET requires an argument"),
    ("quantize digits more", "more"),
    ("quantize nets", "unknown network 'nets'"),
    ("quantize no.py:net", "no file no.py"),
    ("inspect no.py", "write no.py:function"),
    ("inspect digits --mean a", "no list of floats"),
    ("inspect digits --classes 4", "10 classes"),
    ("evaluate own.py:net", "give --data PATH"),
    ("evaluate digits --data no.npz", "no.npz does not exist"),
    ("evaluate digits --student nowhere", "holds no student.safetensors"),
    ("methods nope", "unknown method 'nope'"),
    ("demo --out full", "is there already"),
    ("quantise digits", "Did you mean"),
    ("--verbos", "Unknown"),
)


@pytest.mark.parametrize(("line", "message"), BAD, ids=[line for line, _ in BAD])
def test_bad_input(capsys: Output, place: Path, own: str, line: str, message: str) -> None:
    (place / "full").mkdir()
    (place / "full" / "file").write_text("")
    before = sorted(place.rglob("*"))
    assert main(line.split()) == 2
    caught = capsys.readouterr()
    assert caught.err.startswith("error: ") and message in caught.err and "Traceback" not in caught.err
    assert caught.out == "" and caught.err.count("\n") == 1
    assert [path for path in sorted(place.rglob("*")) if "__pycache__" not in str(path)] == before


def test_an_existing_folder_is_refused_before_any_work(capsys: Output, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "file").write_text("")
    monkeypatch.setattr(cli, "open_network", lambda *args: pytest.fail("worked before the folder was checked"))
    assert main(["quantize", "digits", "--out", "file"]) == 2
    assert main(["demo", "--out", "file"]) == 2


def test_interrupt(capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "open_network", interrupt)
    assert main(["inspect", "digits"]) == 130


def test_unexpected_errors_propagate(monkeypatch: pytest.MonkeyPatch) -> None:
    def stumble(*args: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "open_network", stumble)
    with pytest.raises(ZeroDivisionError):
        main(["inspect", "digits"])


def test_progress_bar_on_a_terminal_only(capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    assert main(["quantize", "digits", "--method", "rtn", "--out", "run"]) == 0
    assert "round" in capsys.readouterr().err


def test_events_reach_the_bar_and_notes_the_summary(capsys: Output, own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def noting(*args: object, on_event: object, **options: object) -> datafree.Result:
        assert callable(on_event)
        on_event(Event("note", message="unheard"))
        result = datafree.quantize(*args, on_event=on_event, **options)  # type: ignore[arg-type]
        return datafree.Result(result.student, result.plan, {**result.run, "notes": ["remarkable " * 100]}, result.task)

    monkeypatch.setattr("datafree.cli.quantize", noting)
    text = told(capsys, "quantize", own)
    assert "remarkable" in text and "in full in run.json" in text and text.count("remarkable") < 50
