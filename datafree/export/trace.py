"""The student as an ONNX graph of float operations, with a marker node wherever a weight or an activation is quantized.

Markers stand in the domain ``datafree``: ``Weight`` (no data; attribute ``layer``) and ``Quantized`` (one input; attributes ``point`` and
``call``, which counts the calls of the point's module from 1).
What they mean is up to :mod:`datafree.export.lower`, so that one trace serves all files, the float one too.
"""

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch._dynamo.exc
from torch import Tensor, nn

from datafree.errors import ExportError, MissingExtraError
from datafree.outputs import named_outputs, one_for_each_input
from datafree.quant.insert import latent_weight, quantized_layers, quantizers
from datafree.task import Task

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN = "datafree"
OPSET = 21  # the first with 4-bit integers
_EXPORT_FAILURES = (
    RuntimeError, ValueError, TypeError, AssertionError, AttributeError, LookupError, torch._dynamo.exc.TorchDynamoException,
)  # fmt: skip


class _Weight(nn.Module):
    """In place of the weight quantizer: a node that stands for the weight."""

    def __init__(self, layer: str) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, like: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(f"{DOMAIN}::Weight", (), {"layer": self.layer}, dtype=torch.float32, shape=like.shape, version=1)


class _Point(nn.Module):
    """In place of the quantizer of an activation: a node that stands for it."""

    def __init__(self, point: str) -> None:
        super().__init__()
        self.point, self.calls = point, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        name, shape = f"{DOMAIN}::Quantized", x.shape
        return torch.onnx.ops.symbolic(name, (x,), {"point": self.point, "call": self.calls}, dtype=torch.float32, shape=shape, version=1)


class _Outputs(nn.Module):
    """The network with all tensors that it returns as a tuple, the task's answer first, each a tensor of its own."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        for module in self.modules():
            if isinstance(module, _Point):
                module.calls = 0
        found: list[Tensor] = []
        for tensor in named_outputs(self.model(x), self.task.output).values():
            found.append(tensor.clone() if any(tensor is other for other in (x, *found)) else tensor)
        return tuple(found)


def trace(student: nn.Module, task: Task) -> "ir.Model":
    """The graph of ``student``, the batch dynamic; ``student`` stays as it is.

    It goes from ``input`` (batch, *shape) to all tensors that the network returns, the task's answer first, named as in
    :func:`datafree.outputs.named_outputs`.

    Raises:
        ExportError: torch.export cannot follow the network, or ONNX has no form of an operation; the message names the layer.
        MissingExtraError: onnx is not installed.
    """
    try:
        import onnx_ir as ir
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("writing ONNX needs onnx and onnxscript: pip install 'datafree[onnx]'") from error
    names = _output_names(student, task)
    with _quiet():
        program = exported(_Outputs(_marked(student), task).eval(), task)
        try:
            made = torch.onnx.export(program, dynamo=True, input_names=["input"], opset_version=OPSET, verbose=False)
        except torch.onnx.errors.OnnxExporterError as error:
            raise ExportError(f"{_culprit(program, error)} has no form in ONNX: {_first_line(error.__cause__ or error)}") from error
    assert made is not None
    graph = made.model.graph
    (inputs,) = graph.inputs
    batch = str(inputs.shape[0])
    inputs.name, inputs.shape = "input", ir.Shape(["batch", *task.shape])
    for number, (name, output) in enumerate(zip(names, list(graph.outputs), strict=True)):
        if output.producer() is None:  # a constant, which keeps its own name
            output = graph.outputs[number] = _copied(graph, output)
        output.name = name
        output.shape = ir.Shape([size if isinstance(size, int) else str(size).replace(batch, "batch") for size in output.shape])
    return made.model


def _copied(graph: "ir.Graph", value: "ir.Value") -> "ir.Value":
    import onnx_ir as ir

    node = ir.node("Identity", [value])
    node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
    graph.append(node)
    return node.outputs[0]


def _output_names(student: nn.Module, task: Task) -> list[str]:
    """Raises ExportError where a file cannot have these outputs."""
    with torch.no_grad():
        result = student(_example(student, task))
    if one_for_each_input(result):
        raise ExportError(
            f"the network returns a list with {', '.join(named_outputs(result, task.output))} for each input, and a file has no lists: "
            "let its forward return tensors of the whole batch"
        )
    names = list(named_outputs(result, task.output))
    if "input" in names:
        raise ExportError("the network returns a part 'input', which is what the file calls its input: rename the part")
    return names


def exported(model: nn.Module, task: Task) -> torch.export.ExportedProgram:
    """``model`` followed by torch.export, the batch dynamic. Raises ExportError where it cannot be followed."""
    try:
        return torch.export.export(model, (_example(model, task),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except _EXPORT_FAILURES as error:
        raise ExportError(f"torch.export cannot follow the network: {_first_line(error)}; rewrite what it names") from error


def _example(model: nn.Module, task: Task) -> Tensor:
    return torch.zeros(2, *task.shape, device=next(model.parameters()).device)


def _marked(student: nn.Module) -> nn.Module:
    """A copy with markers for quantizers, and stand-ins without memory for the weights behind them."""
    stand_ins: dict[int, object] = {
        id(latent): nn.Parameter(torch.zeros((), device=latent.device).expand(latent.shape), requires_grad=False)
        for latent in map(latent_weight, quantized_layers(student).values())
    }
    marked = copy.deepcopy(student, stand_ins)
    for name, layer in quantized_layers(marked).items():
        layer.get_submodule("parametrizations.weight").add_module("0", _Weight(name))
    for point in quantizers(marked):
        name, _, side = point.rpartition(":")
        setattr(marked.get_submodule(name), f"{side}_quantizer", _Point(point))
    return marked


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the remarks of the exporter on what is not installed or will be renamed."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _culprit(program: torch.export.ExportedProgram, error: BaseException) -> str:
    """The operation that the exporter failed at, and its layer."""
    for node in program.graph.nodes:
        if f"%{node.name} :" in str(error) or f"%{node.name} " in str(error.__cause__ or ""):
            stack = list(node.meta.get("nn_module_stack", {}).values())
            layer = stack[-1][0].removeprefix("L['self'].").removeprefix("model.") if stack else ""
            return f"operation {node.target} in {layer or 'the forward of the network'}"
    return "an operation of the network"
