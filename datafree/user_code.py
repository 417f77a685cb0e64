"""Errors raised by code of the user's own: which ones are caught, and how they are reported without a traceback."""

import pickle
import subprocess
import sysconfig
import traceback
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError

USER_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    BufferError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    NameError,
    OSError,
    ReferenceError,
    RuntimeError,
    StopIteration,
    SyntaxError,
    SystemExit,
    TypeError,
    ValueError,
    pickle.PickleError,
    subprocess.SubprocessError,
    zipfile.BadZipFile,
    SafetensorError,
)
_NOT_THE_USERS = tuple(
    [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    + [str(Path(file).parent) for file in (torch.__file__, __file__)]
)


def described_error(error: BaseException) -> str:
    """Kind and message of ``error``, and the last line of the user's own code that it passed through, if any."""
    lines = str(error).strip().splitlines()
    if isinstance(error, SyntaxError):
        lines, place = [error.msg], f" ({error.filename}, line {error.lineno})"
    else:
        place = _place(error)
    return f"{type(error).__name__}{f': {lines[0]}' if lines else ''}{place}"


def _place(error: BaseException) -> str:
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith((*_NOT_THE_USERS, "<")):
            return f" ({frame.filename}, line {frame.lineno}, in {frame.name})"
    return ""
