"""The commands around exported files: ``export``, ``verify``, ``bench-speed``."""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from cyclopts import Parameter
from rich.console import Console
from rich.table import Table
from torch import nn

from datafree import show
from datafree.api import load
from datafree.bits.cost import packed_bytes
from datafree.errors import ExportError, VerifyError, WeightsError
from datafree.export.files import check_folder, write_whole
from datafree.export.openvino_runtime import imported
from datafree.measure.verification import fallen
from datafree.method import option
from datafree.networks import load_network
from datafree.report.runs import RUN_FILE, VERIFICATION_FILE, read_record, task_of, verifications
from datafree.result import Form, export, made_by, strict_json, verify
from datafree.task import Task

if TYPE_CHECKING:
    from datafree.measure.verification import OutputDifference, Verification

Run = Annotated[Path, Parameter(help="a folder that 'quantize' wrote")]
Json = Annotated[bool, Parameter(help="print JSON instead of a table", negative=())]
Threads = Annotated[int, Parameter(help="threads of the runtime; 0 leaves it to the runtime")]


@dataclass(frozen=True)
class ExportFlags:
    """What file to write."""

    to: Form = option("onnx", "the kind of file")
    packing: Literal["ort", "openvino-onnx", "portable"] = option("ort", "of ONNX files: for which runtime weights are packed")
    out: Path | None = option(None, "the file; model with the suffix of its kind in RUN unless given")
    fastest: Annotated[bool, Parameter(negative=())] = option(
        False, "float kernels and unrounded activations where integers are not faster here"
    )


@dataclass(frozen=True)
class CheckFlags:
    """How the file is checked."""

    allow_fallback: Annotated[bool, Parameter(negative=())] = option(
        False, "do not fail for layers that fell back to float, or for a file slower than the float network"
    )
    net: str | None = option(None, "the float network, where it is no longer what the run names")
    runtime: Literal["ort", "openvino"] | None = option(None, "what runs the file; by its kind unless given")
    threads: int = option(0, "threads of the runtime; 0 leaves it to the runtime")
    json: Json = option(False, "print JSON instead of a table")


_EXPORT, _CHECK = ExportFlags(), CheckFlags()
_ExportFlags = Annotated[ExportFlags, Parameter(name="*")]
_CheckFlags = Annotated[CheckFlags, Parameter(name="*")]


def export_command(run: Run, /, *, flags: _ExportFlags = _EXPORT, check: _CheckFlags = _CHECK) -> None:
    """Write the student of a run as a file, run it in its runtime and compare."""
    student, task, record = open_run(run, check.net, ("datafree", "export", str(run)))
    suffix = {"onnx": ".onnx", "openvino": ".xml", "safetensors": ".safetensors", "program": ".pt2"}[flags.to]
    file = flags.out or run / f"model{suffix}"
    check_folder(file)  # what is missing is told before the work
    if flags.to == "openvino":
        imported()
    export(student, task, file, to=flags.to, packing=flags.packing, fastest=flags.fastest, made_by=made_by(record))
    if flags.to in ("safetensors", "program"):
        Console(highlight=False).print(f"wrote {file}, {file.stat().st_size} bytes", soft_wrap=True)
    else:
        own = flags.to == "onnx" and flags.packing == "openvino-onnx"
        _check(file, run, student, task, replace(check, runtime="openvino") if own and check.runtime is None else check)


def verify_command(
    file: Annotated[Path, Parameter(help="an ONNX file, or the .xml of OpenVINO")],
    /,
    *,
    against: Run,
    check: _CheckFlags = _CHECK,
) -> None:
    """Run an exported file in its runtime and compare it with the student of a run."""
    student, task, _ = open_run(against, check.net, ("datafree", "verify", str(file), "--against", str(against)))
    _check(file, against, student, task, check)


def _check(file: Path, run: Path, student: nn.Module, task: Task, flags: CheckFlags) -> None:
    """Show what came of running a file, and leave it in the run, under the file's name, if the file is that of its student.

    Raises VerifyError where it failed; fallbacks and slowness may be allowed.
    """
    found, size = verify(file, student, task, runtime=flags.runtime, threads=flags.threads), packed_bytes(student)
    _keep(run, found)
    console = Console(highlight=False, markup=False, emoji=False)
    if flags.json:
        show.show_json(console, {**found.to_json(), "packed_bytes": size})
    else:
        show.show_rows(console, verification_rows(found, size))
    failures = found.differences if flags.allow_fallback else found.failures
    if failures:
        raise VerifyError("; ".join(failures))


def _keep(run: Path, found: "Verification") -> None:
    """Put what came of a file behind what came of the others; a file that is not the student's is forgotten."""
    before = verifications(run)
    others = {name: each for name, each in before.items() if name != found.file}
    after = others if found.differences else {**others, found.file: found.to_json()}
    if before or after:
        write_whole(run / VERIFICATION_FILE, (strict_json(after) + "\n").encode())


