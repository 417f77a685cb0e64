"""The folder of a run, and what stands in it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from datafree.errors import NetworkError, WeightsError
from datafree.task import Task

STUDENT_FILE, PLAN_FILE, RUN_FILE = "student.safetensors", "plan.json", "run.json"
LAYERS_FILE, PICTURES_FILE = "layers.json", "pictures.safetensors"
FRONTIER_FILE, VERIFICATION_FILE = "frontier.json", "verification.json"

Table = Mapping[str, object]


@dataclass(frozen=True)
class Run:
    """A run as its files tell it; what was not written is None.

    Args:
        folder: where they are.
        record: run.json.
        plan: plan.json.
        layers: layers.json, the noise layer by layer.
        verifications: verification.json, what exported files did in their runtimes, by the name of the file, the latest last.
        frontier: frontier.json, points with ``bytes``, ``loss`` and ``bits`` by layer.
    """

    folder: Path
    record: Table
    plan: Table
    layers: Table | None
    verifications: Mapping[str, Table]
    frontier: tuple[Table, ...] | None

    @property
    def verification(self) -> Table | None:
        """What the file did that was verified last."""
        return list(self.verifications.values())[-1] if self.verifications else None

    @property
    def student_hash(self) -> str:
        """SHA-256 of the file of packed weights, in hexadecimal."""
        return hashlib.sha256((self.folder / STUDENT_FILE).read_bytes()).hexdigest()

    @property
    def pictures(self) -> Path | None:
        """The file of the pictures that were kept."""
        file = self.folder / PICTURES_FILE
        return file if file.is_file() else None


def open_folder(folder: str | Path) -> Run:
    """Read the folder of a run. Raises WeightsError where it is none, or one of its files is damaged."""
    place = Path(folder)
    for name in (RUN_FILE, PLAN_FILE, STUDENT_FILE):
        if not (place / name).is_file():
            raise WeightsError(f"{place} holds no {name}: expected a folder that 'datafree quantize' wrote")
    record, plan, layers = (_table(place / name) for name in (RUN_FILE, PLAN_FILE, LAYERS_FILE))
    assert record is not None and plan is not None
    if missing := [key for key in ("method", "target", "weights_hash", "float_bytes", "packed_bytes", "fidelity") if key not in record]:
        raise WeightsError(f"{place / RUN_FILE} says nothing of {missing[0]}: it is damaged or of another version; quantize again")
    return Run(place, record, plan, layers, verifications(place), _points(place / FRONTIER_FILE))


def verifications(folder: Path) -> dict[str, Table]:
    """What exported files did in their runtimes, by the name of the file, the latest last. Raises WeightsError where that is damaged."""
    file = folder / VERIFICATION_FILE
    found = _table(file) or {}
    if not all(isinstance(each, Mapping) and {"kernels", "latency"} <= each.keys() for each in found.values()):
        raise WeightsError(f"{file} is damaged or of another version: remove it, then verify the files again")
    return {name: table(each) for name, each in found.items()}


def read_record(folder: Path) -> Table:
    """run.json of a run. Raises WeightsError where it is missing or damaged."""
    record = _table(folder / RUN_FILE)
    if record is None:
        raise WeightsError(f"{folder} holds no {RUN_FILE}: expected a folder that 'datafree quantize' wrote")
    return record


def task_of(record: Table) -> Task:
    """The task of a run. Raises WeightsError where its record does not hold one."""
    try:
        given = {key: tuple(value) if isinstance(value, list) else value for key, value in table(record["task"]).items()}
        return Task(**given)  # type: ignore[arg-type]
    except (KeyError, TypeError, NetworkError) as error:
        raise WeightsError(
            f"{RUN_FILE} has no task that this version reads ({error!r}): it is damaged or of another version; quantize again"
        ) from error


def table(value: object) -> Table:
    """``value`` of a file, which must be an object. Raises WeightsError."""
    if not isinstance(value, Mapping):
        raise WeightsError(f"a file of the run is damaged: expected an object, found {value!r}; quantize again")
    return value


def number(value: object) -> float:
    """``value`` of a file, which must be a number. Raises WeightsError."""
    if not isinstance(value, int | float):
        raise WeightsError(f"a file of the run is damaged: expected a number, found {value!r}; quantize again")
    return value


def _table(file: Path) -> Table | None:
    value = _read(file)
    if value is not None and not isinstance(value, Mapping):
        raise WeightsError(f"{file} is damaged: it holds a {type(value).__name__}, expected an object; quantize again")
    return value


def _points(file: Path) -> tuple[Table, ...] | None:
    value = _read(file)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(each, Mapping) and {"bytes", "loss", "bits"} <= each.keys() for each in value):
        raise WeightsError(f"{file} is no frontier: expected a list of objects with bytes, loss and bits; search again")
    return tuple(value) or None


def _read(file: Path) -> object:
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{file} is damaged: {error}; quantize again") from error
