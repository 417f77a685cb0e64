"""Unsigned codes of 1 to 8 bits, packed without gaps: bit i of code k is bit k * bits + i of the stream, lowest bit first."""

import numpy as np
import torch
from torch import Tensor

from datafree.errors import NetworkError, WeightsError

BLOCK = 1 << 20  # codes at a time, a multiple of 8: on the way a code takes 8 bytes


def packed_size(n: int, bits: int) -> int:
    """Bytes that ``n`` codes take: ceil(n * bits / 8)."""
    return (n * bits + 7) // 8


def pack(codes: Tensor, bits: int, low: int = 0) -> Tensor:
    """Integer codes ``low`` to ``low`` + 2^bits - 1, of any shape, to a uint8 tensor of :func:`packed_size` bytes.

    Raises NetworkError on codes out of range.
    """
    _check(bits)
    flat = codes.detach().cpu().reshape(-1).numpy()
    packed = np.empty(packed_size(flat.size, bits), dtype=np.uint8)
    for start in range(0, flat.size, BLOCK):
        part = _packed(flat[start : start + BLOCK], bits, low)
        packed[start * bits // 8 :][: part.size] = part
    return torch.from_numpy(packed)


def unpack(data: Tensor, bits: int, n: int) -> Tensor:
    """The ``n`` codes in ``data`` (uint8), as uint8: the inverse of :func:`pack`. Raises WeightsError on a wrong size."""
    _check(bits)
    size = packed_size(n, bits)
    if data.dtype != torch.uint8 or tuple(data.shape) != (size,):
        raise WeightsError(
            f"packed codes are {data.dtype} of shape {tuple(data.shape)}, expected {size} bytes for {n} codes of {bits} bits"
        )
    packed, codes = data.cpu().numpy(), np.empty(n, dtype=np.uint8)
    for start in range(0, n, BLOCK):
        part = codes[start : start + BLOCK]
        part[:] = _unpacked(packed[start * bits // 8 :][: packed_size(part.size, bits)], bits, part.size)
    return torch.from_numpy(codes)


def _packed(codes: np.ndarray, bits: int, low: int) -> np.ndarray:
    """One block: 8 codes make ``bits`` whole bytes, and fit one 64-bit word."""
    if not (codes.min() >= low and codes.max() < low + 2**bits):
        raise NetworkError(f"codes from {codes.min()} to {codes.max()} do not fit {bits} bits: expected {low} to {low + 2**bits - 1}")
    eights = np.zeros((-(-codes.size // 8), 8), dtype="<u8")
    eights.reshape(-1)[: codes.size] = codes.astype(np.int64) - low
    words = np.bitwise_or.reduce(eights << _shifts(bits), axis=1).astype("<u8")
    packed: np.ndarray = words.view(np.uint8).reshape(-1, 8)[:, :bits].reshape(-1)
    return packed[: packed_size(codes.size, bits)]


def _unpacked(data: np.ndarray, bits: int, n: int) -> np.ndarray:
    eights = np.zeros((-(-n // 8), 8), dtype=np.uint8)
    filled = np.zeros(eights.shape[0] * bits, dtype=np.uint8)
    filled[: data.size] = data
    eights[:, :bits] = filled.reshape(-1, bits)
    codes: np.ndarray = ((eights.view("<u8") >> _shifts(bits)) & np.uint64(2**bits - 1)).reshape(-1)[:n]
    return codes


def _shifts(bits: int) -> np.ndarray:
    return np.arange(8, dtype=np.uint64) * np.uint64(bits)


def _check(bits: int) -> None:
    if bits not in range(1, 9):
        raise NetworkError(f"{bits} bits cannot be packed: expected 1 to 8")