def bench_speed_command(
    *files: Annotated[Path, Parameter(help="ONNX files, or the .xml of OpenVINO")],
    batch: Annotated[int, Parameter(help="inputs in one run")] = 1,
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Time exported files, taking turns in one process; ratios are to the first."""
    from datafree.export.runtime import open_file
    from datafree.measure.speed import interleaved

    if not files:
        raise ExportError("give one file at least")
    if batch < 1:
        raise ExportError(f"--batch must be 1 or more, not {batch}")
    loaded = [open_file(file, threads=threads) for file in files]
    shapes = {each.input_shape for each in loaded}
    if len(shapes) > 1:
        raise ExportError(f"the files take inputs of different shapes, {sorted(shapes)}: time them one by one")
    inputs = torch.randn(batch, *shapes.pop(), generator=torch.Generator().manual_seed(0)).numpy()
    found = interleaved(loaded, inputs)
    rows = [
        {
            "file": str(file), "runtime": each.runtime, "load_seconds": each.load_seconds, "median_ms": latency.median,
            "low_ms": latency.low, "high_ms": latency.high, "times_as_fast": found[0].median / latency.median,
        }
        for file, each, latency in zip(files, loaded, found, strict=True)
    ]  # fmt: skip
    console = Console(highlight=False, markup=False, emoji=False)
    if json:
        show.show_json(console, rows)
        return
    table = Table("file", "median ms", "quartiles", "times as fast", "load s", box=None, pad_edge=False)
    for row, latency in zip(rows, found, strict=True):
        quartiles = f"{latency.low:.2f} to {latency.high:.2f}"
        table.add_row(
            Path(str(row["file"])).name, f"{latency.median:.2f}", quartiles, f"{row['times_as_fast']:.2f}", f"{row['load_seconds']:.2f}"
        )
    console.print(table)


def open_run(folder: Path, net: str | None, command: Sequence[str]) -> tuple[nn.Module, Task, Mapping[str, object]]:
    """The student of a run, its task and its record.

    A folder may come from a stranger: a file of Python code that it names is never run, only one that ``net`` names.

    Raises WeightsError where the folder holds no whole run, or where ``net`` is needed; the message then ends with ``command`` and it.
    """
    record = read_record(folder)
    task = task_of(record)
    source = net or str(record.get("net", ""))
    if not source:
        raise WeightsError(f"{folder / RUN_FILE} does not name its network: give it with --net")
    if net is None and ".py" in source:
        raise WeightsError(
            f"{folder / RUN_FILE} names its network as {source}, a file of code, which is run only where you name it yourself: "
            f"{shlex.join((*command, '--net', source))}"
        )
    return load(folder, load_network(source, pretrained=False).model), task, record


def verification_rows(found: "Verification", packed: int) -> list[tuple[str, str]]:
    """What came of running a file, as rows; ``packed``: bytes of the student's integers, scales and biases."""
    kernels = f"{found.integer_layers} of {found.layers} layers are integer; {len(found.fell_back)} fell back"
    planned = f"; {found.float_inputs} have inputs that the plan leaves in float" if found.float_inputs else ""
    chosen = "; float kernels by choice" if found.float_kernels else ""
    compared = f"{found.points} activations: {found.differing_codes:.2g} % of the codes differ, by {found.code_difference} steps at most"
    rows = [
        ("file", f"{found.file}, {found.file_bytes / 1000:.1f} kB (bits, scales and biases: {packed / 1000:.1f} kB)"),
        ("runtime", f"{found.runtime}, loaded in {found.load_seconds:.2f} s"),
        ("precision", _precision(found)),
        ("kernels", kernels + planned + chosen),
        ("fell back", fallen(found.fell_back)),
        ("answers", _answers(found)),
        ("outputs", ", ".join(_of(name, output) for name, output in found.outputs.items()) if len(found.outputs) > 1 else ""),
        ("not in the file", ", ".join(found.left_out) and f"{', '.join(found.left_out)}: files hold tensors only"),
        ("step by step", _float_activations(found) if found.float_kernels else compared),
        (
            "latency",
            f"{found.latency.median:.2f} ms, the float network {found.float_latency.median:.2f} ms: {found.speedup:.2f} times as fast",
        ),
    ]
    return [(label, text) for label, text in rows if text]


def _of(name: str, output: "OutputDifference") -> str:
    return f"{name} {output.largest:.2g} of {output.largest_value:.3g}"


def _answers(found: "Verification") -> str:
    """The output that differs most, and the classes of the answer where it has any."""
    if not found.outputs:
        return "none could be compared"
    worst = found.outputs[found.worst]
    which = f" ({found.worst})" if len(found.outputs) > 1 else ""
    same = "" if found.same_top1 is None else f"; same top-1 on {found.same_top1:.1f} % of noise"
    return f"differ by {worst.largest:.2g} of {worst.largest_value:.3g} at most{which}, {_decibels(worst.sqnr)}{same}"


def _float_activations(found: "Verification") -> str:
    local = max((output.local for output in found.outputs.values()), default=0.0)
    return f"activations are float in this file, the student rounds them; without its rounding the answers differ by {local:.2g}"


def _precision(found: "Verification") -> str:
    default = found.default_precision
    if default is None:
        return ""
    what = f"{found.precision}, which 'verify' asks for; by default this machine takes {default.precision}"
    far = f"{default.output} then differs by {default.largest:.2g} from the student's, {_decibels(default.sqnr)}"
    return f"{what}: {far}" + (f": set INFERENCE_PRECISION_HINT to {found.precision}" if default.precision != found.precision else "")


def _decibels(sqnr: float) -> str:
    return "equal to the last bit" if math.isinf(sqnr) else f"SQNR {sqnr:.1f} dB"
