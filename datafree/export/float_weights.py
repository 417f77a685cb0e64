"""Weights of float networks: read them without running code, and tell them apart by a hash."""

import hashlib
import pickle
import re
import struct
from argparse import Namespace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from datafree.errors import WeightsError
from datafree.export.checkpoints import LoadedWeights, find_state
from datafree.graph.swap import unwrapped

_TORCH_FILES = (".pt", ".pth", ".ckpt", ".bin", ".tar")
# what torch.load lets through from its own unpickler on files with flipped or missing bytes
_DAMAGE = (
    RuntimeError,
    OSError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    struct.error,
)


def load_weights(model: nn.Module, path: str | Path, weights_key: str | None = None) -> LoadedWeights:
    """Read the state dict in a file into ``model``; what stands around it and before its names is found out, pickled code is never run.

    Args:
        model: the network, which stays as it was where an error is raised.
        path: ``.safetensors``, or a file that torch has written: ``.pt``, ``.pth``, ``.ckpt``, ``.bin``, ``.tar``.
        weights_key: which state dict to take where the file has several, such as ``state_dict_ema``; with dots where dictionaries lie
            in dictionaries, or for names that start alike.

    Returns:
        What was taken and what was left out.

    Raises:
        WeightsError: a file that is missing, damaged or unsafe, that does not fit the network, or fits it in several ways.
    """
    file = Path(path)
    state, loaded = find_state(_read(file), unwrapped(model), file.name, weights_key)
    inner = unwrapped(model)
    inner.load_state_dict({**inner.state_dict(), **state})
    return loaded


def weights_hash(model: nn.Module) -> str:
    """SHA-256, in hexadecimal, over names, dtypes, shapes and bytes of the tensors of the state dict, sorted by name.

    A wrapper such as DataParallel does not count.
    """
    digest = hashlib.sha256()
    for name, value in sorted(unwrapped(model).state_dict().items()):
        if isinstance(value, Tensor):  # a module may have extra state of any type, which is no weight
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(file: Path) -> object:
    if not file.is_file():
        raise WeightsError(f"there is no file {file}: check the path")
    suffix = file.suffix.lower()
    if suffix == ".safetensors":
        try:
            with file.open("rb"):  # by Python, so that a record of the files read has it
                return load_file(file)
        except SafetensorError as error:
            raise WeightsError(f"{file} is no safetensors file, or damaged: {error}") from error
    if suffix not in _TORCH_FILES:
        found = suffix or "a file without ending"
        raise WeightsError(f"{file}: weights are read from .safetensors, {', '.join(_TORCH_FILES[:-1])} or {_TORCH_FILES[-1]}, not {found}")
    return _unpickled(file)


def _unpickled(file: Path) -> object:
    try:
        with torch.serialization.safe_globals([Namespace]):  # arguments of a training program, plain values by name
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        unsafe = re.search(r"unsupported (?:global|class)\W+(?:GLOBAL )?([\w.]*)", str(error), re.IGNORECASE)
        reason = "it is damaged or no torch file"
        if unsafe is not None:
            reason = (
                f"it holds objects other than tensors ({unsafe[1]}), and opening it could run code. In the program that made it, write "
                "torch.save(model.state_dict(), 'weights.pth') and give that file, or use .safetensors"
            )
        raise WeightsError(f"{file} is refused: {reason}") from error
    except _DAMAGE as error:
        told = str(error).splitlines()[0] if str(error) else "it ends early"
        if "TorchScript" in told:
            raise WeightsError(
                f"{file} is a TorchScript archive: save model.state_dict() of the Python network that it was made from"
            ) from error
        raise WeightsError(f"{file} is damaged or no torch file: {told}") from error
