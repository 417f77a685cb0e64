"""The whole way: a network and its task in, a student with its plan and provenance out; saved, loaded, measured."""

import json
import math
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from safetensors.torch import save
from torch import Tensor, nn

from datafree import parallel
from datafree.bits.cost import float_bytes, packed_bytes
from datafree.checks import check_network, check_student
from datafree.context import Ctx, Event
from datafree.errors import MethodError, MissingExtraError, NetworkError, OutputError, WeightsError
from datafree.export.files import write_whole
from datafree.export.float_weights import weights_hash
from datafree.export.weights import load_student, save_student
from datafree.fit import resumable
from datafree.graph.coverage import coverage
from datafree.graph.flow import read
from datafree.graph.plain import teacher_of
from datafree.graph.swap import frozen_copy
from datafree.input_check import input_warning
from datafree.measure.estimate import estimate_drop
from datafree.measure.fidelity import fidelity
from datafree.measure.layers import LayerReport, layer_report
from datafree.method import Method, find_method
from datafree.plan import Plan, Target
from datafree.quant.insert import plan_of, quantized_layers, quantizers
from datafree.quant.limits import limit_inputs
from datafree.quant.settle import settle
from datafree.report.runs import LAYERS_FILE, PICTURES_FILE, PLAN_FILE, RUN_FILE, STUDENT_FILE
from datafree.synth.prior import Family, pictures
from datafree.task import Task

if TYPE_CHECKING:
    from datafree.export.runtime import RuntimeName
    from datafree.export.unpack import Packing
    from datafree.measure.verification import Verification

__all__ = ["Result", "check_free", "export", "load", "made_by", "quantize", "strict_json", "verify", "with_estimate", "with_layers"]

Form = Literal["onnx", "openvino", "safetensors", "program"]

_LEAK = "where they were fitted to the network, they may leak statistics of the data it was trained on: treat them like that data"
_LAYER_PICTURES = 16
_ESTIMATE_PICTURES = 64  # of each family, at most
_ESTIMATE_FAMILIES: tuple[Family, ...] = ("leaves", "pink")


@dataclass(frozen=True)
class Result:
    """What :func:`quantize` gives.

    Args:
        student: the quantized network, an ordinary module in eval mode.
        plan: bits and grids, as read from the student.
        run: the provenance, for :func:`strict_json`: versions, hash of the weights, seed, method and its fields, target and protocol,
            seconds, peak memory of the process, packed bytes, fidelity on noise, notes.
        task: inputs and answer of the student.
        layers: its noise layer by layer, where :func:`with_layers` has measured it.
        pictures: the inputs that the method made, (n, *shape), if any; in memory only, unless :meth:`keeping_pictures` was called.
        keep: whether :meth:`save` writes them.
    """

    student: nn.Module
    plan: Plan
    run: dict[str, object]
    task: Task
    layers: LayerReport | None = None
    pictures: Tensor | None = None
    keep: bool = False

    def keeping_pictures(self) -> "Result":
        """The result whose :meth:`save` writes the pictures too; a note says what they may leak, or that there are none."""
        none = f"{self.run['method']} made no pictures that could be kept"
        told = none if self.pictures is None else f"{len(self.pictures)} pictures are kept: {_LEAK}"
        notes = self.run["notes"]
        assert isinstance(notes, list)
        return replace(self, run={**self.run, "notes": [*notes, told]}, keep=True)

    def save(self, folder: str | Path) -> Path:
        """Write student.safetensors, plan.json and run.json into a new ``folder``; nothing half-written stays.

        With them go layers.json where there are layers, and pictures.safetensors where they are to be kept.

        Raises OutputError where the folder exists already or cannot be written.
        """
        target = check_free(folder)
        made: Path | None = None
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            made = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
            made.chmod(0o755)
            save_student(self.student, made / STUDENT_FILE)
            layers = () if self.layers is None else ((LAYERS_FILE, asdict(self.layers)),)
            for name, value in ((PLAN_FILE, self.plan.to_json()), (RUN_FILE, self.run), *layers):
                (made / name).write_text(strict_json(value) + "\n", encoding="utf-8")
            if self.keep and self.pictures is not None:
                write_whole(made / PICTURES_FILE, save({"pictures": self.pictures.cpu().contiguous()}))
            if target.exists():
                target.rmdir()  # an empty folder is as good as none
            made.rename(target)
        except OSError as error:
            raise OutputError(f"cannot write {target}: {error.strerror or error}") from error
        finally:
            if made is not None:
                shutil.rmtree(made, ignore_errors=True)
        return target

    def export(self, path: str | Path, to: Form = "onnx", packing: "Packing" = "ort", fastest: bool = False) -> Path:
        """Write the student for a runtime, see :func:`export`; the metadata name method, target, seed and the hash of the weights."""
        return export(self.student, self.task, path, to=to, packing=packing, fastest=fastest, made_by=made_by(self.run))


def made_by(run: Mapping[str, object]) -> dict[str, object]:
    """What the metadata of an exported file keep of the provenance ``run``."""
    return {key: run[key] for key in ("method", "target", "seed", "weights_hash") if key in run}


