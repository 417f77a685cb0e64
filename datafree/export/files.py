"""Files that stand whole or not at all."""

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from datafree.errors import OutputError


def check_folder(file: Path) -> None:
    """Raise OutputError where there is no folder for ``file``."""
    if not file.parent.is_dir():
        raise OutputError(f"there is no folder {file.parent}: make it first")


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """The path of a new file in the same folder, which takes the place of ``path`` where the ``with`` ends without an error.

    So no half-written file ever stands at ``path``. Raises OutputError where the folder is missing or the file cannot be written.
    """
    file = Path(path)
    check_folder(file)
    part = file.with_name(f".{file.name}.{secrets.token_hex(4)}.part")
    try:
        part.touch()
        mode = part.stat().st_mode  # as the user's umask wants it: some writers leave a file that only its owner may read
        yield part
        part.chmod(mode)
        os.replace(part, file)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{file} cannot be written: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: str | Path, data: bytes) -> Path:
    """Write ``data`` to ``path``, whole or not at all. Raises OutputError, see :func:`whole_file`."""
    with whole_file(path) as part:
        part.write_bytes(data)
    return Path(path)


@contextmanager
def whole_files(path: str | Path) -> Iterator[Path]:
    """A folder to write several files in: where that ended without an error they take their places next to ``path``.

    Files that were there come back where one cannot be put in its place.

    Raises OutputError where the folder of ``path`` is missing or the files cannot be put there.
    """
    file = Path(path)
    check_folder(file)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{file.name}.", dir=file.parent) as folder:
            yield Path(folder)
            _move_all(sorted(Path(folder).iterdir()), file.parent)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{file} cannot be written: {error.strerror or error}") from error


def _move_all(parts: list[Path], folder: Path) -> None:
    """All or none; those that were there before wait beside the new ones until all are moved."""
    moved: list[tuple[Path, Path]] = []
    try:
        for part in parts:
            there, before = folder / part.name, part.with_name(f"{part.name}.before")
            if there.exists():
                os.replace(there, before)
            moved.append((there, before))
            os.replace(part, there)
    except OSError:
        for there, before in moved:
            there.unlink(missing_ok=True)
            if before.exists():
                os.replace(before, there)
        raise


def size_of(path: str | Path) -> int:
    """Bytes of an exported file, with those of a second one that holds its weights: of OpenVINO's files, and of ONNX files beyond 2 GiB."""
    file = Path(path)
    weights = file.with_suffix(".bin") if file.suffix == ".xml" else external_data(file)
    there = weights.exists() and (file.suffix == ".xml" or weights.name.encode() in file.read_bytes())
    return file.stat().st_size + (weights.stat().st_size if there else 0)


def external_data(file: Path) -> Path:
    """Where the weights of an ONNX file stand if it does not hold them itself."""
    return file.with_name(f"{file.name}.data")
