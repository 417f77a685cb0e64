"""Does an exported file do in its runtime what the student does, on integer kernels, and faster than the float network?"""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from datafree.export.files import size_of
from datafree.export.integers import Array
from datafree.export.onnx import Prepared, float_onnx_bytes, prepare
from datafree.export.rewrite import codes_name
from datafree.export.runtime import Kernel, Loaded, RuntimeName, open_file, runtime_of
from datafree.measure.speed import Latency, interleaved
from datafree.quant.grid import dequantize, quantize
from datafree.quant.insert import quantizers
from datafree.quant.quantizer import Quantizer
from datafree.task import Task

CLOSE = 1e-3  # of the largest answer: what sums of floats in another order may differ by
NOISE = 1.05  # a median latency above that of the float file by less is no proof


@dataclass(frozen=True)
class Verification:
    """What came of running a file.

    Args:
        file: its name.
        runtime: name and version.
        inputs: how many inputs of noise were compared.
        largest_difference: of the answers of file and student, each going its own way.
        mean_difference: the same, mean of the absolute values.
        largest_answer: of the student, to compare with.
        same_top1: percent of the inputs with the same highest answer.
        points: how many quantized activations were compared, given what entered them in the file.
        code_difference: the largest difference of their codes, in quantization steps.
        differing_codes: percent of their codes that differ.
        local_difference: of the answers, given the file's own codes of all activations.
        layers: how many have quantized weights.
        kernels: of these layers, by name, where the runtime still knows them.
        float_kernels: the file was written for float kernels on purpose; then it rounds no activation.
        fell_back: layers that have integers to multiply, but got a float kernel or none that could be found.
        file_bytes: size of the file.
        load_seconds: to load it.
        latency: of one input, in milliseconds.
        float_latency: of the float file in the same run, taking turns.
    """

    file: str
    runtime: str
    inputs: int
    largest_difference: float
    mean_difference: float
    largest_answer: float
    same_top1: float
    points: int
    code_difference: int
    differing_codes: float
    local_difference: float
    layers: int
    kernels: dict[str, Kernel]
    float_kernels: bool
    fell_back: tuple[str, ...]
    file_bytes: int
    load_seconds: float
    latency: Latency
    float_latency: Latency

    @property
    def differences(self) -> tuple[str, ...]:
        """Where the file computes something else than the student, with what to do; empty if it does not."""
        found = []
        if self.code_difference > 1:
            found.append(
                f"codes of activations differ by {self.code_difference} steps from the student's: is this the file of that student?"
            )
        if not self.local_difference <= CLOSE * max(self.largest_answer, 1e-6):
            found.append(
                f"given equal codes, answers differ by {self.local_difference:.2g} of {self.largest_answer:.2g}: "
                "is this the file of that student?"
            )
        return tuple(found)

    @property
    def failures(self) -> tuple[str, ...]:
        """All that is wrong, with what to do; empty if nothing is."""
        found = list(self.differences)
        if self.fell_back:
            found.append(
                f"fell back to float: {', '.join(self.fell_back[:5])}{' and others' if len(self.fell_back) > 5 else ''} "
                f"({len(self.fell_back)} of {self.layers} layers): allow it with --allow-fallback, or export to another target"
            )
        if self.latency.median > NOISE * self.float_latency.median:
            found.append(
                f"slower than the float network: {self.latency.median:.2f} ms against {self.float_latency.median:.2f} ms: "
                "export with --fastest, or allow it with --allow-fallback"
            )
        return tuple(found)

    @property
    def speedup(self) -> float:
        """How many times as fast as the float file."""
        return self.float_latency.median / self.latency.median

    def to_json(self) -> dict[str, object]:
        """A JSON-ready dictionary."""
        return {**asdict(self), "speedup": self.speedup, "failures": self.failures}


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
        runtime: OpenVINO for its own files, else ONNX Runtime unless told otherwise.
        threads: of the runtime; 0 leaves it to the runtime.
        inputs: how many inputs of noise to compare.
        seed: of the noise.

    Raises:
        ExportError: the file is missing, damaged, refused by the runtime, or takes other inputs.
        MissingExtraError: the runtime is not installed.
    """
    file = Path(path)
    x = task.noise(inputs, torch.Generator().manual_seed(seed))
    probe = open_file(file, threads, [codes_name(point) for point in quantizers(student)], runtime)
    found = probe.run(x.numpy())
    with torch.no_grad():
        own = task.run(student, x.to(next(student.parameters()).device)).cpu()
    float_kernels = probe.header().get("float_kernels") is True
    forced, codes = _forced(student, task, x, found, float_kernels)
    loaded = open_file(file, threads, runtime=runtime)
    answer = torch.from_numpy(loaded.run(x.numpy())["output"])
    prepared = prepare(student, task) if prepared is None else prepared
    latency, float_latency = _latencies(loaded, prepared, threads, x[:1].numpy(), runtime or runtime_of(file))
    kernels = loaded.kernels(tuple(prepared.weights))
    fell_back = tuple(name for name in prepared.integer if not float_kernels and not (name in kernels and kernels[name].integer))
    different = (own - answer).abs()
    return Verification(
        file=file.name,
        runtime=loaded.runtime,
        inputs=inputs,
        largest_difference=float(different.max()),
        mean_difference=float(different.mean()),
        largest_answer=float(own.abs().max()),
        same_top1=100 * float((own.argmax(1) == answer.argmax(1)).double().mean()),
        points=len(codes),
        code_difference=max((int(each.max()) for each in codes), default=0),
        differing_codes=100 * sum(int((each > 0).sum()) for each in codes) / max(1, sum(each.numel() for each in codes)),
        local_difference=float((forced - torch.from_numpy(found["output"])).abs().max()),
        layers=len(prepared.weights),
        kernels=kernels,
        float_kernels=float_kernels,
        fell_back=fell_back,
        file_bytes=size_of(file),
        load_seconds=loaded.load_seconds,
        latency=latency,
        float_latency=float_latency,
    )


def _forced(student: nn.Module, task: Task, x: Tensor, found: dict[str, Array], float_kernels: bool) -> tuple[Tensor, list[Tensor]]:
    """The student's answer where every activation takes the codes that the file gave it, and by how many steps its own would differ.

    So a code that was rounded the other way is counted once and does not drag along all that comes after it.
    """
    steps: list[Tensor] = []
    hooks = []
    for point, quantizer in quantizers(student).items():
        hooks.append(quantizer.register_forward_hook(_take_over(point, found, steps, float_kernels)))
    try:
        with torch.no_grad():
            return task.run(student, x.to(next(student.parameters()).device)).cpu(), steps
    finally:
        for hook in hooks:
            hook.remove()


def _take_over(
    point: str, found: dict[str, Array], steps: list[Tensor], float_kernels: bool
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    calls = 0

    def hook(module: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> Tensor:
        nonlocal calls
        assert isinstance(module, Quantizer)
        calls += 1
        given = found.get(codes_name(point, calls))
        if given is None:  # the file shares the codes of an equal quantizer, or rounds nothing
            return args[0] if float_kernels else result
        shift = 128 if module.spec.levels[0] < 0 else 0
        codes = torch.from_numpy(given.astype(np.int16)).to(result.device) - shift
        own = quantize(args[0], module.scale, module.zero, module.spec)
        steps.append((codes - own).abs().cpu())
        return dequantize(codes, module.scale, module.zero, module.spec)

    return hook


def _latencies(loaded: Loaded, prepared: Prepared, threads: int, x: Array, runtime: RuntimeName) -> tuple[Latency, Latency]:
    """Of the file and of the float file in the same runtime, taking turns."""
    with tempfile.TemporaryDirectory(prefix="datafree-") as folder:
        whole = Path(folder) / "float.onnx"
        whole.write_bytes(float_onnx_bytes(prepared))
        quantized, full = interleaved([loaded, open_file(whole, threads, runtime=runtime)], x)
    return quantized, full
