"""Unsigned codes of 1 to 8 bits, packed without gaps: bit i of code k is bit k * bits + i of the stream, lowest bit first."""

import numpy as np
import torch
from torch import Tensor

from datafree.errors import NetworkError, WeightsError


def packed_size(n: int, bits: int) -> int:
    """Bytes that ``n`` codes take: ceil(n * bits / 8)."""
    return (n * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Integer codes 0 to 2^bits - 1, of any shape, to a uint8 tensor of :func:`packed_size` bytes.

    Raises NetworkError on codes out of range.
    """
    _check(bits)
    flat = codes.detach().cpu().reshape(-1).numpy()
    if flat.size and not (flat.min() >= 0 and flat.max() < 2**bits):
        raise NetworkError(f"codes from {flat.min()} to {flat.max()} do not fit {bits} bits: expected 0 to {2**bits - 1}")
    # 8 codes make `bits` whole bytes, and fit one 64-bit word
    eights = np.zeros((-(-flat.size // 8), 8), dtype="<u8")
    eights.reshape(-1)[: flat.size] = flat
    words = np.bitwise_or.reduce(eights << _shifts(bits), axis=1).astype("<u8")
    data = words.view(np.uint8).reshape(-1, 8)[:, :bits].reshape(-1)
    return torch.from_numpy(data[: packed_size(flat.size, bits)].copy())


def unpack(data: Tensor, bits: int, n: int) -> Tensor:
    """The ``n`` codes in ``data`` (uint8), as int16: the inverse of :func:`pack`. Raises WeightsError on a wrong size."""
    _check(bits)
    size = packed_size(n, bits)
    if data.dtype != torch.uint8 or tuple(data.shape) != (size,):
        raise WeightsError(
            f"packed codes are {data.dtype} of shape {tuple(data.shape)}, expected {size} bytes for {n} codes of {bits} bits"
        )
    eights = np.zeros((-(-n // 8), 8), dtype=np.uint8)
    filled = np.zeros(eights.shape[0] * bits, dtype=np.uint8)
    filled[:size] = data.cpu().numpy()
    eights[:, :bits] = filled.reshape(-1, bits)
    codes = (eights.view("<u8") >> _shifts(bits)) & np.uint64(2**bits - 1)
    return torch.from_numpy(codes.reshape(-1)[:n].astype(np.int16))


def _shifts(bits: int) -> np.ndarray:
    return np.arange(8, dtype=np.uint64) * np.uint64(bits)


def _check(bits: int) -> None:
    if bits not in range(1, 9):
        raise NetworkError(f"{bits} bits cannot be packed: expected 1 to 8")
