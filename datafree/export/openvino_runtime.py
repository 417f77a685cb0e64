"""OpenVINO behind the face of ``runtime.Loaded``: its own files (.xml, with the weights in a .bin), and ONNX files that suit it."""

import re
import time
from collections.abc import Collection, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, final

import numpy as np

from datafree.errors import ExportError, MissingExtraError
from datafree.export.header import read_header
from datafree.export.integers import Array
from datafree.export.runtime import Kernel, by_layer

if TYPE_CHECKING:
    import openvino

_LAYERS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
_INTEGER = ("i8", "u8")
_RENAMED = re.compile("(/WithoutBiases|/DequantizationMultiply)+$")


@final
class OpenVino:
    """A file in OpenVINO on the CPU, in float32 where it does not multiply integers.

    With its default precision OpenVINO takes bf16 or f16 instead on processors that have them, and rounds to 8 bits what enters linear
    layers with packed weights, even where the file does not.
    """

    def __init__(self, file: Path, threads: int = 0, outputs: Sequence[str] = (), default_precision: bool = False) -> None:
        openvino = imported()
        self.runtime = f"openvino {openvino.__version__.partition('-')[0]}"
        self._file = file
        core = openvino.Core()
        options = {"PERFORMANCE_HINT": "LATENCY"}
        if not default_precision:
            options |= {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
        if threads:
            options["INFERENCE_NUM_THREADS"] = str(threads)
        start = time.perf_counter()
        try:
            model = core.read_model(file)
            self._header, self._grids = _header(model), _add_outputs(model, outputs)
            self._compiled = core.compile_model(model, "CPU", options)
        except RuntimeError as error:
            raise ExportError(
                f"{self.runtime} refuses {file}: {reason(error)}; possible cause: a damaged file, a missing .bin or .data beside it, or "
                "operators that it does not know"
            ) from error
        self.load_seconds = time.perf_counter() - start
        self.precision = str(self._compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name())
        self.input_shape = tuple(each.get_length() for each in list(self._compiled.input(0).partial_shape)[1:])

    def run(self, inputs: Array) -> dict[str, Array]:
        """All outputs by name; inputs: (n, *shape), float32. Raises ExportError where the file takes other inputs."""
        wanted = self._compiled.input(0).partial_shape
        if not wanted.compatible(imported().PartialShape(list(inputs.shape))):
            raise ExportError(f"{self._file} takes inputs of shape {wanted}, not {list(inputs.shape)}: is it the file of this network?")
        results = self._compiled(np.ascontiguousarray(inputs, np.float32))
        found = {}
        for output, value in results.items():
            for name in output.get_names():
                low, step = self._grids.get(name, (0.0, 0.0))
                found[name] = np.round((value - low) / step).astype(np.uint8) if step else value
        return found

    def header(self) -> dict[str, object]:
        """What datafree wrote into the file's metadata; empty where another program made it."""
        return read_header(self._header)

    def kernels(self, layers: Collection[str]) -> dict[str, Kernel]:
        """The kernels of these layers, read from the graph as OpenVINO executes it."""
        found = []
        for op in self._compiled.get_runtime_model().get_ordered_ops():
            info = {key: value.astype(str) for key, value in op.get_rt_info().items()}
            if info["layerType"] in _LAYERS:
                for name in info["originalLayersNames"].split(","):
                    found.append((_RENAMED.sub("", name), Kernel(info["layerType"], info["runtimePrecision"] in _INTEGER)))
        return by_layer(found, layers)


def imported() -> ModuleType:
    """The package ``openvino``. Raises MissingExtraError where it is not installed."""
    try:
        return import_module("openvino")
    except ImportError as error:
        raise MissingExtraError("files of OpenVINO need openvino: pip install 'datafree[openvino]'") from error


def reason(error: RuntimeError) -> str:
    """The line that says what went wrong: the others tell files and lines of OpenVINO's own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(("Exception from", "Check '"))]
    return (told or lines or [type(error).__name__])[0]


def _header(model: "openvino.Model") -> str:
    """The JSON in the metadata: of OpenVINO's files at the top, of ONNX files where its reader puts them."""
    for path in (["datafree"], ["framework", "datafree"]):
        if model.has_rt_info(path):
            return str(model.get_rt_info(path).astype(str))
    return ""


def _add_outputs(model: "openvino.Model", names: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Make tensors outputs; returns the smallest value and the step of those that are the values of codes."""
    there = {name: output for op in model.get_ordered_ops() for output in op.outputs() for name in output.get_names()}
    grids = {}
    for name in names:
        if name in there:
            maker = there[name].get_node()
            model.add_outputs([name])
            if maker.get_type_name() == "FakeQuantize":
                low, high = (maker.input_value(place).get_node().data.item() for place in (3, 4))
                grids[name] = (low, (high - low) / (maker.get_attributes()["levels"] - 1))
    return grids
