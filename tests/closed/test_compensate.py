import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn import functional as F

from datafree.closed.compensate import Affine, coefficients, plus_scale, solve, terms
from datafree.closed.correct import corrected_bias, output_shift
from datafree.closed.moments import mean_form, variance_form
from tests.reference import dfmpc as reference
from tests.reference import moments as reference_moments


class Layer:
    """A random layer, its ternary version and the norm behind both."""

    def __init__(self, seed: int, out: int = 5, shape: tuple[int, ...] = (3, 2, 2)) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.full = torch.randn(out, *shape, generator=generator, dtype=torch.float64)
        threshold = 0.7 * self.full.abs().mean()
        self.low = self.full.sign() * (self.full.abs() > threshold)
        self.alpha = float(self.full.abs()[self.full.abs() > threshold].mean())
        self.gamma, self.beta, self.mu, self.mu_hat = torch.randn(4, out, generator=generator, dtype=torch.float64)
        self.sigma, self.sigma_hat = 0.2 + torch.rand(2, out, generator=generator, dtype=torch.float64)

    @property
    def after(self) -> tuple[Affine, Affine]:
        return (
            Affine.of_norm(self.gamma, self.beta, self.mu_hat, self.sigma_hat),
            Affine.of_norm(self.gamma, self.beta, self.mu, self.sigma),
        )

    def solved(self, lambda1: float = 0.5, lambda2: float = 0.0) -> Tensor:
        return coefficients(self.low, self.full, *self.after, lambda1, lambda2)

    def channel(self, j: int) -> tuple[Tensor, Tensor, float, float, float, float, float, float]:
        numbers = (self.gamma, self.beta, self.mu, self.sigma, self.mu_hat, self.sigma_hat)
        return (self.low[j], self.full[j], *(float(each[j]) for each in numbers))  # type: ignore[return-value]


@pytest.mark.parametrize("shape", [(3, 2, 2), (4,), (1, 3, 3), (2, 3)])
@pytest.mark.parametrize(("lambda1", "lambda2"), [(0.5, 0.0), (0.0, 0.0), (0.3, 0.01)])
def test_equals_the_loops(shape: tuple[int, ...], lambda1: float, lambda2: float) -> None:
    layer = Layer(0, shape=shape)
    expected = [reference.coefficient(*layer.channel(j), lambda1, lambda2) for j in range(5)]
    assert torch.allclose(layer.solved(lambda1, lambda2), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(4))
def test_equals_a_numerical_minimiser_of_the_loss(seed: int) -> None:
    layer = Layer(seed)
    for j, c in enumerate(layer.solved(0.5, 0.02).tolist()):
        found = minimize_scalar(
            lambda x: reference.loss(x, *layer.channel(j), 0.5, 0.02),  # noqa: B023
            bounds=(0, 50),
            method="bounded",
            options={"xatol": 1e-9},
        )
        assert c == pytest.approx(found.x, abs=1e-5)


@given(st.integers(0, 10_000), st.floats(0, 2), st.floats(0, 1), st.floats(-3, 3))
@settings(max_examples=60, deadline=None)
def test_beats_perturbations_of_itself(seed: int, lambda1: float, lambda2: float, step: float) -> None:
    layer = Layer(seed, out=2)
    for j, c in enumerate(layer.solved(lambda1, lambda2).tolist()):
        assert c >= 0
        best = reference.loss(c, *layer.channel(j), lambda1, lambda2)
        assert best <= reference.loss(max(0.0, c + step), *layer.channel(j), lambda1, lambda2) + 1e-9


def test_one_if_nothing_was_quantized() -> None:
    layer = Layer(1)
    same = layer.after[1]
    assert torch.allclose(coefficients(layer.full, layer.full, same, same), torch.ones(5, dtype=torch.float64))


