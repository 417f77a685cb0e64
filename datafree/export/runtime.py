"""Real runtimes behind one small face: load a file, run it, say which kernel each layer got."""

import re
import tempfile
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, final

import numpy as np

from datafree.errors import ExportError, MissingExtraError
from datafree.export.header import read_header
from datafree.export.integers import Array
from datafree.export.names import layer_name

if TYPE_CHECKING:
    import onnxruntime

RuntimeName = Literal["ort", "openvino"]
_INTEGER = ("QLinearConv", "ConvInteger", "QGemm", "MatMulInteger", "MatMulIntegerToFloat", "QLinearMatMul")
_RENAMERS = ("NchwcTransformer", "ConvActivationFusion")  # they fuse and lay out float kernels, and lose their names
_RENAMED = re.compile(r"(_token_\d+|_nchwc|_quant|/duplicated)+$")


@dataclass(frozen=True)
class Kernel:
    """What a runtime made of a layer: the name of its operation, and whether that multiplies integers."""

    name: str
    integer: bool


class Loaded(Protocol):
    """A file in a runtime.

    Attributes:
        runtime: name and version.
        precision: of the operations that do not multiply integers, as the runtime calls it: ``f32``, ``bf16``, ``f16``.
        load_seconds: how long it took to load the file.
        input_shape: of one input, without the batch.
    """

    runtime: str
    precision: str
    load_seconds: float
    input_shape: tuple[int, ...]

    def run(self, inputs: Array) -> dict[str, Array]:
        """All outputs by name; inputs: (n, *shape), float32."""

    def header(self) -> dict[str, object]:
        """What datafree wrote into the file's metadata; empty where another program made it."""

    def kernels(self, layers: Collection[str]) -> dict[str, Kernel]:
        """The kernels of these layers; one that cannot be found in what the runtime made of the file is absent."""


def by_layer(nodes: Iterable[tuple[str, Kernel]], layers: Collection[str]) -> dict[str, Kernel]:
    """The kernels of these layers from those of their calls, the name of a node and its kernel; a float kernel of one call decides."""
    found: dict[str, Kernel] = {}
    for node, kernel in nodes:
        if (name := layer_name(node)) in layers and (name not in found or not kernel.integer):
            found[name] = kernel
    return found


def open_file(
    path: str | Path, threads: int = 0, outputs: Sequence[str] = (), runtime: RuntimeName | None = None, default_precision: bool = False
) -> Loaded:
    """Load an exported file.

    Args:
        path: an ONNX file, or the .xml of OpenVINO.
        threads: how many may work; 0 leaves it to the runtime.
        outputs: names of tensors to give beside the file's own outputs.
        runtime: OpenVINO for its own files, else ONNX Runtime unless given.
        default_precision: leave OpenVINO the precision that it takes on this machine, in place of float32.

    Raises:
        ExportError: the file is missing, damaged, refused by the runtime or not of its kind.
        MissingExtraError: the runtime is not installed.
    """
    file = Path(path)
    if not file.is_file():
        raise ExportError(f"there is no file {file}: check the path")
    if runtime == "ort" and runtime_of(file) != "ort":
        raise ExportError(f"{file} is a file of OpenVINO, which ONNX Runtime cannot read: leave out the runtime, or give an ONNX file")
    if (runtime or runtime_of(file)) == "openvino":
        from datafree.export.openvino_runtime import OpenVino

        return OpenVino(file, threads, outputs, default_precision)
    return OnnxRuntime(file, threads, outputs)


def runtime_of(path: str | Path) -> RuntimeName:
    """The runtime that runs a file unless another is asked for, by its ending."""
    return "openvino" if Path(path).suffix == ".xml" else "ort"


@final
class OnnxRuntime:
    """A file in ONNX Runtime on the CPU. Its threads do not spin while they wait: several sessions would disturb each other."""

    def __init__(self, file: Path, threads: int = 0, outputs: Sequence[str] = ()) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingExtraError("running ONNX files needs onnxruntime: pip install 'datafree[onnx]'") from error
        self.runtime = f"onnxruntime {onnxruntime.__version__}"
        self.precision = "f32"
        self._file, self._data, self._threads = file, _with_outputs(file, outputs), threads
        start = time.perf_counter()
        self._session = self._open()
        self.load_seconds = time.perf_counter() - start
        (wanted,) = self._session.get_inputs()
        self._input, self.input_shape = wanted.name, tuple(wanted.shape[1:])
        self._names = [each.name for each in self._session.get_outputs()]

    def _open(self, optimised: Path | None = None) -> "onnxruntime.InferenceSession":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self._threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self._file.parent.resolve()))
        if optimised is not None:
            options.optimized_model_filepath = str(optimised)
            options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimised.data")
        renamers = [] if optimised is None else list(_RENAMERS)
        refusals = onnxruntime.capi.onnxruntime_pybind11_state
        try:
            return onnxruntime.InferenceSession(self._data, options, providers=["CPUExecutionProvider"], disabled_optimizers=renamers)
        except (refusals.Fail, refusals.InvalidGraph, refusals.InvalidProtobuf, refusals.InvalidArgument, refusals.NotImplemented) as error:
            reason = str(error).strip().splitlines()[0]
            raise ExportError(
                f"{self.runtime} refuses {self._file}: {reason}; possible cause: a damaged file, a missing .data beside it, or operators "
                "of a later ONNX"
            ) from error

    def run(self, inputs: Array) -> dict[str, Array]:
        """All outputs by name; inputs: (n, *shape), float32. Raises ExportError where the file takes other inputs."""
        (wanted,) = self._session.get_inputs()
        fixed = [size for size in wanted.shape[1:] if isinstance(size, int)]
        if list(inputs.shape[1:]) != fixed:
            raise ExportError(
                f"{self._file} takes inputs of shape {wanted.shape}, not {list(inputs.shape)}: is it the file of this network?"
            )
        results = self._session.run(None, {wanted.name: np.ascontiguousarray(inputs, np.float32)})
        return dict(zip(self._names, results, strict=True))

    def header(self) -> dict[str, object]:
        """What datafree wrote into the file's metadata; empty where another program made it."""
        return read_header(self._session.get_modelmeta().custom_metadata_map.get("datafree", ""))

    def kernels(self, layers: Collection[str]) -> dict[str, Kernel]:
        """The kernels of these layers, read from the graph as ONNX Runtime has optimised it."""
        import onnx

        with tempfile.TemporaryDirectory(prefix="datafree-") as folder:
            self._open(Path(folder) / "optimised.onnx")
            nodes = onnx.load(Path(folder) / "optimised.onnx", load_external_data=False).graph.node
        named = ((_RENAMED.sub("", node.name), Kernel(node.op_type, node.op_type in _INTEGER)) for node in nodes)
        return by_layer(named, layers)


def _with_outputs(file: Path, outputs: Sequence[str]) -> bytes:
    """The file, with further tensors of it among its outputs."""
    data = file.read_bytes()
    if not outputs:
        return data
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load_from_string(data)
    except DecodeError as error:
        raise ExportError(f"{file} is no ONNX file, or a damaged one: {error}; export it anew") from error
    there = {name for node in model.graph.node for name in node.output}
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in outputs if name in there)
    return bytes(model.SerializeToString())
