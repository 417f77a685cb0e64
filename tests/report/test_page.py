"""The page of a run: complete, small, self-contained, without errors in a browser; its JSON twin follows the schema."""

import json
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import datafree
from datafree import api
from datafree.errors import WeightsError
from datafree.report.content import content, verdict, verdict_rows
from datafree.report.page import comparison_page, contact_sheet, page
from datafree.report.runs import Run, open_folder
from datafree.result import strict_json
from datafree.zoo.digits import digits

SCHEMA = json.loads(files("datafree.report").joinpath("report.schema.json").read_text())
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync --enable-logging=stderr --v=0"
).split()
FAST = {
    "file": "fast.onnx", "runtime": "onnxruntime 1.0", "file_bytes": 8, "speedup": 4.0, "layers": 3, "integer_layers": 0, "kernels": {},
    "latency": {"median": 0.25}, "float_latency": {"median": 1.0}, "float_kernels": True,
}  # fmt: skip
VERIFICATION = {
    **FAST, "file": "model.onnx", "file_bytes": 9, "speedup": 2.0, "integer_layers": 1, "latency": {"median": 0.5}, "float_kernels": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything that a page can tell."""
    model, task = digits()
    result = datafree.quantize(model, task, method="rtn", target=datafree.Target(4, 4))
    own = {name: layer.weight.bits for name, layer in result.plan.layers.items()}
    paired = {"both": 8, "only_teacher": 1, "only_student": 0, "neither": 1}
    accuracy = {
        "data": "some <data>", "n": 10, "top1_full_precision": 90.0, "top1_quantized": 80.0, "drop": 10.0, "drop_half_width_95": 5.0,
        "paired": paired,
    }  # fmt: skip
    silence: dict[str, list[str]] = {"files_read": [], "sockets_opened": [], "programs_started": []}
    evidence = {"loading": {**silence, "files_read": ["net.py"]}, "quantizing": silence, "measuring": silence}
    extra = {"net": "digits", "network": "digits", "accuracy": accuracy, "started": "2000-01-01T00:00:00+00:00", "evidence": evidence}
    pictures = task.noise(10, torch.Generator().manual_seed(0))
    result = replace(api.with_layers(api.with_estimate(result, model), model), pictures=pictures)
    result = replace(result, run={**result.run, **extra})
    folder = result.save(tmp_path_factory.mktemp("runs") / "whole")
    points = [{"bytes": 1000 * size, "loss": 1 / size, "bits": own if size == 3 else dict.fromkeys(own, 2)} for size in range(1, 6)]
    (folder / "frontier.json").write_text(json.dumps(points))
    (folder / "verification.json").write_text(json.dumps({each["file"]: each for each in (FAST, VERIFICATION)}))
    return folder


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    found = open_folder(run)
    return page(content(found), found.pictures)


@pytest.fixture
def bare(run: Path, tmp_path: Path) -> Path:
    """A run as ``Result.save`` leaves it: nothing measured, nothing kept, nothing exported."""
    for name in ("plan.json", "student.safetensors"):
        shutil.copy(run / name, tmp_path / name)
    record = json.loads((run / "run.json").read_text())
    for key in ("net", "network", "accuracy", "started", "evidence", "estimate"):
        del record[key]
    (tmp_path / "run.json").write_text(json.dumps(record))
    return tmp_path


def test_the_twin_follows_the_schema(run: Path, bare: Path) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    for folder in (run, bare):
        told = json.loads(strict_json(content(open_folder(folder))))
        jsonschema.validate(told, SCHEMA, cls=jsonschema.Draft202012Validator)
        told["verdict"]["surprise"] = 1
        with pytest.raises(jsonschema.ValidationError, match="surprise"):
            jsonschema.validate(told, SCHEMA, cls=jsonschema.Draft202012Validator)


def test_the_page_stands_alone(html: str) -> None:
    assert len(html.encode()) < 2_000_000
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"|@import|url\((?!#)|<script', html)
    HTMLParser().feed(html)
    assert "prefers-color-scheme: dark" in html and "width=device-width" in html


def test_the_page_tells_what_decides(html: str) -> None:
    for part in ("80.00 %", "10.00 points below 90.00 %", "estimated loss", "1 of 3", "0.50 ms", "2.00 times as fast", "W4 A4"):
        assert part in html
    assert "some &lt;data&gt;" in html and "some <data>" not in html


def test_the_page_lists_all_files_and_decides_by_the_latest(run: Path, html: str) -> None:
    found = content(open_folder(run))
    assert isinstance(found["files"], list) and [each["file"] for each in found["files"]] == ["fast.onnx", "model.onnx"]
    assert "model.onnx: 0.50 ms" in dict(verdict_rows(verdict(open_folder(run))))["latency"]
    assert "fast.onnx (float kernels by choice)" in html and "4.00" in html


def test_the_estimate_is_called_one_and_tells_why_it_is_unknown(run: Path) -> None:
    told = {**content(open_folder(run)), "layers": None, "frontier": None}
    assert isinstance(told["verdict"], dict)
    guess = told["verdict"]["estimated_loss"]
    size = "fitted on networks of up to 0.9 M parameters and 10 to 1000 classes"
    for judged, drop, unknown, head, detail in (
        ("estimated", 4.25, None, "4.2 points of top-1", f"1.0 to 9.0 with 90 % confidence, an estimate without data, {size}"),
        ("too small", None, None, "too small to tell (under 9.0 points of top-1)", f"an estimate without data, {size}"),
        ("probably large", None, "kl = 9 lies above", "unknown, and probably large", f"kl = 9 lies above; {size}"),
        ("unknown", None, "no classifier", "unknown", "no classifier"),
    ):
        guess |= {"verdict": judged, "drop": drop, "low": 1.0, "high": 9.0, "unknown": unknown}
        text = page(told)
        assert f">{head}<" in text and f">{detail}<" in text
        assert dict(verdict_rows(told["verdict"]))["estimated loss"] == f"{head}: {detail}"


def test_fidelity_without_classes_is_told_so(run: Path) -> None:
    told = {**content(open_folder(run)), "layers": None, "frontier": None}
    assert isinstance(told["verdict"], dict)
    told["verdict"]["fidelity"] |= {"agreement": None, "kl": None, "sqnr": 12.34}
    assert "12.3 dB" in page(told) and "no class axis" in page(told) and "same class" not in page(told)
    assert dict(verdict_rows(told["verdict"]))["on noise"] == "SQNR 12.3 dB (no class axis)"


def test_the_head_tells_whether_anything_was_read(run: Path, bare: Path) -> None:
    told = {**content(open_folder(run)), "layers": None, "frontier": None}
    assert "no file was read, no socket opened" in page(told)
    assert isinstance(told["manifest"], dict)
    told["manifest"]["evidence"]["quantizing"]["files_read"] = ["train.npz"]
    assert "files were read, sockets opened or programs started" in page(told) and "no file was read" not in page(told)


def test_hovering_tells_plans_and_layers(html: str) -> None:
    tips = re.findall(r'<g class="tip"><title>([^<]*)</title>', html)
    assert sum(tip.startswith("this run: 3.0 kB, expected loss 0.333") for tip in tips) == 1
    assert any("2 bits: conv, stages.0.0.conv1" in tip for tip in tips)
    assert any(re.match(r"fc: 8 bits, uniform, 640 weights", tip) for tip in tips)
    assert any("rounded to nearest: " in tip for tip in tips) and any(tip.startswith("clipped at ") for tip in tips)


def test_colours_are_those_of_the_page(html: str) -> None:
    assert "var(--accent)" in html and not re.search("#0[1-5]0[1-5]0[1-5]", html)
    plots = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(plots) == 15 and all("viewBox" in plot for plot in plots)
    texts = re.findall(r"<text [^>]*>", html)
    assert texts and all("fill: var(" in text for text in texts)


def test_the_same_run_gives_the_same_page(run: Path) -> None:
    told = {**content(open_folder(run)), "layers": None}
    assert page(told) == page(told)


def test_a_bare_run_has_a_page(bare: Path) -> None:
    found = open_folder(bare)
    text = page(content(found), found.pictures)
    for part in ("not measured", "not exported", "unknown", "not recorded"):
        assert part in text
    assert "<svg" not in text and "<img" not in text


def test_a_large_network_has_a_small_page(run: Path) -> None:
    """200 layers with long names and a frontier of 2000 points."""
    told = content(open_folder(run))
    assert isinstance(told["layers"], dict)
    some = told["layers"]["layers"]
    layers = [{**some[place % 16], "name": f"stages.{place}.blocks.{place}.convolution", "histogram": None} for place in range(200)]
    points = [{"bytes": size, "loss": 1 / size, "bits": {layer["name"]: 4 for layer in layers}} for size in range(1, 2001)]
    text = page({**told, "layers": {**told["layers"], "layers": layers}, "frontier": points, "chosen": 1111})
    assert len(text.encode()) < 2_000_000 and "this run: 1.1 kB" in text


@dataclass(frozen=True)
class Browser:
    """What Chromium made of a page."""

    dom: str
    console: tuple[str, ...]


def opened(file: Path, profile: Path) -> Browser:
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed: the page cannot be opened in a browser")
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return Browser(done.stdout, tuple(line for line in done.stderr.splitlines() if ":CONSOLE" in line))


HOVER = """<script>
const marks = [...document.querySelectorAll("svg .tip")].filter(mark => mark.querySelector("title").textContent.startsWith("this run:"));
marks[0].scrollIntoView({block: "center"});
const box = marks[0].getBoundingClientRect();
const under = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
const root = document.documentElement, hover = under.closest(".tip").querySelector("title").textContent;
parent.postMessage(JSON.stringify({hover, overflow: root.scrollWidth - root.clientWidth}), "*");
</script>"""


@pytest.mark.parametrize("width", (400, 1200))
def test_a_browser_shows_it(html: str, tmp_path: Path, width: int) -> None:
    """In a frame of that width: no message on the console, the mark is under the pointer, nothing sticks out."""
    (tmp_path / "page.html").write_text(html.replace("</body>", HOVER + "</body>"))
    listener = "<script>onmessage = event => document.body.append(event.data)</script>"
    (tmp_path / "frame.html").write_text(f'{listener}<iframe src="page.html" style="width:{width}px;height:900px"></iframe>')
    found = opened(tmp_path / "frame.html", tmp_path / "profile")
    assert not found.console
    assert '"hover":"this run: 3.0 kB' in found.dom and '"overflow":0' in found.dom


def test_errors_on_the_console_are_seen(tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text("<script>nothing()</script>")
    assert opened(tmp_path / "bad.html", tmp_path / "profile").console


def test_runs_side_by_side(run: Path, bare: Path) -> None:
    verdicts = {"one": verdict(open_folder(run)), "two": verdict(open_folder(bare))}
    text = comparison_page(verdicts)
    for part in ("2 runs side by side", "<h3>one</h3>", "80.00 % instead of 90.00 %", "not measured", "fidelity on noise, dB"):
        assert part in text
    assert "top-1, %" in comparison_page({"one": verdicts["one"]})
    labels = [[label for label, _ in verdict_rows(told)] for told in verdicts.values()]
    assert labels[0] == labels[1]


@pytest.mark.parametrize("shape", ((3, 3, 8, 8), (70, 1, 8, 8), (9, 5, 4, 6)))
def test_a_contact_sheet_shows_what_there_is(shape: tuple[int, ...]) -> None:
    sheet = np.asarray(contact_sheet(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
    rows, columns = -(-min(shape[0], 64) // 8), min(shape[0], 8)
    assert sheet.shape == (rows * 74, columns * 74, 3) and sheet.min() == 0 and sheet.max() == 255


def test_pictures_without_two_axes_have_a_sheet(run: Path, tmp_path: Path) -> None:
    told = {**content(open_folder(run)), "layers": None, "frontier": None}
    for shape in ((4, 6), (4, 2, 6), (4, 1, 2, 3, 4)):
        save_file({"pictures": torch.rand(shape)}, tmp_path / "pictures.safetensors")
        assert "data:image/jpeg" in page(told, tmp_path / "pictures.safetensors")
    (tmp_path / "pictures.safetensors").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match="pictures.safetensors is damaged"):
        page(told, tmp_path / "pictures.safetensors")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    (
        ("run.json", "{", "run.json is damaged"),
        ("run.json", "{}", "says nothing of method"),
        ("run.json", "[]", "holds a list"),
        ("plan.json", '{"layers": 3}', "expected an object, found 3"),
        ("layers.json", "1", "holds a int"),
        ("frontier.json", '[{"bytes": 1}]', "is no frontier"),
        ("verification.json", '{"file": "model.onnx"}', "of another version: remove it, then verify the files again"),
    ),
)
def test_damaged_files_are_told(bare: Path, name: str, text: str, message: str) -> None:
    (bare / name).write_text(text)
    with pytest.raises(WeightsError, match=message):
        content(open_folder(bare))


def test_no_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="holds no run.json"):
        open_folder(tmp_path)


def test_the_chosen_point_has_the_bits_of_the_run(run: Path) -> None:
    found: Run = open_folder(run)
    assert content(found)["chosen"] == 2
    assert found.frontier is not None and content(replace(found, frontier=found.frontier[:2]))["chosen"] is None
