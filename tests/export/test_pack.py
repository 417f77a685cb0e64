"""Packing is exact, gapless and little-endian."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from datafree.errors import NetworkError, WeightsError
from datafree.export import pack as packing
from datafree.export.pack import pack, packed_size, unpack
from tests.reference import quantizers as reference

WIDTHS = st.integers(1, 8)


@given(WIDTHS.flatmap(lambda bits: st.tuples(st.just(bits), st.lists(st.integers(0, 2**bits - 1), max_size=70))))
def test_pack_and_unpack_are_inverse(case: tuple[int, list[int]]) -> None:
    bits, codes = case
    data = pack(torch.tensor(codes, dtype=torch.int16), bits)
    assert data.dtype == torch.uint8 and data.shape == (packed_size(len(codes), bits),) == (-(-len(codes) * bits // 8),)
    assert bytes(data.tolist()) == reference.pack(codes, bits)
    back = unpack(data, bits, len(codes))
    assert back.dtype == torch.uint8 and back.tolist() == codes


def test_bit_order() -> None:
    assert pack(torch.tensor([1, 0, 0, 0, 0, 0, 0, 0, 1]), 1).tolist() == [1, 1]
    assert pack(torch.tensor([1, 2, 3, 0]), 2).tolist() == [0b00111001]
    assert pack(torch.tensor([7, 0, 1]), 3).tolist() == [0b01000111, 0]


def test_any_shape_and_type_and_the_largest_codes() -> None:
    codes = torch.randint(0, 256, (7, 5, 3), generator=torch.Generator().manual_seed(0))
    for bits in range(1, 9):
        part = codes % 2**bits
        part[0] = 2**bits - 1
        for dtype in (torch.int16, torch.int64, torch.uint8):
            assert torch.equal(unpack(pack(part.to(dtype), bits), bits, 105).reshape(7, 5, 3), part.to(torch.uint8))
    assert torch.equal(pack(codes, 8), codes.flatten().to(torch.uint8))
    assert torch.equal(pack(codes.transpose(0, 2), 8), codes.transpose(0, 2).flatten().to(torch.uint8))


@pytest.mark.parametrize("code", [-1, 8, 300])
def test_codes_out_of_range(code: int) -> None:
    with pytest.raises(NetworkError, match="do not fit 3 bits: expected 0 to 7"):
        pack(torch.tensor([0, code]), 3)


def test_other_refusals() -> None:
    with pytest.raises(NetworkError, match="9 bits cannot be packed"):
        pack(torch.tensor([0]), 9)
    with pytest.raises(NetworkError, match="0 bits cannot be packed"):
        unpack(torch.zeros(0, dtype=torch.uint8), 0, 0)
    for data in (torch.zeros(3, dtype=torch.uint8), torch.zeros(2, dtype=torch.int16), torch.zeros(2, 1, dtype=torch.uint8)):
        with pytest.raises(WeightsError, match="expected 2 bytes for 4 codes of 3 bits"):
            unpack(data, 3, 4)


@pytest.mark.parametrize("bits", [3, 8])
def test_no_more_than_a_block_is_widened_at_once(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing and unpacking take 8 bytes a code on the way, which a large network has no room for."""
    sizes: list[int] = []
    for name in ("_packed", "_unpacked"):
        monkeypatch.setattr(packing, name, spied(getattr(packing, name), sizes))
    monkeypatch.setattr(packing, "BLOCK", 64)
    codes = torch.randint(0, 2**bits, (1000,), generator=torch.Generator().manual_seed(0))
    data = pack(codes, bits)
    assert torch.equal(unpack(data, bits, 1000).long(), codes) and bytes(data.tolist()) == reference.pack(codes.tolist(), bits)
    assert max(sizes) <= 64 and len(sizes) == 2 * 16


def spied(function: Callable[..., np.ndarray], sizes: list[int]) -> Callable[..., np.ndarray]:
    def call(data: np.ndarray, *rest: int) -> np.ndarray:
        sizes.append(data.size)
        return function(data, *rest)

    return call


def test_codes_that_start_below_zero() -> None:
    codes = torch.arange(-8, 8, dtype=torch.int16)
    assert unpack(pack(codes, 4, -8), 4, 16).tolist() == list(range(16))
    with pytest.raises(NetworkError, match="codes from -8 to 8 do not fit 4 bits: expected -8 to 7"):
        pack(torch.tensor([-8, 8]), 4, -8)
