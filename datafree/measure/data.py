"""Labelled pictures for measuring, and for nothing else: no method ever sees them."""

import csv
import io
import posixpath
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datafree.errors import DataError
from datafree.task import Task

PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
KINDS = (
    "an .npz with x_test and y_test, a folder with one folder of pictures for each class, "
    "or a folder or .zip with pictures and labels.csv (columns file,label)"
)


@dataclass(frozen=True)
class Labelled:
    """Labelled inputs, read batch by batch: iterate to get pairs (inputs (b, *shape), labels (b,)).

    Args:
        labels: all of them, int64, (n,).
        read: gives the normalised float inputs that stand at the given indexes.
        batch: how many are read at once.
        source: where they come from, for messages and reports.
    """

    labels: Tensor
    read: Callable[[Tensor], Tensor]
    batch: int
    source: str

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for indexes in torch.split(torch.arange(len(self)), self.batch):
            yield self.read(indexes), self.labels[indexes]

    def take(self, indexes: Tensor) -> "Labelled":
        """Only the inputs at ``indexes``, in that order."""
        return replace(self, labels=self.labels[indexes], read=lambda chosen: self.read(indexes[chosen]))


Data: TypeAlias = Labelled | str | Path | tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]]
"""Opened data, the path of some, two tensors (normalised inputs, labels), or an iterable of such batches."""


def batches_of(data: Data, task: Task) -> Iterable[tuple[Tensor, Tensor]]:
    """Any form of labelled data as batches. Raises DataError where a path cannot be opened or two tensors do not fit each other."""
    if isinstance(data, (str, Path)):
        return open_data(data, task)
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor) and isinstance(data[1], Tensor):
        inputs, labels = data
        if labels.shape != inputs.shape[:1]:
            raise DataError(f"labels have the shape {tuple(labels.shape)} for inputs {tuple(inputs.shape)}: expected one label each")
        return Labelled(labels, lambda indexes: inputs[indexes], inputs_per_batch(inputs.shape[1:]), "tensors")
    return data


def open_data(path: str | Path, task: Task) -> Labelled:
    """Open labelled pictures; each is decoded only when its batch is asked for.

    Kinds: an ``.npz`` of uint8 ``x_test`` (n, height, width, channels), (n, height, width) or (n, channels, height, width)
    and ``y_test`` (n,); a folder (or zip) with one folder of pictures for each class, numbered in the sorted order of their names or
    by ``task.classes`` where that holds names; a folder or zip with ``labels.csv``. Pictures of the last two are resized
    (bilinear, short side to ``task.resize``), and their centre is cropped to ``task.shape``.

    Raises:
        DataError: whatever is missing, unreadable or does not fit the task.
    """
    found = find_data(path, task)
    return _arrays(found, task) if found.suffix.lower() == ".npz" else _pictures(found, task)


def find_data(path: str | Path, task: Task) -> Path:
    """Where labelled data is, without opening it. Raises DataError where there is none of a known kind, or the task takes no pictures."""
    found = Path(path).expanduser()
    if len(task.shape) != 3:
        raise DataError(f"pictures have a shape (channels, height, width), but the task's is {task.shape}: give tensors instead")
    if not found.exists():
        raise DataError(f"{found} does not exist: expected {KINDS}")
    if found.suffix.lower() not in (".npz", ".zip") and not found.is_dir():
        raise DataError(f"{found} is no known kind of labelled data: expected {KINDS}")
    return found


