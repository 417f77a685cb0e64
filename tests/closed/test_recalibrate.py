import pytest
import torch
from torch import Tensor

from datafree.closed.moments import Moments, variance_form
from datafree.closed.recalibrate import LIMIT, recalibrate
from tests.reference.moments import mean_form, model_inputs
from tests.reference.moments import variance_form as slow_variance_form

MEAN = torch.tensor([0.5, 1.0, -0.3], dtype=torch.float64)
VAR = torch.tensor([1.0, 0.2, 0.7], dtype=torch.float64)


def ternary(seed: int = 0, out: int = 5) -> tuple[Tensor, Tensor, float]:
    full = torch.randn(out, 3, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    kept = full.abs() > 0.7 * full.abs().mean()
    return full.sign() * kept, full, float(full.abs()[kept].mean())


@pytest.mark.parametrize("dropped", [True, False])
def test_matches_sampled_statistics(dropped: bool) -> None:
    low, full, scale = ternary()
    alpha = scale if dropped else 1.0
    low = low if dropped else scale * low
    x = model_inputs(MEAN, VAR, (2, 2), 0.6, 200_000, torch.Generator().manual_seed(1))
    before = torch.einsum("ncxy,ocxy->no", x, full)
    after = torch.einsum("ncxy,ocxy->no", x, low)
    mu_hat, sigma_hat = recalibrate(low, full, before.mean(0), before.std(0), Moments(MEAN, VAR), alpha)
    assert torch.allclose(mu_hat, after.mean(0), atol=0.03 * float(after.std()))
    assert torch.allclose(sigma_hat, after.std(0), rtol=0.02)


def test_equals_the_loops_with_a_scale_per_channel() -> None:
    low, full, _ = ternary(1)
    alpha = torch.linspace(0.5, 2, 5, dtype=torch.float64)
    mu, sigma = torch.linspace(-1, 1, 5, dtype=torch.float64), torch.linspace(0.5, 3, 5, dtype=torch.float64)
    mu_hat, sigma_hat = recalibrate(low, full, mu, sigma, Moments(MEAN, VAR), alpha, rho=0.5)
    scaled = alpha[:, None, None, None] * low
    assert torch.allclose(mu_hat, (mu + mean_form(scaled - full, MEAN)) / alpha)
    ratio = slow_variance_form(low, low, VAR, 0.5) / slow_variance_form(full, full, VAR, 0.5)
    assert torch.allclose(sigma_hat, sigma * ratio.sqrt())


def test_nothing_quantized_nothing_changed() -> None:
    _, full, _ = ternary()
    mu, sigma = torch.linspace(-1, 1, 5, dtype=torch.float64), torch.linspace(0.5, 3, 5, dtype=torch.float64)
    found = recalibrate(full, full, mu, sigma, Moments(MEAN, VAR))
    assert torch.allclose(found[0], mu) and torch.allclose(found[1], sigma)


@pytest.mark.parametrize("inputs", [None, Moments(torch.zeros(3), torch.ones(3), known=False)])
def test_unknown_inputs_leave_the_ratio_of_norms(inputs: Moments | None) -> None:
    low, full, scale = ternary()
    mu, sigma = torch.ones(5, dtype=torch.float64), 2 * torch.ones(5, dtype=torch.float64)
    mu_hat, sigma_hat = recalibrate(low, full, mu, sigma, inputs, scale)
    assert torch.allclose(mu_hat, mu / scale)
    assert torch.allclose(sigma_hat, 2 * low.flatten(1).norm(dim=1) / full.flatten(1).norm(dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("known", [True, False])
def test_empty_channels_do_not_blow_up(dtype: torch.dtype, known: bool) -> None:
    low, full, scale = ternary(2)
    low[0] = 0
    low[1] = 0
    low[1, 0, 0, 0] = 1e-6
    full[2] = 0
    full[3] *= 1e-9
    mu, sigma = torch.ones(5, dtype=dtype), torch.full((5,), 2.0, dtype=dtype)
    mu_hat, sigma_hat = recalibrate(low.to(dtype), full.to(dtype), mu, sigma, Moments(MEAN.to(dtype), VAR.to(dtype), known), scale)
    assert torch.isfinite(mu_hat).all() and torch.isfinite(sigma_hat).all()
    ratio = sigma_hat * scale / sigma
    assert torch.allclose(ratio[:4], torch.tensor([1, 1 / LIMIT, 1, LIMIT], dtype=dtype))


def test_inputs_without_variance_keep_the_spread() -> None:
    low, full, scale = ternary(3)
    sigma = torch.linspace(0.5, 3, 5, dtype=torch.float64)
    _, found = recalibrate(low, full, sigma, sigma, Moments(MEAN, 0 * VAR), scale)
    assert torch.allclose(found, sigma / scale)


def test_depthwise() -> None:
    generator = torch.Generator().manual_seed(4)
    full = torch.randn(3, 1, 3, 3, generator=generator, dtype=torch.float64)
    low, sigma = full.round(), torch.ones(3, dtype=torch.float64)
    _, found = recalibrate(low, full, 0 * sigma, sigma, Moments(MEAN, VAR))
    assert torch.allclose(found.square(), variance_form(low, low, VAR) / variance_form(full, full, VAR))
