import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from datafree.closed import moments
from datafree.closed.moments import clip, elementwise, mean_form, relu, tap_correlation, variance_form
from datafree.errors import NetworkError
from tests.reference import moments as reference

CASES = [(0.0, 1.0), (0.3, 0.7), (-1.5, 0.4), (2.0, 3.0), (5.9, 0.5), (7.0, 1.0), (-20.0, 1.0), (20.0, 1.0), (100.0, 0.001), (0.2, 1e-5)]
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "prelu": nn.LeakyReLU(0.25),
    "elu": F.elu,
    "inplace": lambda x: x.mul_(2).add_(1),
}


def tensors(*values: float, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.tensor([value], dtype=dtype) for value in values]


@pytest.mark.parametrize(("low", "high"), [(0.0, math.inf), (0.0, 6.0), (-1.0, 1.0), (-math.inf, 2.0)])
@pytest.mark.parametrize(("mean", "sd"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clip_equals_an_integral(mean: float, sd: float, low: float, high: float, dtype: torch.dtype) -> None:
    found = clip(*tensors(mean, sd, dtype=dtype), low, high)
    expected = reference.integrated(lambda x: x.clamp(low, high), *(float(each) for each in tensors(mean, sd, dtype=dtype)))
    tolerance = 2e-6 if dtype == torch.float32 else 1e-8
    assert float(found[0]) == pytest.approx(expected[0], abs=tolerance * sd, rel=tolerance)
    assert float(found[1]) == pytest.approx(expected[1], abs=tolerance * sd**2, rel=10 * tolerance)


@pytest.mark.parametrize(("beta", "gamma"), [(0.5, -1.2), (-3.0, 0.8), (0.1, 1e-3), (1.0, 2.0)])
def test_relu_equals_the_published_row(beta: float, gamma: float) -> None:
    mean, var = relu(*tensors(beta, abs(gamma), dtype=torch.float64))
    first, second = reference.published_relu(beta, gamma)
    assert float(mean) == pytest.approx(first, rel=1e-9)
    assert float(var + mean.square()) == pytest.approx(second, rel=1e-9)


@pytest.mark.parametrize(("low", "high", "mean"), [(0.0, math.inf, -4.0), (0.0, math.inf, -5.0), (0.0, 6.0, -5.0), (1.0, 9.0, -4.5)])
def test_channels_that_seldom_fire_are_exact_in_float32(low: float, high: float, mean: float) -> None:
    found = clip(*tensors(mean, 1.0), low, high)
    expected = reference.integrated(lambda x: x.clamp(low, high) - low, mean, 1.0)
    assert float(found[1]) == pytest.approx(expected[1], rel=2e-3)
    if low == 0:  # the mean above a bound of 1 is below the resolution of float32
        assert float(found[0]) == pytest.approx(expected[0], rel=2e-3)


def test_moments_equal_sampled_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    x = -0.4 + 1.3 * torch.randn(400_000, generator=generator, dtype=torch.float64)
    for low, high in ((0.0, math.inf), (0.0, 1.0)):
        mean, var = clip(*tensors(-0.4, 1.3, dtype=torch.float64), low, high)
        assert float(mean) == pytest.approx(float(x.clamp(low, high).mean()), abs=5e-3)
        assert float(var) == pytest.approx(float(x.clamp(low, high).var()), abs=5e-3)


def test_no_spread_leaves_the_function_alone() -> None:
    mean = torch.tensor([-2.0, 0.0, 3.0, 9.0])
    out, var = clip(mean, torch.zeros(4), 0.0, 6.0)
    assert torch.equal(out, mean.clamp(0, 6)) and torch.equal(var, torch.zeros(4))
    out, var = elementwise(F.silu, mean, torch.zeros(4))
    assert torch.equal(out, F.silu(mean)) and torch.equal(var, torch.zeros(4))


@given(st.floats(-1e6, 1e6, width=32), st.floats(0, 1e4, width=32))
@settings(max_examples=200, deadline=None)
def test_relu_is_finite_and_bounded_in_float32(mean: float, sd: float) -> None:
    out, var = relu(*tensors(mean, sd))
    assert torch.isfinite(out).all() and torch.isfinite(var).all()
    assert float(out) >= max(mean, 0) * (1 - 1e-6)  # Jensen
    assert 0 <= float(var) <= sd**2 * (1 + 1e-5) + 2e-45  # the slope is at most 1; the smallest float32 is 1.4e-45


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("mean", "sd"), [(0.0, 1.0), (0.7, 2.0), (-2.0, 0.5), (3.0, 0.3)])
def test_any_activation_equals_an_integral(name: str, mean: float, sd: float) -> None:
    given_mean, given_sd = tensors(mean, sd)
    found = elementwise(ACTIVATIONS[name], given_mean, given_sd)
    expected = reference.integrated(ACTIVATIONS[name], mean, sd)
    assert float(given_mean) == pytest.approx(mean)  # an in-place function does not reach the argument
    assert float(found[0]) == pytest.approx(expected[0], abs=6e-4 * sd)
    assert float(found[1]) == pytest.approx(expected[1], abs=2e-3 * sd**2)


def test_per_channel_functions_are_called_on_whole_tensors() -> None:
    prelu = nn.PReLU(3).requires_grad_(False)
    prelu.weight.copy_(torch.tensor([0.0, 0.5, 1.0]))
    mean, var = elementwise(prelu, torch.full((1, 3, 1, 1), 0.5), torch.full((1, 3, 1, 1), 2.0))
    for channel, slope in enumerate((0.0, 0.5, 1.0)):
        expected = reference.integrated(lambda x: F.leaky_relu(x, slope), 0.5, 2.0)  # noqa: B023
        assert (float(mean[0, channel]), float(var[0, channel])) == pytest.approx(expected, rel=3e-3)


def test_tap_correlation() -> None:
    assert torch.equal(tap_correlation(()), torch.ones(1, 1))
    found = tap_correlation((2, 2), 0.5)
    assert torch.allclose(found[0], torch.tensor([1, 0.5, 0.5, 0.25]))
    assert torch.equal(tap_correlation((3,), 0.0), torch.eye(3))
    assert float(torch.linalg.eigvalsh(tap_correlation((3, 3), 0.6)).min()) > 0


@pytest.mark.parametrize(
    ("shape", "channels"),
    [((5, 3), 3), ((4, 3, 2), 3), ((4, 3, 3, 2), 3), ((6, 2, 3, 3), 6), ((4, 1, 3, 3), 4), ((4, 1, 3, 3), 2), ((2, 2, 2, 1, 2), 2)],
)
def test_forms_equal_the_loops(shape: tuple[int, ...], channels: int) -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    mean, var = torch.randn(channels, generator=generator), torch.rand(channels, generator=generator)
    assert torch.allclose(variance_form(a, b, var, 0.6), reference.variance_form(a, b, var, 0.6), rtol=1e-6)
    assert torch.allclose(mean_form(a, mean, channels // shape[1]), reference.mean_form(a, mean), rtol=1e-6)


def test_variance_form_is_positive_and_depends_on_rho() -> None:
    weight = torch.ones(1, 1, 3, 3)
    flat, full = (float(variance_form(weight, weight, torch.ones(1), rho)) for rho in (0.0, 1.0))
    assert (flat, full) == pytest.approx((9.0, 81.0))
    edge = torch.tensor([[[1.0, -1.0]]])
    assert 0 < float(variance_form(edge, edge, torch.ones(1), 0.6)) == pytest.approx(0.8)


def test_hessian_equals_the_second_moment_of_its_inputs() -> None:
    generator = torch.Generator().manual_seed(2)
    mean, var = torch.tensor([0.5, -1.0], dtype=torch.float64), torch.tensor([1.0, 0.3], dtype=torch.float64)
    x = reference.model_inputs(mean, var, (2, 2), 0.6, 200_000, generator)
    weight = torch.randn(3, 2, 2, 2, generator=generator, dtype=torch.float64)
    output = torch.einsum("ncxy,ocxy->no", x, weight)
    assert torch.allclose(output.mean(0), mean_form(weight, mean, 1), atol=0.03)
    assert torch.allclose(output.var(0), variance_form(weight, weight, var, 0.6), rtol=0.02)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(NetworkError, match=r"\(4, 3, 3, 3\).*\(5,\)"):
        variance_form(torch.ones(4, 3, 3, 3), torch.ones(4, 3, 3, 3), torch.ones(5))
    with pytest.raises(NetworkError, match="differ in shape"):
        variance_form(torch.ones(4, 3), torch.ones(4, 3, 1), torch.ones(3))
    with pytest.raises(NetworkError, match=r"1 group"):
        mean_form(torch.ones(4, 2), torch.ones(4), groups=1)


def test_large_weights_are_worked_on_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, var = torch.randn(10, 6, 3, generator=generator), torch.rand(6, generator=generator)
    whole = moments.variance_form(weight, weight, var)
    monkeypatch.setattr(moments, "_BLOCK", 40)
    assert moments.row_blocks(weight) == [slice(start, start + 2) for start in range(0, 10, 2)]
    assert moments.row_blocks(weight, groups=2) == [slice(0, 10)]
    torch.testing.assert_close(moments.variance_form(weight, weight, var), whole)