def test_mean_magnitude_of_the_kept_weights_for_ternary() -> None:
    layer = Layer(2)
    same = layer.after[1]
    kept = torch.stack([row[codes != 0].abs().mean() for row, codes in zip(layer.full, layer.low, strict=True)])
    assert torch.allclose(coefficients(layer.low, layer.full, same, same, lambda1=0.0), kept)


def test_a_large_weight_on_the_offset_gives_the_ratio_of_offsets() -> None:
    layer = Layer(3)
    after_low, after_full = layer.after
    expected = (after_full.shift / after_low.shift).clamp(min=0)
    assert torch.allclose(layer.solved(lambda1=1e9), expected, rtol=1e-5, atol=1e-6)


def test_flipping_gamma_and_beta_together_changes_nothing() -> None:
    layer = Layer(4)
    before = layer.solved()
    layer.gamma, layer.beta = -layer.gamma, -layer.beta
    assert torch.equal(layer.solved(), before)


def test_never_negative() -> None:
    layer = Layer(5)
    layer.low = -layer.low
    assert torch.equal(layer.solved(lambda1=0.0), torch.zeros(5, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dead_channels_are_left_alone(dtype: torch.dtype) -> None:
    layer = Layer(6)
    gamma, beta, mu, sigma = (each.to(dtype) for each in (layer.gamma, layer.beta, layer.mu, layer.sigma))
    gamma[0], beta[0] = 1e-20, 0
    sigma[1] = 0
    low, full = layer.low.to(dtype), layer.full.to(dtype)
    low[2], full[2], beta[2], mu[2] = 0, 0, 0, 0
    after = Affine.of_norm(gamma, beta, mu, sigma)
    c = coefficients(low, full, after, after)
    assert torch.equal(c[:3], torch.ones(3, dtype=dtype)) and torch.isfinite(c).all()
    assert not torch.isclose(c[3:], torch.ones(2, dtype=dtype)).any()
    assert torch.equal(coefficients(low * 0, full, after, Affine.of_bias(0 * mu), lambda1=0.0), torch.ones(5, dtype=dtype))


def test_without_norm_or_bias_the_offset_is_absent() -> None:
    layer = Layer(7)
    without = Affine.of_bias(torch.zeros(5, dtype=torch.float64))
    low, full = layer.low.flatten(1), layer.full.flatten(1)
    expected = (low * full).sum(1) / (low * low).sum(1)
    assert torch.allclose(coefficients(layer.low, layer.full, without, without, lambda1=0.5), expected)
    biased = Affine.of_bias(layer.beta)
    expected = ((low * full).sum(1) + 0.5 * layer.beta**2) / ((low * low).sum(1) + 0.5 * layer.beta**2)
    assert torch.allclose(coefficients(layer.low, layer.full, biased, biased, lambda1=0.5), expected)


def test_a_shared_norm_is_solved_jointly() -> None:
    one, two = Layer(8), Layer(9)
    numerator, denominator = terms(one.low, one.full, *one.after)
    assert torch.allclose(solve(2 * numerator, 2 * denominator), one.solved())
    other = terms(two.low, two.full, *two.after)
    joint = solve(numerator + other[0], denominator + other[1])
    for j, c in enumerate(joint.tolist()):
        found = minimize_scalar(
            lambda x: sum(reference.loss(x, *layer.channel(j), 0.5, 0.0) for layer in (one, two)),  # noqa: B023
            bounds=(0, 50),
            method="bounded",
            options={"xatol": 1e-9},
        )
        assert c == pytest.approx(found.x, abs=1e-5)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "prelu", "max_pool", "avg_pool"])
