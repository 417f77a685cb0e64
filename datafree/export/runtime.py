"""Real runtimes behind one small face: load a file, run it, say which kernel each layer got."""

import json
import re
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from datafree.errors import ExportError, MissingExtraError
from datafree.export.integers import Array

_INTEGER = {"QLinearConv", "ConvInteger", "QGemm", "MatMulInteger", "MatMulIntegerToFloat", "QLinearMatMul", "DynamicQuantizeMatMul"}


@dataclass(frozen=True)
class Kernel:
    """What a runtime made of a layer: the name of its operation, and whether that multiplies integers."""

    name: str
    integer: bool


class Loaded(Protocol):
    """A file in a runtime."""

    @property
    def runtime(self) -> str:
        """Name and version of the runtime."""

    @property
    def load_seconds(self) -> float:
        """How long it took to load the file."""

    def run(self, inputs: Array) -> dict[str, Array]:
        """All outputs by name; inputs: (n, *shape), float32."""

    def kernels(self, layers: Collection[str]) -> dict[str, Kernel]:
        """The kernel of each of these layers; a layer that cannot be found in what the runtime made of the file is absent."""


class OnnxRuntime:
    """A file in ONNX Runtime on the CPU. Threads do not spin while they wait: several sessions would disturb each other."""

    def __init__(self, file: bytes, threads: int = 0, outputs: Sequence[str] = ()) -> None:
        """Load ``file``; ``outputs`` are tensors to give beside the file's own. Raises ExportError where it is refused."""
        ort = _onnxruntime()
        self._optimised = Path(tempfile.mkdtemp(prefix="datafree-")) / "optimised.onnx"
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        start = time.perf_counter()
        try:
            self._session = ort.InferenceSession(with_outputs(file, outputs), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors share no base of their own
            raise ExportError(f"ONNX Runtime {ort.__version__} refuses the file: {_first_line(error)}; write it anew, or 'portable'") from error
        self.load_seconds = time.perf_counter() - start
        self.runtime = f"onnxruntime {ort.__version__}"