def export(
    student: nn.Module,
    task: Task,
    path: str | Path,
    *,
    to: Form = "onnx",
    packing: "Packing" = "ort",
    fastest: bool = False,
    made_by: Mapping[str, object] | None = None,
) -> Path:
    """Write ``student`` as a file, whole or not at all.

    Args:
        student: in eval mode, with all ranges set; it stays as it is.
        task: its inputs and answer.
        path: the new file; one that is there is replaced.
        to: ``onnx``; ``openvino`` (an .xml, and the .bin of its weights beside it); ``safetensors`` (packed integers, read by
            :func:`load`); ``program`` (torch.export, float operations).
        packing: of ONNX files: ``ort``; ``openvino-onnx`` for OpenVINO's reader; ``portable`` for any runtime.
        fastest: time the file here, and take float kernels (the weights stay packed) if integers are not faster.
        made_by: what the metadata say beside plan and versions.

    Raises:
        ExportError: what the network or the plan holds has no form there; the message names the layer.
        MissingExtraError: onnx or openvino is not installed.
        OutputError: the file cannot be written.
    """
    if to == "safetensors":
        save_student(student, path)
        return Path(path)
    if to == "program":
        from datafree.export.program import export_program

        return export_program(student, task, path)
    with _extra("onnx"):
        from datafree.export.lower import Style
        from datafree.export.onnx import export_onnx, prepare

        prepared = prepare(student, task)
    style, own = Style(packing, integer_outputs=packing != "openvino-onnx"), to == "openvino"
    if fastest:
        from datafree.measure.fastest import fastest_style

        style = fastest_style(prepared, task, style, own)
    if own:
        from datafree.export.openvino import export_openvino

        return export_openvino(prepared, path, made_by, style.float_kernels)
    return export_onnx(prepared, path, style, made_by)


@contextmanager
def _extra(name: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"{error.name} is not installed: pip install 'datafree[{name}]'") from error


def verify(path: str | Path, student: nn.Module, task: Task, *, runtime: "RuntimeName | None" = None, threads: int = 0) -> "Verification":
    """Run an exported file beside ``student``, an .xml in OpenVINO and the others in ONNX Runtime unless ``runtime`` says otherwise.

    See ``datafree.measure.verify``.
    """
    with _extra("onnx"):
        from datafree.measure.verify import verify as run

        return run(path, student, task, runtime=runtime, threads=threads)


def strict_json(value: object) -> str:
    """``value`` as JSON that every reader takes: a number that is not finite becomes null, a path its text."""
    return json.dumps(_finite(value), indent=2, allow_nan=False)


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_free(folder: str | Path) -> Path:
    """``folder`` as a path. Raises OutputError if it exists and is not an empty folder, or cannot be looked into."""
    path = Path(folder)
    try:
        free = not path.exists() or path.is_dir() and not any(path.iterdir())
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    if not free:
        kind = "folder that is not empty" if path.is_dir() else "file"
        raise OutputError(f"{path} is there already, a {kind}: choose another folder or remove it")
    return path


def quantize(
    model: nn.Module,
    task: Task,
    *,
    method: str | Method = "anchor",
    target: Target | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    on_event: Callable[[Event], None] | None = None,
    folder: str | Path | None = None,
) -> Result:
    """Quantize ``model`` without data. The model is not changed; the same seed gives the same student.

    Args:
        model: a trained network that takes one tensor.
        task: the shape and range of its inputs.
        method: a name of ``datafree.methods()``, or a method with fields of your own choice.
        target: bits, protocol and exceptions, or a whole plan; ``Target()`` unless given.
        seed: of every random draw.
        device: where to work, the CPU unless told otherwise; the student stays there.
        on_event: called with every :class:`Event` of progress; of several processes only that of the first is.
        folder: for checkpoints of what is optimised: after a kill the same call goes on from the last one, to the same student. They are
            removed once the student is made. None: no file is written.

    Processes that have called ``datafree.parallel.join`` make the student together, and each returns the same one.

    Raises:
        DatafreeError: see ``datafree.errors``; the message says what to do.
    """
    target = Target() if target is None else target
    chosen = find_method(method)() if isinstance(method, str) else method
    if not isinstance(chosen, Method):
        raise MethodError(f"method must be a name or a Method, not {chosen!r}; datafree.methods() lists them")
    chosen.check()
    if not isinstance(model, nn.Module):
        raise NetworkError(f"the network must be a torch.nn.Module, not a {type(model).__name__}: see datafree.networks.load_network")
    notes: list[str] = []
    kept: list[Tensor] = []
    ctx = replace(Ctx.create(seed, device, _noting(notes, on_event)), on_pictures=kept.append)
    for note in check_network(model, task):
        ctx.note(note)
    teacher = teacher_of(model, task, ctx.device)
    flow = read(teacher, task, ctx)
    if warning := input_warning(teacher, flow, task):
        ctx.note(warning)
    asked: dict[str, object] = {
        "versions": {"datafree": version("datafree"), "torch": torch.__version__, "python": platform.python_version()},
        "weights_hash": weights_hash(model),
        "seed": seed,
        "device": str(ctx.device),
        "processes": parallel.count(),
        "method": chosen.name,
        "fields": asdict(chosen),  # type: ignore[call-overload]
        "target": asdict(target),
    }
    _check_processes(chosen, asked)
    start = time.perf_counter()
    with resumable(ctx, None if folder is None else Path(folder), strict_json({**asked, "task": asdict(task)})) as ctx:
        student = student_of(chosen, teacher, task, target, ctx)
    seconds = time.perf_counter() - start
    plan = plan_of(student)
    covered = coverage(flow, teacher, quantized_layers(student))
    if covered.floats:
        ctx.note(f"stay in float: {'; '.join(f'{name}: {reason}' for name, reason in covered.floats.items())}")
    run = asked | {
        "protocol": target.protocol,
        "data": "none",
        "seconds": seconds,
        "peak_memory_bytes": _peak_memory(ctx.device),
        "float_bytes": float_bytes(model),
        "packed_bytes": packed_bytes(student),
        "coverage": asdict(covered),
        "task": asdict(task),
        "fidelity": asdict(fidelity(teacher, student, task, torch.Generator(ctx.device).manual_seed(seed), n=_inputs(task))),
        "notes": notes,
    }
    return Result(student, plan, run, task, pictures=torch.cat(kept) if kept else None)


