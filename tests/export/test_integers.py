"""The integers of a runtime are worth exactly what the student's codes are."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from datafree.export.integers import Array, Integers, integers
from datafree.plan import WEIGHT_BITS, QSpec
from datafree.quant.freeze import Frozen
from datafree.quant.grid import dequantize
from datafree.quant.quantizer import Quantizer

SPECS = [
    QSpec(2, axis=0, grid="ternary"),
    *(QSpec(bits, symmetric, axis=0) for bits in WEIGHT_BITS for symmetric in (True, False)),
    *(QSpec(bits, axis=0, grid="dorefa") for bits in WEIGHT_BITS),
]
ALL_SPECS = st.sampled_from([*SPECS, *(QSpec(each.bits, each.symmetric, None, each.grid) for each in SPECS)])


def frozen(spec: QSpec, seed: int, shape: tuple[int, ...] = (3, 2, 5)) -> Frozen:
    """Random codes, scales and zero points, the ends of the grid among them."""
    generator = torch.Generator().manual_seed(seed)
    low, high = spec.levels
    codes = torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int16)
    codes.view(-1)[:2] = torch.tensor([low, high], dtype=torch.int16)
    sizes = () if spec.axis is None else (shape[spec.axis],)
    quantizer = Quantizer(spec, None if spec.axis is None else shape[spec.axis])
    scale = torch.rand(sizes, generator=generator) + 1e-3
    free = spec.grid == "uniform" and not spec.symmetric
    quantizer.set(scale, torch.randint(low, high + 1, sizes, generator=generator).float() if free else None)
    return Frozen(codes, quantizer.scale, quantizer.zero, spec)


def worth(found: Frozen) -> Array:
    return dequantize(found.codes, found.scale, found.zero, found.spec).numpy()


def check(weight: Integers) -> None:
    """What the docstring of the class promises."""
    half = 2 ** (weight.bits - 1)
    assert weight.codes.dtype == weight.offset.dtype == weight.multiplied().dtype == np.int16 and weight.scale.dtype == np.float32
    assert weight.codes.min() >= -half + weight.symmetric and weight.codes.max() < half
    assert len(weight.scale) == len(weight.offset) == weight.codes.shape[weight.axis]
    assert not weight.symmetric or weight.factor == 1 and not weight.offset.any()


@given(ALL_SPECS, st.integers(0, 999))
def test_values_are_those_of_the_student(spec: QSpec, seed: int) -> None:
    found = frozen(spec, seed)
    for out_axis in (0, 1):
        weight = integers(found, out_axis)
        check(weight)
        assert weight.axis == (out_axis if spec.axis is None else 0)
        assert np.array_equal(weight.values(), worth(found)) and weight.values().dtype == np.float32
        assert np.array_equal(weight.values(), (weight.along(weight.scale) * weight.multiplied()).astype(np.float32))


@given(ALL_SPECS, st.integers(0, 999), st.lists(st.sampled_from([-2.0, -0.5, -1.0, 0.0, 0.25, 1.0, 4.0]), min_size=3, max_size=3))
def test_scaled_is_the_product(spec: QSpec, seed: int, factors: list[float]) -> None:
    weight, factor = integers(frozen(spec, seed), 0), np.array(factors, np.float32)
    found = weight.scaled(factor)
    check(found)
    assert (found.scale >= 0).all() and (found.bits, found.factor, found.axis) == (weight.bits, weight.factor, weight.axis)
    assert np.array_equal(found.values(), weight.values() * weight.along(factor))  # powers of two: exact
    assert not found.multiplied()[factor == 0].any()  # such a channel may take any scale
    assert np.array_equal(weight.scaled(np.float32([-1, -1, -1])).scaled(np.float32([-1, -1, -1])).codes, weight.codes)


@pytest.mark.parametrize("spec", [QSpec(4, axis=1), QSpec(4, False, axis=-1), QSpec(3, axis=2, grid="dorefa")])
@pytest.mark.parametrize("order", [(1, 0, 2), (2, 0, 1), (0, 2, 1)])
def test_transposed(spec: QSpec, order: tuple[int, ...]) -> None:
    weight = integers(frozen(spec, 0), 0)
    found = weight.transposed(order)
    check(found)
    assert np.array_equal(found.values(), weight.values().transpose(order))


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_which_integers_fit_a_byte(bits: int) -> None:
    assert integers(frozen(QSpec(bits, axis=0), 0), 0).fits
    for spec in (QSpec(bits, symmetric=False, axis=0), QSpec(bits, axis=0, grid="dorefa")):
        weight = integers(frozen(spec, 0, (3, 40, 5)), 0)
        assert weight.fits == (bits < 8) == bool(np.abs(weight.multiplied()).max() < 128)


def test_nothing_fits() -> None:
    empty = np.zeros((0, 3), np.int16)
    assert Integers(empty, 4, True, 1, np.zeros(0, np.int16), np.zeros(0, np.float32), 0).fits
