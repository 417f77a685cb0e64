"""What :func:`datafree.quantize` gives, and the files that it becomes."""

import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from safetensors.torch import save
from torch import Tensor, nn

from datafree.errors import MissingExtraError, OutputError
from datafree.export.files import write_whole
from datafree.export.weights import save_student
from datafree.measure.layers import LayerReport
from datafree.plan import Plan
from datafree.report.runs import LAYERS_FILE, PICTURES_FILE, PLAN_FILE, RUN_FILE, STUDENT_FILE
from datafree.task import Task

if TYPE_CHECKING:
    from datafree.export.runtime import RuntimeName
    from datafree.export.unpack import Packing
    from datafree.measure.verification import Verification

Form = Literal["onnx", "openvino", "safetensors", "program"]

_LEAK = "where they were fitted to the network, they may leak statistics of the data it was trained on: treat them like that data"


@dataclass(frozen=True)
class Result:
    """What :func:`datafree.quantize` gives.

    Args:
        student: the quantized network, an ordinary module in eval mode.
        plan: bits and grids, as read from the student.
        run: the provenance, for :func:`strict_json`: versions, hash of the weights, seed, method and its fields, target and protocol,
            seconds, peak memory of the process, packed bytes, fidelity on noise, notes.
        task: inputs and answer of the student.
        layers: its noise layer by layer, where :func:`datafree.api.with_layers` has measured it.
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
            :func:`datafree.load`); ``program`` (torch.export, float operations).
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