def with_layers(result: Result, model: nn.Module) -> Result:
    """The result with the noise of every layer, which the report shows: student against ``model``, its float network.

    Inputs are 16 procedural pictures, drawn with the seed of the run.
    """
    ctx = Ctx.create(int(str(result.run["seed"])), str(result.run["device"]))
    teacher = frozen_copy(model, ctx.device)
    inputs = pictures("mix", _LAYER_PICTURES, result.task, ctx.generator)
    flow = read(teacher, result.task, ctx)
    layers = layer_report(teacher, result.student, flow, result.task, inputs, f"{_LAYER_PICTURES} procedural pictures")
    return replace(result, layers=layers)


def with_estimate(result: Result, model: nn.Module) -> Result:
    """The result with ``run["estimate"]``: how much top-1 accuracy may have been lost against ``model``, its float network.

    An estimate without data, see ``datafree.measure.estimate``. Inputs are dead leaves and pink noise, drawn with the seed after that of
    the run, so that no method has tuned the student on them.
    """
    device = torch.device(str(result.run["device"]))
    generator = torch.Generator(device).manual_seed(int(str(result.run["seed"])) + 1)
    n = min(_ESTIMATE_PICTURES, _inputs(result.task))
    sources: dict[str, Tensor] = {family: pictures(family, n, result.task, generator) for family in _ESTIMATE_FAMILIES}
    estimate = estimate_drop(frozen_copy(model, device), result.student, result.task, sources)
    return replace(result, run={**result.run, "estimate": asdict(estimate)})


def student_of(method: Method, teacher: nn.Module, task: Task, target: Target, ctx: Ctx) -> nn.Module:
    """What ``method`` makes of ``teacher``, a frozen copy of a checked network, held to what every method owes.

    Raises DatafreeError as :func:`quantize` does.
    """
    student = method.run(teacher, task, target, ctx).eval()
    if quantizers(student):
        flow = read(teacher, task, ctx)
        limit_inputs(student, flow, task)
        if target.protocol == "deploy":
            settle(student, flow)
    parallel.align(student.state_dict().values())
    check_student(teacher, student, task, target)
    return student


def load(folder: str | Path, model: nn.Module) -> nn.Module:
    """The student saved in ``folder``, in eval mode, built on ``model``, a float network of the same architecture.

    ``model`` stays as it is, in whatever mode and precision it is: the student is built on a float32 copy, as :func:`quantize` does.

    Raises WeightsError where the folder holds no student or one that does not fit.
    """
    path = Path(folder)
    if not (path / STUDENT_FILE).is_file():
        raise WeightsError(f"{path} holds no {STUDENT_FILE}: expected a folder that datafree wrote")
    return load_student(path / STUDENT_FILE, model)


def _noting(notes: list[str], on_event: Callable[[Event], None] | None) -> Callable[[Event], None]:
    def listen(event: Event) -> None:
        if event.name == "note":
            notes.append(event.message)
        if on_event is not None and not parallel.rank():
            on_event(event)

    return listen


def _check_processes(method: Method, asked: Mapping[str, object]) -> None:
    """Several processes must have something to share, and be asked for the same."""
    if parallel.count() > 1 and not method.shares_work:
        raise MethodError(f"{method.name} trains nothing that {parallel.count()} processes could share: start it without torchrun")
    if len(set(parallel.gathered(strict_json({**asked, "device": None})))) > 1:
        raise MethodError("the processes were not given the same network, method, target and seed: make them alike")


def _inputs(task: Task) -> int:
    """How many inputs of noise are enough to tell the fidelity, yet quick: 16 pictures of 224 px, 256 of 32 px."""
    return max(16, min(256, 2**20 // math.prod(task.shape)))


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
