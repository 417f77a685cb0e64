"""Refined codes and scales: each step against brute force, the whole against error feedback alone."""

import itertools

import pytest
import torch

from datafree.closed.refine import FACTORS, descend, fit_scale, refine
from datafree.closed.rounding import energy, error_feedback
from datafree.errors import NetworkError
from datafree.plan import QSpec
from datafree.quant.ranges import mse
from tests.closed.test_rounding import seeded, wishart

TERNARY, THREE = QSpec(2, axis=0, grid="ternary"), QSpec(3, axis=0)


def case(seed: int, n: int = 150, groups: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = seeded(seed)
    return torch.randn(groups, 5, n, generator=generator), wishart(n, generator, groups)


@pytest.mark.parametrize("spec", (TERNARY, THREE), ids=("ternary", "3 bits"))
def test_better_than_error_feedback_alone(spec: QSpec) -> None:
    weight, hessian = case(0)
    scale = mse(weight.flatten(0, 1), spec)[0].view(2, 5)
    codes, refined = refine(weight, hessian, scale, spec)
    found = energy(weight - refined[..., None] * codes, hessian)
    for factor in (1.0, *FACTORS[spec.bits]):
        alone = error_feedback(weight, hessian, scale * factor, spec)
        before = energy(weight - (scale * factor)[..., None] * alone, hessian)
        assert bool((found < before).all()) if factor in FACTORS[spec.bits] else float(found.sum()) < 0.95 * float(before.sum())
    assert codes.dtype == torch.int16 and int(codes.abs().max()) <= spec.levels[1]


def test_descent_equals_a_slow_loop() -> None:
    weight, hessian = case(1)
    scale = mse(weight.flatten(0, 1), TERNARY)[0].view(2, 5)
    codes = error_feedback(weight, hessian, scale, TERNARY)
    found = descend(weight, codes, hessian, scale, TERNARY)
    w, h, s = weight.double(), hessian.double(), scale.double()
    for group, row in itertools.product(range(2), range(5)):
        q = codes[group, row].double()
        for j in range(len(q)):
            error = w[group, row] - s[group, row] * q
            q[j] = (q[j] + (h[group, j] @ error) / (h[group, j, j] * s[group, row])).round().clamp(-1, 1)
        assert torch.equal(found[group, row].double(), q)


def test_descent_never_loses_and_a_fixed_point_is_a_minimum_of_every_code() -> None:
    weight, hessian = case(2, n=12, groups=1)
    scale = mse(weight.flatten(0, 1), THREE)[0].view(1, 5)
    codes = torch.zeros(weight.shape, dtype=torch.int16)
    before = energy(weight - scale[..., None] * codes, hessian)
    for _ in range(30):
        codes = descend(weight, codes, hessian, scale, THREE)
        after = energy(weight - scale[..., None] * codes, hessian)
        assert bool((after <= before * (1 + 1e-5)).all())
        before = after
    for j, level in itertools.product(range(12), range(-3, 4)):
        other = codes.clone()
        other[..., j] = level
        assert bool((energy(weight - scale[..., None] * other, hessian) >= before * (1 - 1e-4)).all())


def test_scale_is_the_least_squares_one() -> None:
    weight, hessian = case(3)
    scale = mse(weight.flatten(0, 1), TERNARY)[0].view(2, 5)
    codes = error_feedback(weight, hessian, scale, TERNARY)
    fitted = fit_scale(weight, codes, hessian, scale)
    best = energy(weight - fitted[..., None] * codes, hessian)
    for factor in (0.9, 0.99, 1.01, 1.1):
        assert bool((energy(weight - (fitted * factor)[..., None] * codes, hessian) > best).all())
    assert torch.equal(fit_scale(weight, torch.zeros_like(codes), hessian, scale), scale)


def test_inputs_that_never_fire_keep_their_codes() -> None:
    weight, hessian = case(4, n=10, groups=1)
    hessian[:, 3], hessian[:, :, 3] = 0, 0
    codes, scale = refine(weight, hessian, mse(weight.flatten(0, 1), THREE)[0].view(1, 5), THREE)
    assert bool(torch.isfinite(scale).all())
    assert torch.equal(descend(weight, codes, hessian, scale, THREE)[..., 3], codes[..., 3])


def test_refuses_grids_without_a_symmetric_zero() -> None:
    weight, hessian = case(5, n=4)
    with pytest.raises(NetworkError, match="symmetric grids only"):
        refine(weight, hessian, torch.ones(2, 5), QSpec(3, symmetric=False, axis=0))


def test_blocks_on_the_diagonal_are_the_dense_matrix() -> None:
    generator = seeded(6)
    weight, parts = torch.randn(2, 5, 12, generator=generator), wishart(4, generator, 6)
    dense = torch.stack([torch.block_diag(*parts[:3]), torch.block_diag(*parts[3:])])
    scale = mse(weight.flatten(0, 1), TERNARY)[0].view(2, 5)
    assert torch.allclose(energy(weight, parts), energy(weight, dense), rtol=1e-5)
    codes = error_feedback(weight, parts, scale, TERNARY, damping=0.0)
    assert torch.equal(codes, error_feedback(weight, dense, scale, TERNARY, damping=0.0))
    assert torch.equal(descend(weight, codes, parts, scale, TERNARY), descend(weight, codes, dense, scale, TERNARY))
    assert torch.allclose(fit_scale(weight, codes, parts, scale), fit_scale(weight, codes, dense, scale), rtol=1e-5)
    assert all(map(torch.allclose, refine(weight, parts, scale, TERNARY), refine(weight, dense, scale, TERNARY)))
