"""The whole way: a network and its task in, a student with its plan and provenance out; loaded, measured."""

import math
import platform
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from datafree import parallel
from datafree.bits.cost import float_bytes, packed_bytes
from datafree.checks import check_network, check_student
from datafree.context import Ctx, Event
from datafree.errors import MethodError, NetworkError, WeightsError
from datafree.export.float_weights import weights_hash
from datafree.export.weights import load_student
from datafree.fit import resumable
from datafree.graph.coverage import Coverage, coverage
from datafree.graph.flow import Flow, read
from datafree.graph.plain import teacher_of
from datafree.graph.swap import frozen_copy
from datafree.input_check import input_warning
from datafree.measure.estimate import estimate_drop
from datafree.measure.fidelity import fidelity
from datafree.measure.layers import layer_report
from datafree.method import Method, find_method
from datafree.plan import Target
from datafree.quant.insert import plan_of, quantized_layers, quantizers
from datafree.quant.limits import limit_inputs
from datafree.quant.settle import settle
from datafree.report.runs import STUDENT_FILE, read_record, task_of
from datafree.result import Result, strict_json
from datafree.synth.prior import Family, pictures
from datafree.task import Task

_LAYER_PICTURES = 16
_ESTIMATE_PICTURES = 64  # of each family, at most
_ESTIMATE_FAMILIES: tuple[Family, ...] = ("leaves", "pink")


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

    Processes that have called ``datafree.parallel.join`` make the student together, and each returns the same one. Raises DatafreeError,
    see ``datafree.errors``; the message says what to do.
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
    run = asked | {
        "protocol": target.protocol,
        "data": "none",
        "seconds": time.perf_counter() - start,
        "peak_memory_bytes": _peak_memory(ctx.device),
        "float_bytes": float_bytes(model),
        "packed_bytes": packed_bytes(student),
        "coverage": asdict(_covered(flow, teacher, student, ctx)),
        "task": asdict(task),
        "fidelity": asdict(fidelity(teacher, student, task, torch.Generator(ctx.device).manual_seed(seed), n=_inputs(task))),
        "notes": notes,
    }
    return Result(student, plan_of(student), run, task, pictures=torch.cat(kept) if kept else None)


def _covered(flow: Flow, teacher: nn.Module, student: nn.Module, ctx: Ctx) -> Coverage:
    """What is quantized of the network; a note names what is not."""
    found = coverage(flow, teacher, quantized_layers(student))
    if found.floats:
        ctx.note(f"stay in float: {'; '.join(f'{name}: {reason}' for name, reason in found.floats.items())}")
    return found


def with_layers(result: Result, model: nn.Module) -> Result:
    """The result with the noise of every layer, which the report shows: student against ``model``, its float network.

    Inputs are 16 procedural pictures, drawn with the seed of the run.
    """
    ctx = Ctx.create(int(str(result.run["seed"])), str(result.run["device"]))
    teacher = teacher_of(model, result.task, ctx.device)
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
    return load_student(path / STUDENT_FILE, teacher_of(model, task_of(read_record(path))))


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
