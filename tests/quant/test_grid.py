"""The quantizer's own laws: exact agreement of its three functions, idempotence, half a step, exact zero, straight-through."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from datafree.plan import QSpec
from datafree.quant.grid import broadcast, dequantize, fake_quantize, has_zero_points, quantize
from tests.reference import quantizers as reference

SPECS = [
    QSpec(bits, symmetric, axis, grid)
    for grid in ("uniform", "ternary", "dorefa")
    for bits in ((2,) if grid == "ternary" else range(2, 9))
    for symmetric in ((True, False) if grid == "uniform" else (True,))
    for axis in (None, 0, 1, -1)
]
SCALES = st.floats(min_value=2.0**-124, max_value=2.0**100, width=32)
STEPS = st.lists(st.floats(min_value=-400, max_value=400, width=32), min_size=12, max_size=12)


def bits_of(x: Tensor) -> np.ndarray:
    """The raw bits, so that 0 and -0 differ."""
    return x.detach().numpy().view(np.int32)


def zeros_for(spec: QSpec, wish: int, size: int) -> Tensor:
    low, high = spec.levels
    value = high / 2 if spec.grid == "dorefa" else low + wish % (high - low + 1) if has_zero_points(spec) else 0.0
    return torch.full((size,), float(value))


def case(spec: QSpec, scale: float, wish: int, steps: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """x of shape (3, 4), with scales that differ by channel where there are channels."""
    size = {None: 1, 0: 3, 1: 4, -1: 4}[spec.axis]
    scales = torch.tensor([scale * (1 + k / 7) for k in range(size)], dtype=torch.float32)
    zeros = zeros_for(spec, wish, size)
    if spec.axis is None:
        scales, zeros = scales[0], zeros[0]
    x = torch.tensor(steps, dtype=torch.float32).reshape(3, 4)
    return x * broadcast(scales, spec, x), scales, zeros


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(SPECS), SCALES, st.integers(0, 255), STEPS)
def test_laws(spec: QSpec, scale: float, wish: int, steps: list[float]) -> None:
    x, scales, zeros = case(spec, scale, wish, steps)
    codes = quantize(x, scales, zeros, spec)
    once = fake_quantize(x, scales, zeros, spec)
    assert codes.dtype == torch.int16 and codes.min() >= spec.levels[0] and codes.max() <= spec.levels[1]
    assert np.array_equal(bits_of(once), bits_of(dequantize(codes, scales, zeros, spec)))
    assert np.array_equal(bits_of(once), bits_of(fake_quantize(once, scales, zeros, spec)))
    assert torch.equal(quantize(once, scales, zeros, spec), codes)
    tracked = fake_quantize(x.clone().requires_grad_(), scales, zeros, spec)
    assert np.array_equal(bits_of(once), bits_of(tracked))
    # float32 places a tie to a few parts in 10^5 of a step, so "half a step" is meant to that
    wide = broadcast(scales, spec, x).double()
    shift = broadcast(zeros, spec, x).double()
    inside = (x >= wide * (spec.levels[0] - shift)) & (x <= wide * (spec.levels[1] - shift))
    assert ((x.double() - once).abs() <= 0.50002 * wide + 3e-7 * x.abs())[inside].all()


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.grid != "dorefa"], ids=str)
def test_zero_is_exact(spec: QSpec) -> None:
    for wish in (0, 1, 77, 255):
        x, scales, zeros = case(spec, 0.1, wish, [0.0] * 12)
        assert not bits_of(fake_quantize(x, scales, zeros, spec)).any()
        assert not bits_of(fake_quantize(x - 1e-4, scales, zeros, spec)).any()


@pytest.mark.parametrize("bits", range(2, 9))
def test_dorefa_is_the_published_formula(bits: int) -> None:
    spec = QSpec(bits, grid="dorefa")
    x = torch.randn(500, generator=torch.Generator().manual_seed(bits))
    largest = x.abs().max().item()
    scale, zero = torch.tensor(2 * largest / (2**bits - 1)), torch.tensor((2**bits - 1) / 2)
    found = fake_quantize(x, scale, zero, spec)
    expected = torch.tensor([reference.dorefa(each, largest, bits) for each in x.tolist()])
    assert torch.allclose(found, expected, atol=1e-6)
    levels = dequantize(torch.arange(2**bits), scale, zero, spec)
    assert len(set(levels.tolist())) == 2**bits and (levels != 0).all() and torch.equal(levels, -levels.flip(0))


def test_dorefa_rounds_after_the_shift() -> None:
    """Between two levels, and at 0, the even code wins: rounding before adding 1.5 would give no integer at all."""
    spec = QSpec(2, grid="dorefa")
    x = torch.tensor([-1.0, 0.0, 1.0, 0.999, -0.001])
    assert quantize(x, torch.tensor(1.0), torch.tensor(1.5), spec).tolist() == [0, 2, 2, 2, 1]


def test_ties_go_to_the_even_step_whatever_the_zero_point() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    spec = QSpec(4, symmetric=False)
    assert quantize(x, torch.tensor(1.0), torch.tensor(3.0), spec).tolist() == [3, 5, 5, 3, 1]


@pytest.mark.parametrize("spec", SPECS[::3], ids=str)
def test_equals_the_loop(spec: QSpec) -> None:
    x, scales, zeros = case(spec, 0.37, 5, torch.linspace(-19.7, 20.6, 12).tolist())
    rows = broadcast(scales, spec, x).expand_as(x).flatten().tolist()
    shift = broadcast(zeros, spec, x).expand_as(x).flatten().tolist()
    expected = [reference.code(v, s, z, spec) for v, s, z in zip(x.flatten().tolist(), rows, shift, strict=True)]
    assert quantize(x, scales, zeros, spec).flatten().tolist() == expected


def test_gradient_stops_where_codes_are_clipped() -> None:
    spec, scale, zero = QSpec(3), torch.tensor(0.5), torch.tensor(0.0)
    x = torch.tensor([-9.0, -1.6, -0.2, 0.0, 1.5, 1.74, 1.76, 9.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(fake_quantize(x, scale, zero, spec), x, torch.arange(1.0, 9.0))
    assert gradient.tolist() == [0, 2, 3, 4, 5, 6, 0, 0]


def test_infinity_is_clipped_and_sends_no_gradient() -> None:
    x = torch.tensor([float("inf"), -float("inf"), 1.0], requires_grad=True)
    y = fake_quantize(x, torch.tensor(1.0), torch.tensor(0.0), QSpec(4))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert y.tolist() == [7, -7, 1] and gradient.tolist() == [0, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_float_types_come_back_as_they_were(dtype: torch.dtype) -> None:
    x = torch.linspace(-1, 1, 33, dtype=dtype)
    scale, zero = torch.tensor(1 / 127), torch.tensor(0.0)
    y = fake_quantize(x, scale, zero, QSpec(8))
    assert y.dtype == dtype
    assert torch.equal(y, dequantize(quantize(x, scale, zero, QSpec(8)), scale, zero, QSpec(8)).to(dtype))
    assert torch.equal(fake_quantize(y, scale, zero, QSpec(8)), y)


def test_broadcast_shapes() -> None:
    like = torch.zeros(2, 3, 4)
    assert broadcast(torch.ones(3), QSpec(4, axis=1), like).shape == (1, 3, 1)
    assert broadcast(torch.ones(4), QSpec(4, axis=-1), like).shape == (1, 1, 4)
    assert broadcast(torch.tensor(1.0), QSpec(4), like).shape == ()
