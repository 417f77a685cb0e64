"""Weights of float networks: read them without running code, and tell them apart by a hash."""

import hashlib
import pickle
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from datafree.errors import WeightsError

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


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Read a state dict from ``.safetensors``, ``.pt`` or ``.pth`` into ``model``.

    A ``{"state_dict": ...}`` around it and a ``module.`` before every name are taken off. Pickled code is never run. Raises
    WeightsError on files that are missing, damaged, unsafe or do not fit; the model is then as before.
    """
    file = Path(path)
    state = _without_prefix(_read(file), "module.")
    own = model.state_dict()
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = sorted(key for key in state if key not in own)
    if missing or unexpected:
        raise WeightsError(f"{file} does not fit the network: missing {named(missing)}; unexpected {named(unexpected)}")
    shapes = [f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}" for key in state if state[key].shape != own[key].shape]
    if shapes:
        raise WeightsError(f"{file} does not fit the network: wrong shapes {named(shapes)}")
    model.load_state_dict({**own, **state})


def weights_hash(model: nn.Module) -> str:
    """SHA-256, in hexadecimal, over names, dtypes, shapes and bytes of the state dict, sorted by name."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def named(keys: Iterable[str]) -> str:
    """The first five of ``keys``, and how many more there are."""
    listed = list(keys)
    more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
    return (", ".join(listed[:5]) or "none") + more


def _read(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise WeightsError(f"there is no file {file}: check the path")
    if file.suffix == ".safetensors":
        try:
            return load(file.read_bytes())  # opened by Python, so that a record of the files read holds it
        except SafetensorError as error:
            raise WeightsError(f"{file} is no safetensors file, or damaged: {error}") from error
    if file.suffix not in (".pt", ".pth"):
        raise WeightsError(f"{file}: weights are read from .safetensors, .pt or .pth, not {file.suffix or 'a file without ending'}")
    return _tensors(_unpickled(file), file)


def _unpickled(file: Path) -> object:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "unsupported global" in str(error).lower():
            reason = "it holds objects other than tensors, and opening it could run code: save model.state_dict(), or use .safetensors"
        else:
            reason = "it is damaged or no torch file"
        raise WeightsError(f"{file} is refused: {reason}") from error
    except _DAMAGE as error:
        raise WeightsError(
            f"{file} is damaged or no torch file: {str(error).splitlines()[0] if str(error) else 'it ends early'}"
        ) from error


def _tensors(data: object, file: Path) -> dict[str, Tensor]:
    if isinstance(data, Mapping) and isinstance(data.get("state_dict"), Mapping):
        data = data["state_dict"]
    if not isinstance(data, Mapping):
        raise WeightsError(f"{file} holds a {type(data).__name__}, expected a state dict")
    state: dict[str, Tensor] = {}
    for key, value in data.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise WeightsError(f"{file} holds a {type(value).__name__} under {key!r}, expected names and tensors: save model.state_dict()")
        state[key] = value
    return state


def _without_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    if not all(key.startswith(prefix) for key in state):
        return state
    return {key.removeprefix(prefix): value for key, value in state.items()}