def test_folding_into_the_norm_equals_scaling_the_next_inputs(activation: str) -> None:
    layer = Layer(10, shape=(3, 3, 3))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    following = torch.randn(4, 5, 3, 3, generator=generator, dtype=torch.float64)
    c = layer.solved()
    act = {
        "relu": F.relu,
        "leaky_relu": F.leaky_relu,
        "prelu": lambda value: F.prelu(value, torch.linspace(0, 1, 5, dtype=torch.float64)),
        "max_pool": lambda value: F.max_pool2d(F.relu(value), 2),
        "avg_pool": lambda value: F.avg_pool2d(F.relu(value), 2),
    }[activation]
    output = F.conv2d(x, layer.low)

    def norm(gamma: Tensor, beta: Tensor) -> Tensor:
        return F.batch_norm(output, layer.mu_hat, layer.sigma_hat**2, gamma, beta, eps=0.0)

    folded = F.conv2d(act(norm(c * layer.gamma, c * layer.beta)), following)
    scaled = F.conv2d(act(norm(layer.gamma, layer.beta)), following * c[:, None, None])
    assert torch.allclose(folded, scaled)


@pytest.mark.parametrize(("shape", "channels"), [((3, 2, 2), 3), ((4,), 4), ((1, 3, 3), 5)])
def test_plus_scale_is_the_least_loss_of_variance(shape: tuple[int, ...], channels: int) -> None:
    layer = Layer(11, shape=shape)
    var = torch.linspace(0.1, 2, channels, dtype=torch.float64)
    scale = plus_scale(layer.low, layer.full, var, fallback=torch.ones(5))

    def loss(each: Tensor) -> Tensor:
        error = each.view(-1, *(1,) * len(shape)) * layer.low - layer.full
        return reference_moments.variance_form(error, error, var, 0.6)

    for factor in (0.8, 0.99, 1.01, 1.3):
        assert (loss(scale) < loss(factor * scale)).all()


def test_plus_scale_falls_back() -> None:
    layer = Layer(12)
    layer.low[0] = 0
    layer.low[1] = -layer.low[1]
    fallback = torch.full((5,), 7.0, dtype=torch.float64)
    scale = plus_scale(layer.low.to(torch.int8), layer.full, torch.ones(3), fallback)
    assert scale[:2].tolist() == [7.0, 7.0] and (scale[2:] != 7.0).all()
    assert torch.equal(plus_scale(layer.low, layer.full, torch.zeros(3), fallback), fallback)


@pytest.mark.parametrize(("shape", "channels"), [((3, 2, 2), 3), ((4,), 4), ((2, 3, 3), 12), ((1, 3, 3), 6)])
def test_the_offset_step_leaves_no_offset(shape: tuple[int, ...], channels: int) -> None:
    layer = Layer(13, out=6, shape=shape)
    mean = torch.linspace(-1, 2, channels, dtype=torch.float64)
    quantized, groups = layer.alpha * layer.low, channels // shape[0]
    shift = output_shift(quantized, layer.full, mean, groups)
    assert torch.allclose(shift, reference_moments.mean_form(quantized - layer.full, mean))
    bias = corrected_bias(quantized, layer.full, mean, layer.beta, groups)
    assert torch.allclose(mean_form(quantized, mean, groups) + bias, mean_form(layer.full, mean, groups) + layer.beta)
    assert torch.equal(corrected_bias(quantized, layer.full, mean, None, groups), -shift)


def test_correction_removes_the_mean_shift_of_sampled_inputs() -> None:
    layer = Layer(14)
    mean, var = torch.tensor([0.5, 1.0, -0.3], dtype=torch.float64), torch.tensor([1.0, 0.2, 0.7], dtype=torch.float64)
    x = reference_moments.model_inputs(mean, var, (2, 2), 0.6, 100_000, torch.Generator().manual_seed(0))
    quantized = layer.alpha * layer.low
    bias = corrected_bias(quantized, layer.full, mean)
    change = torch.einsum("ncxy,ocxy->no", x, quantized - layer.full).mean(0)
    spread = variance_form(quantized - layer.full, quantized - layer.full, var).sqrt()
    assert (change.abs() > 10 * spread / 100_000**0.5).any()
    assert ((change + bias).abs() < 5 * spread / 100_000**0.5).all()
