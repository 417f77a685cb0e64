"""DFQ end to end: what its steps are good for, its activation ranges, and mixed precision."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import datafree
from datafree import Target, Task
from datafree.bits.cost import packed_bytes
from datafree.closed.moments import Moments
from datafree.errors import TargetError
from datafree.graph.fold import norm_vectors
from datafree.methods.dfq import DFQ
from datafree.quant.insert import quantizers
from networks import NAMES, build, conv_bn

PIXELS = Task(shape=(3, 16, 16), mean=(0.5, 0.4, 0.3), std=(0.2,), classes=5)
DEPLOY = Target(8, 8)


def trained(*modules: nn.Module) -> nn.Sequential:
    """In eval mode, with statistics."""
    model = nn.Sequential(*modules)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.weight.copy_(0.5 + torch.rand(module.weight.shape, generator=generator))
                module.bias.copy_(0.5 * torch.randn(module.weight.shape, generator=generator))
        model.train()
        for _ in range(20):
            model(torch.randn(16, *PIXELS.shape, generator=generator))
    return model.eval()


def depthwise_stack() -> nn.Sequential:
    """An even network whose channels have been scaled up and down, each with what it feeds the other way."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = trained(
            *conv_bn(3, 16, 3, 2), nn.ReLU(), *conv_bn(16, 16, 3, groups=16), nn.ReLU(), *conv_bn(16, 24, 1), nn.ReLU(),
            *conv_bn(24, 24, 3, groups=24), nn.ReLU(), *conv_bn(24, 32, 1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5),
        )  # fmt: skip
        with torch.no_grad():
            for norm, following in ((1, 3), (4, 6), (7, 9), (10, 12), (13, 17)):
                factor = torch.exp(1.5 * torch.randn(model[norm].weight.shape))
                model[norm].weight *= factor
                model[norm].bias *= factor
                depthwise = getattr(model[following], "groups", 1) > 1
                model[following].weight /= factor.view(*((-1, 1) if depthwise else (1, -1)), *(1,) * (model[following].weight.dim() - 2))
    return model


