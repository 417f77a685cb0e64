"""SQuant against loops over single entries, and the bounds on its sums of errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from datafree.closed.squant import squant
from datafree.errors import NetworkError
from datafree.plan import QSpec
from datafree.quant import grid
from datafree.quant.ranges import minmax, mse
from tests.reference import rounding as reference

SPECS = (
    QSpec(4, symmetric=False, axis=0),
    QSpec(2, symmetric=False, axis=0),
    QSpec(3, axis=0),
    QSpec(2, axis=0, grid="ternary"),
    QSpec(3, axis=0, grid="dorefa"),
)
SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 6), st.sampled_from([1, 2, 9]))


def weights(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def steps(weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return weight / scale[:, None, None] + zero[:, None, None]


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 100_000), shape=SHAPES, spec=st.sampled_from(SPECS), stages=st.sampled_from(["ekc", "ek", "ec"]))
def test_equals_loops(seed: int, shape: tuple[int, int, int], spec: QSpec, stages: str) -> None:
    weight = weights(shape, seed)
    scale, zero = minmax(weight, spec)
    expected, _ = reference.squant(weight, scale, zero, spec, stages)
    found = squant(weight, scale, zero, spec, stages)  # type: ignore[arg-type]
    assert found.dtype == torch.int16 and torch.equal(found, expected)


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 100_000), shape=SHAPES, spec=st.sampled_from(SPECS))
def test_codes_stay_on_the_grid_also_where_the_range_clips(seed: int, shape: tuple[int, int, int], spec: QSpec) -> None:
    weight = weights(shape, seed)
    scale, zero = mse(weight, spec)
    codes = squant(0.5 * scale.mean() + weight, scale, zero, spec)
    assert codes.min() >= spec.levels[0] and codes.max() <= spec.levels[1]


@pytest.mark.parametrize("taps", [1, 9])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_sums_of_errors_are_bounded(bits: int, taps: int) -> None:
    spec, weight = QSpec(bits, symmetric=False, axis=0), weights((12, 20, taps), bits)
    scale, zero = minmax(weight, spec)
    t = steps(weight, scale, zero)
    after_k = squant(weight, scale, zero, spec, "ek") - t
    after_c = squant(weight, scale, zero, spec) - t
    assert after_c.abs().max() < 1
    assert after_c.sum((1, 2)).abs().max() <= 0.5 + 1e-3
    if taps > 1:
        assert after_k.sum(2).abs().max() <= 0.5 + 1e-3
        assert after_c.sum(2).abs().max() <= 1 + 1e-3
        assert after_k.sum((1, 2)).abs().max() > 0.5  # so C had something to do
        _, sums = reference.squant(weight, scale, zero, spec)
        assert torch.allclose(after_k.sum(2), torch.tensor(sums), atol=1e-3)


def test_kernels_are_skipped_at_one_tap_and_all_entries_serve_the_channel() -> None:
    spec, weight = QSpec(4, symmetric=False, axis=0), weights((5, 30, 1), 3)
    scale, zero = minmax(weight, spec)
    nearest = grid.quantize(weight, scale, zero, spec)
    assert torch.equal(squant(weight, scale, zero, spec, "ek"), nearest)
    found = squant(weight, scale, zero, spec)
    assert torch.equal(found, squant(weight.transpose(1, 2), scale, zero, spec, "ek").transpose(1, 2))  # one kernel of 30 taps
    assert not torch.equal(found, nearest)


def test_a_depthwise_layer_needs_no_channel_stage() -> None:
    spec, weight = QSpec(4, symmetric=False, axis=0), weights((40, 1, 9), 4)
    scale, zero = minmax(weight, spec)
    kernels = squant(weight, scale, zero, spec, "ek")
    assert torch.equal(squant(weight, scale, zero, spec), kernels)
    assert not torch.equal(kernels, grid.quantize(weight, scale, zero, spec))


def test_rows_without_a_sum_of_errors_do_not_change() -> None:
    spec = QSpec(4, axis=0)
    row = torch.tensor([0.25, -0.25, 0.5, -0.5, 3.0, 0.0, 0.375, -0.375, -2.0])  # exact in float
    codes = squant(row.view(1, 1, 9), torch.ones(1), torch.zeros(1), spec)
    assert codes.flatten().tolist() == [0, 0, 0, 0, 3, 0, 0, 0, -2]
    assert squant(torch.zeros(2, 3, 9), torch.ones(2), torch.zeros(2), spec).abs().max() == 0


def test_the_worked_example() -> None:
    spec, one, none = QSpec(4, axis=0), torch.ones(1), torch.zeros(1)
    kernels = torch.tensor([[[0.4, 0.3, 0.2], [0.4, 0.35, 0.0]]])  # e = -t: sums -0.9 and -0.75
    # K flips 0.4 in both, sums 0.1 and 0.25; C has a sum of 0.35 and leaves them
    assert squant(kernels, one, none, spec).flatten().tolist() == [1, 0, 0, 1, 0, 0]
    kernels = torch.tensor([[[0.4, 0.0], [0.35, 0.0], [0.2, 0.0]]])  # K flips none, C has -0.95: the first of the next in the queue
    assert squant(kernels, one, none, spec, "ek").flatten().tolist() == [0, 0, 0, 0, 0, 0]
    assert squant(kernels, one, none, spec).flatten().tolist() == [1, 0, 0, 0, 0, 0]
    kernels = torch.tensor([[[0.4, 0.2], [0.3, 0.25]]])  # K overshoots twice, sums 0.4 and 0.45; C has 0.85: 0.3 goes back
    assert squant(kernels, one, none, spec, "ek").flatten().tolist() == [1, 0, 1, 0]
    assert squant(kernels, one, none, spec).flatten().tolist() == [1, 0, 0, 0]


def test_too_few_candidates_at_the_end_of_the_grid() -> None:
    spec = QSpec(2, axis=0)  # -1, 0, 1
    kernel = torch.tensor([[[1.4, 1.45, 1.3, 1.4, 1.2, 0.4, 0.0, 0.0, 0.0]]])  # a sum of -2.15, but one entry may go up
    assert squant(kernel, torch.ones(1), torch.zeros(1), spec).flatten().tolist() == [1, 1, 1, 1, 1, 1, 0, 0, 0]
    assert squant(-kernel, torch.ones(1), torch.zeros(1), spec).flatten().tolist() == [-1, -1, -1, -1, -1, -1, 0, 0, 0]


def test_shapes_are_checked() -> None:
    with pytest.raises(NetworkError, match=r"weight \(2, 3\), scale \(2,\) and zero \(2,\) do not fit"):
        squant(torch.zeros(2, 3), torch.ones(2), torch.zeros(2), QSpec(4))
    with pytest.raises(NetworkError, match=r"expected \(out, in / groups, taps\)"):
        squant(torch.zeros(2, 3, 1), torch.ones(3), torch.zeros(3), QSpec(4))


def test_the_mean_of_an_output_moves_less_than_with_nearest() -> None:
    spec, weight = QSpec(3, symmetric=False, axis=0), weights((64, 32, 9), 9)
    scale, zero = minmax(weight, spec)
    shifts = [
        (grid.dequantize(codes, scale, zero, spec) - weight).sum((1, 2)).square().mean()
        for codes in (grid.quantize(weight, scale, zero, spec), squant(weight, scale, zero, spec))
    ]
    assert shifts[1] < 0.01 * shifts[0]