def inputs_per_batch(shape: Sequence[int]) -> int:
    """How many inputs of ``shape`` are run at once: 256, fewer where they are large."""
    return max(1, min(256, 2**20 // int(np.prod(shape))))


def _arrays(path: Path, task: Task) -> Labelled:
    try:
        with path.open("rb") as file:  # np.load leaves it open where it fails
            arrays = np.load(file, allow_pickle=False)
            if isinstance(arrays, np.ndarray):
                raise DataError(f"{path} holds one array without a name: expected an .npz with x_test and y_test")
            missing = [name for name in ("x_test", "y_test") if name not in arrays.files]
            if missing:
                raise DataError(f"{path} has no array {missing[0]}, only {', '.join(arrays.files) or 'none'}: expected x_test and y_test")
            inputs, labels = arrays["x_test"], arrays["y_test"]
    except DataError:  # a ValueError too
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} cannot be read as .npz: {error}") from error
    if inputs.dtype != np.uint8:
        raise DataError(f"{path}: x_test holds {inputs.dtype}, expected uint8 pixels 0..255; give tensors for other inputs")
    if labels.shape != inputs.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{path}: y_test is {labels.dtype} {labels.shape} for pictures {inputs.shape}: expected one whole number each")
    pixels = _channels_first(torch.from_numpy(inputs), task, path)
    numbers = torch.from_numpy(labels.astype(np.int64))
    count = _count(task)
    wrong = numbers[(numbers < 0) | (numbers >= count)] if count else numbers[numbers < 0]
    if len(wrong):
        raise DataError(f"{path}: y_test holds the label {int(wrong[0])}, expected {_range(count)}")
    return _labelled(numbers, lambda indexes: task.normalise(pixels[indexes].float() / 255), task, path)


def _channels_first(pixels: Tensor, task: Task, path: Path) -> Tensor:
    channels, height, width = task.shape
    found = tuple(pixels.shape[1:])
    if found == (height, width, channels):
        return pixels.permute(0, 3, 1, 2)
    if found == task.shape:
        return pixels
    if found == (height, width) and channels == 1:
        return pixels.unsqueeze(1)
    expected = f"(n, {height}, {width}, {channels}) or (n, {channels}, {height}, {width})"
    raise DataError(f"{path}: x_test has the shape {tuple(pixels.shape)}, but the network takes {task.shape}: expected {expected}")


@dataclass(frozen=True)
class _Files:
    """A folder or a zip: relative names with slashes, and how to read some of them."""

    names: tuple[str, ...]
    read: Callable[[Sequence[str]], list[bytes]]


def _files(path: Path) -> _Files:
    if path.is_dir():
        names = (file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
        return _Files(tuple(sorted(names)), lambda chosen: [_bytes(path / name) for name in chosen])

    def read(chosen: Sequence[str]) -> list[bytes]:
        try:
            with zipfile.ZipFile(path) as archive:
                return [archive.read(name) for name in chosen]
        except (OSError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:  # RuntimeError: encrypted, or packed in an unknown way
            raise DataError(f"{path} cannot be read: {error}") from error

    try:
        with zipfile.ZipFile(path) as archive:
            return _Files(tuple(sorted(entry.filename for entry in archive.infolist() if not entry.is_dir())), read)
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is not a readable .zip: {error}") from error


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _pictures(path: Path, task: Task) -> Labelled:
    channels, height, width = task.shape
    if channels not in (1, 3):
        raise DataError(f"pictures have 1 or 3 channels, but the task's shape is {task.shape}: give an .npz or tensors")
    files = _files(path)
    pairs = _listed_labels(files, path, task) if "labels.csv" in files.names else _folder_labels(files, path, task)
    names = [name for name, _ in pairs]

    def read(indexes: Tensor) -> Tensor:
        chosen = [names[index] for index in indexes.tolist()]
        pictures = [_decode(data, f"{path}/{name}", task) for name, data in zip(chosen, files.read(chosen), strict=True)]
        return task.normalise(torch.stack(pictures).float() / 255)

    return _labelled(torch.tensor([label for _, label in pairs]), read, task, path)


def _labelled(labels: Tensor, read: Callable[[Tensor], Tensor], task: Task, path: Path) -> Labelled:
    if not len(labels):
        raise DataError(f"{path} holds no labelled pictures: expected {KINDS}")
    return Labelled(labels, read, inputs_per_batch(task.shape), str(path))


def _listed_labels(files: _Files, path: Path, task: Task) -> list[tuple[str, int]]:
    """Read labels.csv: the name of each picture and its label."""
    where = f"{path}/labels.csv"
    try:
        rows = csv.DictReader(io.StringIO(files.read(["labels.csv"])[0].decode("utf-8-sig"), newline=""), strict=True)
        table = list(rows)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{where} is not a comma-separated table in UTF-8: {error}") from error
    missing = [name for name in ("file", "label") if name not in (rows.fieldnames or ())]
    if missing:
        found = ", ".join(rows.fieldnames or ()) or "nothing"
        raise DataError(f"{where} has no column {missing[0]!r}: its first line holds {found}, expected file,label")
    present = set(files.names)
    pairs = []
    for number, row in enumerate(table, start=2):
        name = posixpath.normpath((row["file"] or "").strip().replace("\\", "/"))
        if name not in present:
            raise DataError(f"{where}, line {number}: no file {row['file']!r} in {path}")
        pairs.append((name, _label((row["label"] or "").strip(), f"{where}, line {number}", task)))
    return pairs


def _label(text: str, where: str, task: Task) -> int:
    count = _count(task)
    if isinstance(task.classes, tuple) and text in task.classes:
        return task.classes.index(text)
    try:
        label = int(text)
    except ValueError as error:
        raise DataError(f"{where}: label {text!r} is not a number, expected {_range(count)}") from error
    if label < 0 or (count and label >= count):
        raise DataError(f"{where}: label {label} is out of range, expected {_range(count)}")
    return label


def _folder_labels(files: _Files, path: Path, task: Task) -> list[tuple[str, int]]:
    """One folder for each class: the name of each picture and the number of its folder."""
    for name in files.names:
        if name.endswith("/labels.csv"):
            raise DataError(f"{path} holds labels.csv in a folder ({name}): expected it at the top, next to the folder of the pictures")
    shown = [name for name in files.names if not name.startswith((".", "__MACOSX")) and "/." not in name]
    found = [name for name in shown if "/" in name and name.lower().endswith(PICTURES)]
    folders = sorted({name.split("/")[0] for name in found})
    if isinstance(task.classes, tuple):
        for folder in folders:
            if folder not in task.classes:
                close = get_close_matches(folder, task.classes) or task.classes[:10]
                raise DataError(f"{path}: the folder {folder!r} is no class of the network; nearest names: {', '.join(close)}")
        numbers = {folder: task.classes.index(folder) for folder in folders}
    elif folders and task.classes is not None and len(folders) != task.classes:
        raise DataError(
            f"{path} has {len(folders)} class folders, the network {task.classes} classes without names, so their numbers cannot be told: "
            "write a labels.csv (columns file,label) into it"
        )
    else:
        numbers = {folder: number for number, folder in enumerate(folders)}
    return [(name, numbers[name.split("/")[0]]) for name in found]


def _decode(data: bytes, name: str, task: Task) -> Tensor:
    """One picture as uint8 (channels, height, width): short side resized, centre cropped."""
    channels, height, width = task.shape
    try:
        with Image.open(io.BytesIO(data)) as picture:
            if picture.mode[0] in "IF":
                raise DataError(f"{name} holds more than 8 bits a pixel (mode {picture.mode}): expected an 8-bit picture")
            full = picture.convert("RGB" if channels == 3 else "L")
    except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:  # Pillow's words for a broken file
        raise DataError(f"{name} cannot be read as a picture: {error}") from error
    if task.resize is not None:
        up, down = task.resize, min(full.size)
    else:  # the side that is scarcer decides, so that the crop is filled
        up, down = (height, full.height) if full.width * height >= full.height * width else (width, full.width)
    wide, high = full.width * up // down, full.height * up // down
    if wide < width or high < height:
        raise DataError(f"{name} is {wide} x {high} pixels after resizing, too small for the crop {width} x {height}: give a larger resize")
    left, top = round((wide - width) / 2), round((high - height) / 2)
    crop = full.resize((wide, high), Image.Resampling.BILINEAR).crop((left, top, left + width, top + height))
    return torch.from_numpy(np.array(crop)).reshape(height, width, channels).permute(2, 0, 1)


def _count(task: Task) -> int | None:
    return len(task.classes) if isinstance(task.classes, tuple) else task.classes


def _range(count: int | None) -> str:
    return f"0..{count - 1}" if count else "a whole number from 0"
