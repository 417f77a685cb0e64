"""Files that stand whole or not at all."""

import os
import secrets
from pathlib import Path

from datafree.errors import OutputError


def write_whole(path: str | Path, data: bytes) -> Path:
    """Write ``data`` under another name in the same folder first, so that no half-written file ever stands at ``path``.

    Raises OutputError where the folder is missing or the file cannot be written.
    """
    file = Path(path)
    if not file.parent.is_dir():
        raise OutputError(f"there is no folder {file.parent}: make it first")
    part = file.with_name(f".{file.name}.{secrets.token_hex(4)}.part")
    try:
        part.write_bytes(data)
        os.replace(part, file)
    except OSError as error:
        raise OutputError(f"{file} cannot be written: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)
    return file
