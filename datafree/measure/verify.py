"""Does an exported file do in its runtime what the student does, on integer kernels, and faster than the float network?"""

import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from datafree.errors import ExportError
from datafree.export.files import size_of
from datafree.export.integers import Array
from datafree.export.names import codes_name
from datafree.export.onnx import Prepared, export_float_onnx, prepare
from datafree.export.runtime import Kernel, Loaded, RuntimeName, open_file, runtime_of
from datafree.measure.fidelity import batch_axis, class_axis
from datafree.measure.speed import Latency, interleaved
from datafree.measure.verification import DefaultPrecision, OutputDifference, Verification
from datafree.outputs import left_out, named_outputs
from datafree.plan import Plan, QSpec
from datafree.quant.grid import dequantize, quantize
from datafree.quant.insert import quantizers
from datafree.quant.quantizer import Quantizer
from datafree.task import Task

_NUMBERS = 2**22  # of all inputs together, so that the codes of all activations of large pictures fit the memory


def verify(
    path: str | Path,
    student: nn.Module,
    task: Task,
    *,
    prepared: Prepared | None = None,
    runtime: RuntimeName | None = None,
    threads: int = 0,
    inputs: int = 16,
    seed: int = 0,
) -> Verification:
    """Run the file at ``path`` beside ``student``, which it was exported from.

    Args:
        path: an ONNX file, or the .xml of OpenVINO.
        student: in eval mode; it stays as it is.
        task: its inputs and answer.
        prepared: the student read for export, where that has been done.
        runtime: OpenVINO for its own files, else ONNX Runtime unless given.
        threads: of the runtime; 0 leaves it to the runtime.
        inputs: how many inputs of noise to compare, fewer where they are large.
        seed: of the noise.

    Raises:
        ExportError: the file is missing, damaged, refused by the runtime, or takes other inputs; or the student draws random numbers.
        MissingExtraError: the runtime is not installed.
    """
    file, runtime = Path(path), runtime or runtime_of(path)
    count = max(2, min(inputs, _NUMBERS // math.prod(task.shape)))
    x = task.noise(count, torch.Generator().manual_seed(seed))
    own, calls, left = _own(student, task, x)
    names = [codes_name(point, call + 1) for point, number in calls.items() for call in range(number)]
    probe = open_file(file, threads, names, runtime)
    found = probe.run(x.numpy())
    header = probe.header()
    float_kernels = header.get("float_kernels") is True
    forced, steps = _forced(student, task, x, found, float_kernels)
    loaded = open_file(file, threads, runtime=runtime)
    answers = loaded.run(x.numpy())
    missing = _missing(own, answers)
    outputs = {name: _difference(own[name], answers[name], forced[name], found[name]) for name in own if name not in missing}
    prepared = prepare(student, task) if prepared is None else prepared
    kernels = loaded.kernels(prepared.layers)
    latency, float_latency = _latencies(loaded, prepared, threads, x[:1].numpy(), runtime)
    worst = {point: int(each.max()) for point, each in steps.items() if each.numel()}
    return Verification(
        file=file.name,
        runtime=loaded.runtime,
        precision=loaded.precision,
        default_precision=_default_precision(file, threads, x, own, missing) if runtime == "openvino" else None,
        inputs=count,
        outputs=outputs,
        missing=missing,
        left_out=left,
        same_top1=_same_top1(task, batch_axis(student, task), own, answers, missing),
        points=len(steps),
        code_difference=max(worst.values(), default=0),
        first_difference=next((point for point, step in worst.items() if step > 1), None),
        differing_codes=100 * sum(int((each > 0).sum()) for each in steps.values()) / max(1, sum(map(torch.numel, steps.values()))),
        same_plan=_same_plan(header, prepared.plan),
        layers=len(prepared.layers),
        float_inputs=len(prepared.layers) - len(prepared.integer),
        kernels=kernels,
        float_kernels=float_kernels,
        fell_back={} if float_kernels else _fell_back(prepared, kernels, header, loaded.runtime),
        file_bytes=size_of(file),
        load_seconds=loaded.load_seconds,
        latency=latency,
        float_latency=float_latency,
    )


def _same_plan(header: Mapping[str, object], plan: Plan) -> bool | None:
    return header["plan"] == json.loads(json.dumps(plan.to_json())) if "plan" in header else None


def _own(student: nn.Module, task: Task, x: Tensor) -> tuple[dict[str, Tensor], Counter[str], tuple[str, ...]]:
    """The student's outputs, how often each of its points is called, and what it returns besides tensors."""
    calls: Counter[str] = Counter()

    def counting(point: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda module, args, result: calls.update([point])

    with _hooked(student, {point: counting(point) for point in quantizers(student)}):
        result = _called(student, x)
    own = _on_cpu(named_outputs(result, task.output))
    again = _on_cpu(named_outputs(_called(student, x), task.output))
    for name, output in own.items():
        if again[name].shape != output.shape or not torch.equal(again[name].nan_to_num(), output.nan_to_num()):
            raise ExportError(
                f"the student answers the same inputs otherwise when it is called again ({name}): nothing can be compared with it; "
                "take random draws and memory out of its forward"
            )
    return own, calls, left_out(result)


def _called(student: nn.Module, x: Tensor) -> object:
    """What the student returns for a copy of the inputs: a network may write into what it is given."""
    with torch.no_grad():
        return student(x.clone().to(next(student.parameters()).device))


def _on_cpu(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: output.cpu() for name, output in outputs.items()}


@contextmanager
def _hooked(student: nn.Module, hooks: Mapping[str, Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]]) -> Iterator[None]:
    """The forward hooks of the quantizers of these points, and none afterwards."""
    found = quantizers(student)
    handles = [found[point].register_forward_hook(hook) for point, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _missing(own: Mapping[str, Tensor], answers: Mapping[str, Array]) -> dict[str, str]:
    """The outputs that cannot be compared, with what the file has in their places."""
    missing = {}
    for name, output in own.items():
        if name not in answers:
            missing[name] = f"its outputs are {', '.join(answers)}"
        elif tuple(output.shape) != answers[name].shape:
            missing[name] = f"its shape is {answers[name].shape} there, {tuple(output.shape)} in the student"
    return missing


def _difference(own: Tensor, answer: Array, forced: Tensor, given: Array) -> OutputDifference:
    """Of one output: ``own`` of the student beside ``answer`` of the file, and both given the file's codes."""
    far, local = _far(own, answer), _far(forced, given)
    values = own.double()[own.double().isfinite()]
    noise = float(far.square().sum())
    return OutputDifference(
        largest=float(far.max()) if far.numel() else 0.0,
        mean=float(far.mean()) if far.numel() else 0.0,
        sqnr=math.inf if noise == 0 else 10 * math.log10(max(float(values.square().sum()), 1e-300) / noise),
        local=float(local.max()) if local.numel() else 0.0,
        largest_value=float(values.abs().max()) if values.numel() else 0.0,
        differing=None if own.is_floating_point() else 100 * float((local > 0).double().sum()) / max(1, local.numel()),
    )


def _far(one: Tensor, other: Array) -> Tensor:
    """Absolute differences in float64; 0 where both are the same infinity or no number."""
    first, second = one.double(), torch.from_numpy(np.asarray(other)).double()
    same = (first == second) | (first.isnan() & second.isnan())
    return torch.where(same, torch.zeros(()).double(), (first - second).abs())


def _same_top1(
    task: Task, batch: int | None, own: Mapping[str, Tensor], answers: Mapping[str, Array], missing: Mapping[str, str]
) -> float | None:
    """Of the task's answer, which is the first output; ``batch`` is its axis of the inputs."""
    name, answer = next(iter(own.items()))
    axis = class_axis(task, answer.shape, batch)
    if axis is None or name in missing:
        return None
    return 100 * float((answer.argmax(axis) == torch.from_numpy(answers[name]).argmax(axis)).double().mean())


def _fell_back(prepared: Prepared, kernels: Mapping[str, Kernel], header: Mapping[str, object], runtime: str) -> dict[str, str]:
    """The layers that have integers to multiply but compute in float, with the reason that the file or the runtime gives."""
    told = header.get("float_layers")
    reasons = told if isinstance(told, Mapping) else {}
    found = {}
    for name in prepared.integer:
        if name not in kernels:
            found[name] = f"{runtime} shows no kernel of that name"
        elif not kernels[name].integer:
            found[name] = str(reasons.get(name, f"{runtime} chose the float kernel {kernels[name].name}"))
    return found


def _default_precision(file: Path, threads: int, x: Tensor, own: Mapping[str, Tensor], missing: Mapping[str, str]) -> DefaultPrecision:
    """What OpenVINO does where nobody asks it for float32."""
    loaded = open_file(file, threads, runtime="openvino", default_precision=True)
    answers = loaded.run(x.numpy())
    found = {name: _difference(own[name], answers[name], own[name], answers[name]) for name in own if name not in missing}
    name = min(found, key=lambda name: found[name].sqnr, default="")
    return DefaultPrecision(loaded.precision, name, found[name].largest if found else math.nan, found[name].sqnr if found else math.nan)


def _forced(
    student: nn.Module, task: Task, x: Tensor, found: Mapping[str, Array], float_kernels: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The student's outputs where every activation takes the codes that the file gave it, and by how many steps its own would differ.

    So a code that was rounded the other way is counted once and does not drag along all that comes after it. Where the file has float
    kernels, activations are not rounded.
    """
    steps: dict[str, Tensor] = {}
    shared: dict[_Rounded, Tensor] = {}
    hooks = {point: _take_over(point, found, steps, shared, float_kernels) for point in quantizers(student)}
    with _hooked(student, hooks):
        return _on_cpu(named_outputs(_called(student, x), task.output)), steps


@dataclass(frozen=True, eq=True)
class _Rounded:
    """A tensor, in the version that was rounded, and the grid it was rounded to: a file holds the codes once."""

    tensor: Tensor = field(hash=False, compare=False)
    identity: int
    version: int
    grid: tuple[float, float, QSpec]


def _rounded(x: Tensor, quantizer: Quantizer) -> _Rounded:
    return _Rounded(x, id(x), x._version, (float(quantizer.scale), float(quantizer.zero), quantizer.spec))


def _take_over(
    point: str, found: Mapping[str, Array], steps: dict[str, Tensor], shared: dict[_Rounded, Tensor], float_kernels: bool
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    calls = 0

    def hook(module: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> Tensor:
        nonlocal calls
        assert isinstance(module, Quantizer)
        calls += 1
        if float_kernels:
            return args[0]
        given, key = found.get(codes_name(point, calls)), _rounded(args[0], module)
        if given is None:  # the file has the codes of an equal quantizer of the same tensor
            return shared.get(key, result)
        shift = 128 if module.spec.levels[0] < 0 else 0
        codes = torch.from_numpy(given.astype(np.int16)).to(result.device) - shift
        own = quantize(args[0], module.scale, module.zero, module.spec)
        steps[point if calls == 1 else f"{point}, call {calls}"] = (codes - own).abs().cpu()
        shared[key] = dequantize(codes, module.scale, module.zero, module.spec)
        return shared[key]

    return hook


def _latencies(loaded: Loaded, prepared: Prepared, threads: int, x: Array, runtime: RuntimeName) -> tuple[Latency, Latency]:
    """Of the file and of the float file in the same runtime, taking turns."""
    with tempfile.TemporaryDirectory(prefix="datafree-") as folder:
        whole = export_float_onnx(prepared, Path(folder) / "float.onnx")
        quantized, full = interleaved([loaded, open_file(whole, threads, runtime=runtime)], x)
    return quantized, full
