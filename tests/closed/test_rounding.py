"""Rounding with error feedback: equal to GPTQ, better than nearest, exact at the edges, quick."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from datafree.closed.rounding import error_feedback, moment_hessian, shrink
from datafree.errors import NetworkError
from datafree.plan import QSpec
from datafree.quant.grid import dequantize, quantize
from datafree.quant.ranges import minmax, mse
from tests.reference import moments as reference_moments
from tests.reference import rounding as reference

SPECS = {
    "symmetric": QSpec(4, axis=0),
    "asymmetric": QSpec(3, symmetric=False, axis=0),
    "dorefa": QSpec(3, axis=0, grid="dorefa"),
    "ternary": QSpec(2, axis=0, grid="ternary"),
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def wishart(n: int, generator: torch.Generator, groups: int = 1) -> Tensor:
    """Second moments of correlated inputs with unequal spreads, (groups, n, n)."""
    mixing = torch.randn(groups, n, n, generator=generator) * (0.3 + torch.rand(groups, n, 1, generator=generator))
    x = torch.randn(groups, 3 * n, n, generator=generator) @ mixing
    return x.transpose(1, 2) @ x / x.shape[1]


def energy(error: Tensor, hessian: Tensor) -> float:
    return float(torch.einsum("gon,gnm,gom->", error.double(), hessian.double(), error.double()))


def error_of(weight: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return weight - scale[..., None] * (codes - zero[..., None])


def ranged(weight: Tensor, spec: QSpec) -> tuple[Tensor, Tensor]:
    """A scale and a zero for each row of (groups, out, n)."""
    scale, zero = mse(weight.flatten(0, 1), spec)
    return scale.view(weight.shape[:2]), zero.view(weight.shape[:2])


def to_nearest(weight: Tensor, scale: Tensor, zero: Tensor, spec: QSpec) -> Tensor:
    return quantize(weight.flatten(0, 1), scale.flatten(), zero.flatten(), spec).view(weight.shape)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_equals_gptq_in_loops(spec: QSpec) -> None:
    generator = seeded(1)
    weight, hessian = torch.randn(3, 4, 17, generator=generator), wishart(17, generator, 3)
    scale, zero = ranged(weight, spec)
    codes = error_feedback(weight, hessian, scale, spec, zero, damping=0.02)
    for g in range(3):
        expected = reference.gptq(
            weight[g], reference.damped_inverse(hessian[g], 0.02), reference.falling(hessian[g]), scale[g], zero[g], spec
        )
        assert torch.equal(codes[g], expected)
    assert not torch.equal(codes, to_nearest(weight, scale, zero, spec))


def test_blocks_change_nothing() -> None:
    generator = seeded(2)
    spec, n = QSpec(4, axis=0), 280  # three blocks of columns
    weight, hessian = torch.randn(1, 2, n, generator=generator), wishart(n, generator)[0]
    scale, zero = ranged(weight, spec)
    expected = reference.gptq(weight[0], reference.damped_inverse(hessian, 0.01), reference.falling(hessian), scale[0], zero[0], spec)
    codes = error_feedback(weight, hessian, scale, spec)[0]
    # in float32 a tie may fall to the other side, and the columns after it follow
    assert (codes == expected).float().mean() > 0.9
    found, wanted = (energy(error_of(weight, each[None], scale, zero), hessian[None]) for each in (codes, expected))
    assert found == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_independent_inputs_round_to_nearest(spec: QSpec) -> None:
    generator = seeded(3)
    weight = torch.randn(2, 5, 11, generator=generator)
    scale, zero = ranged(weight, spec)
    diagonal = torch.rand(2, 11, generator=generator)
    expected = to_nearest(weight, scale, zero, spec)
    for hessian in (torch.eye(11).expand(2, 11, 11), torch.diag_embed(diagonal), torch.zeros(2, 11, 11)):
        assert torch.equal(error_feedback(weight, hessian, scale, spec, zero), expected)
    assert codes_on_grid(expected, spec)


def codes_on_grid(codes: Tensor, spec: QSpec) -> bool:
    return codes.dtype == torch.int16 and int(codes.min()) >= spec.levels[0] and int(codes.max()) <= spec.levels[1]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 12)),
    kind=st.sampled_from(list(SPECS)),
)
def test_codes_are_on_the_grid_and_values_fixed_points(seed: int, shape: tuple[int, int, int], kind: str) -> None:
    generator, spec = seeded(seed), SPECS[kind]
    weight, hessian = torch.randn(shape, generator=generator), wishart(shape[2], generator, shape[0])
    scale, zero = ranged(weight, spec)
    codes = error_feedback(weight, hessian, scale, spec, zero)
    assert codes.shape == weight.shape and codes_on_grid(codes, spec)
    values = dequantize(codes.flatten(0, 1), scale.flatten(), zero.flatten(), spec).view(shape)
    assert torch.equal(error_feedback(values, hessian, scale, spec, zero), codes)  # nothing to lose: the permutation is undone


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_order_of_columns_does_not_matter(spec: QSpec) -> None:
    generator = seeded(4)
    weight, hessian = torch.randn(2, 3, 13, generator=generator), wishart(13, generator, 2)
    scale, zero = ranged(weight, spec)
    moved = torch.randperm(13, generator=generator)
    codes = error_feedback(weight, hessian, scale, spec, zero)
    assert torch.equal(error_feedback(weight[:, :, moved], hessian[:, moved][:, :, moved], scale, spec, zero), codes[:, :, moved])


def test_groups_do_not_see_each_other() -> None:
    generator = seeded(5)
    spec = QSpec(3, axis=0)
    weight, hessian = torch.randn(4, 3, 9, generator=generator), wishart(9, generator, 4)
    scale, _ = ranged(weight, spec)
    together = error_feedback(weight, hessian, scale, spec)
    for g in range(4):
        assert torch.equal(error_feedback(weight[g : g + 1], hessian[g], scale[g : g + 1], spec)[0], together[g])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_less_error_than_nearest_on_inputs_of_the_model(bits: int) -> None:
    generator = seeded(6)
    mean, var = torch.rand(8, generator=generator, dtype=torch.float64), 0.2 + torch.rand(8, generator=generator, dtype=torch.float64)
    of_mean, of_var = reference_moments.hessian(mean, var, (3, 3), 0.6)
    x = reference_moments.model_inputs(mean, var, (3, 3), 0.6, 40_000, generator).flatten(1)
    sampled = x.T @ x / len(x)
    spec = SPECS["ternary"] if bits == 2 else QSpec(bits, axis=0)
    weight = torch.randn(1, 200, 72, generator=generator)
    scale, zero = ranged(weight, spec)
    nearest = error_of(weight, to_nearest(weight, scale, zero, spec), scale, zero)
    for centred in (False, True):
        hessian = of_var if centred else of_mean + of_var
        analytic, empirical = (
            error_of(weight, error_feedback(weight, each, scale, spec), scale, zero)
            for each in (hessian, sampled - centred * torch.outer(x.mean(0), x.mean(0)))
        )
        y = x - x.mean(0) if centred else x
        true = {name: float((y @ e[0].double().T).square().mean()) for name, e in (("n", nearest), ("a", analytic), ("e", empirical))}
        assert true["a"] < 0.75 * true["n"]
        assert true["e"] == pytest.approx(true["a"], rel=0.05)  # samples instead of moments: other codes, the same error
        assert energy(analytic, hessian[None]) / 200 == pytest.approx(true["a"], rel=0.05)  # e^T H e predicts it


def test_inverse_by_sherman_morrison_gives_the_same_codes() -> None:
    generator = seeded(7)
    mean, var = torch.rand(30, generator=generator), 0.1 + torch.rand(30, generator=generator)
    hessian = torch.diag(var) + torch.outer(mean, mean)
    damping = 0.01 * hessian.diagonal().mean()
    inverse = reference.inverse_of_moments(mean, var + damping)
    assert torch.allclose(inverse, reference.damped_inverse(hessian, 0.01), rtol=1e-5, atol=1e-6)
    spec, weight = QSpec(3, axis=0), torch.randn(1, 6, 30, generator=generator)
    scale, zero = ranged(weight, spec)
    expected = reference.gptq(weight[0], inverse, reference.falling(hessian), scale[0], zero[0], spec)
    assert torch.equal(error_feedback(weight, hessian, scale, spec)[0], expected)


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_a_channel_that_never_fires_rounds_to_nearest(damping: float) -> None:
    generator = seeded(8)
    spec, dead = QSpec(4, axis=0), [2, 7]
    weight, hessian = torch.randn(1, 5, 12, generator=generator), wishart(12, generator)
    hessian[:, dead] = 0
    hessian[:, :, dead] = 0
    scale, zero = ranged(weight, spec)
    codes = error_feedback(weight, hessian, scale, spec, damping=damping)
    assert torch.equal(codes[..., dead], to_nearest(weight, scale, zero, spec)[..., dead])
    alive = [j for j in range(12) if j not in dead]
    left = hessian[:, alive][:, :, alive]
    assert torch.equal(codes[..., alive], error_feedback(weight[..., alive], left, scale, spec, damping=damping * len(alive) / 12))


def test_few_samples_are_enough_with_damping_and_only_then() -> None:
    generator = seeded(9)
    x = torch.randn(4, 20, generator=generator)
    spec, weight, hessian = QSpec(4, axis=0), torch.randn(1, 3, 20, generator=generator), x.T @ x / 4
    scale, zero = ranged(weight, spec)
    fed, nearest = error_feedback(weight, hessian, scale, spec), to_nearest(weight, scale, zero, spec)
    assert energy(error_of(weight, fed, scale, zero), hessian[None]) < 0.2 * energy(error_of(weight, nearest, scale, zero), hessian[None])
    lost = torch.eye(20) - 0.2  # one direction of negative energy, -3
    with pytest.raises(NetworkError, match="1 of 2 Hessians are not positive definite, even with 100 times the damping of 0.01: shrink"):
        error_feedback(weight.expand(2, 3, 20), torch.stack([lost, hessian]), scale.expand(2, 3), spec)
    slightly = hessian.double() - 0.05 * hessian.diagonal().mean() * torch.eye(20)
    both = error_feedback(weight.expand(2, 3, 20), torch.stack([slightly, hessian.double()]), scale.expand(2, 3), spec)
    assert torch.equal(both[1], fed[0])  # more damping for one group is none of the others' business
    with pytest.raises(NetworkError, match="damping of 0"):
        error_feedback(weight, slightly, scale, spec, damping=0)


def test_float64_saves_what_float32_cannot_factor() -> None:
    spread = torch.logspace(0, -10, 12, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(12, 12, generator=seeded(10), dtype=torch.float64)).Q
    hessian = (basis * spread) @ basis.T
    assert int(torch.linalg.cholesky_ex(hessian.float()).info) > 0
    spec, weight = QSpec(4, axis=0), torch.randn(1, 4, 12, generator=seeded(11))
    scale, zero = ranged(weight, spec)
    expected = reference.gptq(weight[0], reference.damped_inverse(hessian, 0), reference.falling(hessian), scale[0], zero[0], spec)
    assert torch.equal(error_feedback(weight, hessian, scale, spec, damping=0)[0], expected)


def test_what_does_not_fit_is_refused() -> None:
    weight, scale = torch.randn(2, 3, 4), torch.ones(2, 3)
    with pytest.raises(NetworkError, match=r"weight of shape \(2, 3, 4\) and a Hessian of shape \(2, 5, 5\) do not fit"):
        error_feedback(weight, torch.eye(5).expand(2, 5, 5), scale, QSpec(4))
    with pytest.raises(NetworkError, match="for 2 groups: give one for each"):
        error_feedback(weight, torch.eye(4), scale, QSpec(4))
    with pytest.raises(NetworkError, match="needs zero points"):
        error_feedback(weight, torch.eye(4).expand(2, 4, 4), scale, QSpec(4, symmetric=False))
    for bad in (torch.nan, -1.0):
        with pytest.raises(NetworkError, match="NaN, infinity or negative"):
            error_feedback(weight, torch.diag_embed(torch.tensor([[1.0, 1, 1, 1], [1, 1, bad, 1]])), scale, QSpec(4))


def test_scales_broadcast_and_dorefa_implies_its_zero() -> None:
    generator = seeded(12)
    weight, hessian = torch.randn(3, 4, 9, generator=generator), wishart(9, generator, 3)
    for spec in (SPECS["symmetric"], SPECS["dorefa"]):
        scale, zero = minmax(weight.transpose(0, 1), spec)
        one = error_feedback(weight, hessian, scale[None], spec)
        assert torch.equal(one, error_feedback(weight, hessian, scale.expand(3, 4), spec, zero.expand(3, 4)))


def test_shrink_keeps_the_diagonal_and_the_original() -> None:
    hessian = wishart(5, seeded(13), 2)
    before = hessian.clone()
    found = shrink(hessian, 0.3)
    diagonal = torch.diag_embed(hessian.diagonal(dim1=1, dim2=2))
    assert torch.allclose(found, 0.7 * hessian + 0.3 * diagonal) and torch.equal(hessian, before)
    assert torch.equal(found.diagonal(dim1=1, dim2=2), hessian.diagonal(dim1=1, dim2=2))
    assert torch.equal(shrink(hessian, 0.0), hessian) and torch.equal(shrink(hessian, 1.0), diagonal)


@pytest.mark.parametrize("kernel", [(), (3,), (3, 3), (2, 3, 2)])
def test_moment_hessian_is_the_variance_part_of_each_channel(kernel: tuple[int, ...]) -> None:
    var = torch.tensor([0.5, 2.0, 0.0])
    found = moment_hessian(var, kernel, 0.7)
    _, whole = reference_moments.hessian(torch.zeros(3), var, kernel, 0.7)
    assert torch.allclose(torch.block_diag(*found).double(), whole)  # type: ignore[no-untyped-call]


def test_moments_alone_beat_nearest_channel_by_channel() -> None:
    generator = seeded(14)
    var = 0.2 + torch.rand(6, generator=generator)
    spec, weight = QSpec(3, axis=0), torch.randn(20, 6, 3, 3, generator=generator)
    scale, zero = mse(weight, spec)
    columns = weight.flatten(2).transpose(0, 1)  # (in, out, taps)
    codes = error_feedback(columns, moment_hessian(var, (3, 3)), scale[None], spec)
    nearest = quantize(weight, scale, zero, spec).flatten(2).transpose(0, 1)
    _, whole = reference_moments.hessian(torch.zeros(6), var, (3, 3), 0.6)
    found, before = ((columns - each * scale[None, :, None]).transpose(0, 1).reshape(1, 20, -1) for each in (codes, nearest))
    assert energy(found, whole[None]) < 0.75 * energy(before, whole[None])


def test_many_small_groups_and_a_large_layer_are_quick() -> None:
    started = time.perf_counter()
    spec, generator = QSpec(4, axis=0), seeded(15)
    error_feedback(torch.randn(2000, 1, 9, generator=generator), wishart(9, generator, 2000), torch.ones(2000, 1), spec)
    error_feedback(torch.randn(1, 128, 1152, generator=generator), torch.eye(1152) + 0.5, torch.ones(1, 128), spec)
    assert time.perf_counter() - started < 10  # a loop over groups or a product a column takes minutes