def error(model: nn.Module, method: DFQ, target: Target) -> float:
    student = datafree.quantize(model, PIXELS, method=method, target=target).student
    x = torch.randn(32, *PIXELS.shape, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        return float((student(x) - model(x)).square().mean() / model(x).var())


def test_equalization_and_bias_correction_help_one_scale_a_tensor() -> None:
    model = depthwise_stack()
    target = Target(5, protocol="paper")
    plain = error(model, DFQ(equalize=False, absorb=False, correct_bias=False), target)
    equalized = error(model, DFQ(absorb=False, correct_bias=False), target)
    corrected = error(model, DFQ(absorb=False), target)
    assert equalized < 0.5 * plain and corrected < equalized


def test_all_steps_off_is_the_network_rounded() -> None:
    model = depthwise_stack()
    student = datafree.quantize(
        model,
        PIXELS,
        method=DFQ(equalize=False, absorb=False, correct_bias=False, per_channel=True),
        target=Target(8, protocol="paper"),
    ).student
    x = torch.randn(8, *PIXELS.shape)
    with torch.no_grad():
        assert (student(x) - model(x)).abs().max() < 0.3 * model(x).std()


RANGED: tuple[tuple[str, Callable[[], nn.Module], Callable[[Tensor], Tensor]], ...] = (
    ("relu", nn.ReLU, F.relu),
    ("relu6", nn.ReLU6, F.relu6),
    ("leaky relu", lambda: nn.LeakyReLU(0.1), lambda x: F.leaky_relu(x, 0.1)),
    ("silu", nn.SiLU, F.silu),
    ("hardswish", nn.Hardswish, F.hardswish),
)


@pytest.mark.parametrize(("make", "function"), [case[1:] for case in RANGED], ids=[case[0] for case in RANGED])
def test_ranges_are_six_sigma_before_the_activation(make: Callable[[], nn.Module], function: Callable[[Tensor], Tensor]) -> None:
    model = trained(*conv_bn(3, 8), make(), nn.MaxPool2d(2), nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    result = datafree.quantize(model, PIXELS, method=DFQ(equalize=False, absorb=False), target=DEPLOY)
    assert not any("procedural pictures" in note for note in result.run["notes"])
    moments = norm_vectors(model[1])
    sd = (moments.gamma.square() * model[1].running_var / moments.sigma.square()).sqrt()
    ends = torch.linspace(float((moments.beta - 6 * sd).min()), float((moments.beta + 6 * sd).max()), 10_000)
    low, high = min(0.0, float(function(ends).min())), float(function(ends).max())
    found = quantizers(result.student)["2:output"]
    torch.testing.assert_close(float(255 * found.scale), high - low, rtol=2e-3, atol=0)
    torch.testing.assert_close(float(found.zero), -low / (high - low) * 255, rtol=0, atol=0.7)


def test_the_range_of_the_input_is_that_of_pixels() -> None:
    student = datafree.quantize(depthwise_stack(), PIXELS, method="dfq", target=DEPLOY).student
    found = quantizers(student)["0:input"]
    torch.testing.assert_close(float(255 * found.scale), (1 - 0.3) / 0.2 + 0.5 / 0.2, rtol=1e-4, atol=0)


class Sum(nn.Module):
    """Two normed branches added; a third joined."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn_a = conv_bn(3, 8)
        self.b, self.bn_b = conv_bn(3, 8)
        self.c, self.bn_c = conv_bn(3, 8)
        self.relu = nn.ReLU()
        self.last = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        total = self.bn_a(self.a(x)) + self.bn_b(self.b(x))
        return self.last(torch.cat([self.relu(total), self.bn_c(self.c(x))], 1)).mean((2, 3))


def test_sums_add_moments_and_concats_take_the_union() -> None:
    model = trained(Sum())
    student = datafree.quantize(model, PIXELS, method=DFQ(equalize=False, absorb=False), target=DEPLOY).student
    a, b, c = (spread(model[0].get_submodule(name)) for name in ("bn_a", "bn_b", "bn_c"))
    high = max(float((a.mean + b.mean + 6 * (a.var + b.var).sqrt()).max()), float((c.mean + 6 * c.var.sqrt()).max()))
    low = float((c.mean - 6 * c.var.sqrt()).min())
    found = quantizers(student)["0.last:input"]
    torch.testing.assert_close(float(255 * found.scale), high - low, rtol=1e-3, atol=0)


def spread(norm: nn.Module) -> Moments:
    vectors = norm_vectors(norm)
    assert isinstance(norm.running_var, Tensor)
    return Moments(vectors.beta, vectors.gamma.square() * norm.running_var / vectors.sigma.square())


def test_what_moments_do_not_tell_comes_from_pictures_and_is_noted() -> None:
    model, task = build("transformer")
    result = datafree.quantize(model, task, method="dfq", target=DEPLOY)
    (note,) = (each for each in result.run["notes"] if "procedural pictures" in each)
    assert "blocks.0.proj:input" in note and "blocks.0.fc2:input" not in note
    assert any("nothing to equalize" in each for each in result.run["notes"])
    assert any("no bias to absorb" in each for each in result.run["notes"])


@pytest.mark.parametrize("name", NAMES)
def test_eight_bits_stay_close_and_nothing_is_noise_without_reason(name: str) -> None:
    model, task = build(name)
    result = datafree.quantize(
        model, task, method=DFQ(absorb=False, relu6_to_relu=False, per_channel=True), target=Target(8, protocol="paper")
    )
    x = torch.randn(8, *task.shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert (result.student(x) - model(x)).square().mean() < 1e-3 * model(x).square().mean()


@pytest.mark.parametrize("name", NAMES)
def test_mixed_precision_meets_its_budget(name: str) -> None:
    model, task = build(name)
    sizes = {
        bits: packed_bytes(datafree.quantize(model, task, method="dfq", target=Target(bits, protocol="paper")).student) for bits in (4, 8)
    }
    budget = sizes[4] + (sizes[8] - sizes[4]) // 3
    target = Target((2, 3, 4, 6, 8), max_bytes=budget, protocol="paper")
    result = datafree.quantize(model, task, method="dfq", target=target)
    assert packed_bytes(result.student) <= budget
    assert len({layer.weight.bits for layer in result.plan.layers.values()}) > 1
    with pytest.raises(TargetError, match="smallest possible size"):
        datafree.quantize(model, task, method="dfq", target=Target((2, 3, 4, 6, 8), max_bytes=100, protocol="paper"))
