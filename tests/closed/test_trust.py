"""Kinds of pictures that disagree are trusted less: the estimate, the statistics expected on data, and what rounding makes of it."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

import datafree
from datafree import Target
from datafree.closed.gram import Gram
from datafree.closed.trust import Trust, channel_trust, expected_gram, trust_of
from datafree.graph.flow import Layer, flow
from datafree.graph.taps import anchored
from datafree.method import Method
from datafree.task import Task
from field import CLOSE, sqnr


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_channels_that_all_kinds_show_alike_are_trusted() -> None:
    variances = torch.rand(1, 50, generator=generator()) + 0.01
    trust = trust_of(variances.expand(3, 50))
    assert trust.share == pytest.approx(1) and trust.gain == pytest.approx(0, abs=1e-6) and trust.common == pytest.approx(0, abs=1e-6)


def test_the_variances_behind_log_amplitudes_are_found() -> None:
    own, gain, common = 0.5, 0.3, torch.tensor([[-1.0], [0.0], [1.0]])
    logs = own * torch.randn(1, 4000, generator=generator()) + gain * torch.randn(3, 4000, generator=generator().manual_seed(1))
    trust = trust_of((2 * (logs + common)).exp())
    assert trust.share == pytest.approx(own**2 / (own**2 + gain**2), rel=0.05)
    assert trust.gain == pytest.approx(math.expm1(gain**2), rel=0.1)
    levels = common.exp()
    assert trust.common == pytest.approx(float(levels.var() / levels.mean().square()), rel=0.1)


def test_channels_that_never_fire_give_finite_numbers() -> None:
    assert trust_of(torch.zeros(3, 4)) == Trust(1.0, 0.0, 0.0)
    variances = torch.tensor([[1.0, 0.0, 2.0], [1.0, 0.0, 2.0], [1.0, 5.0, 2.0]])
    trust = trust_of(variances)
    assert 0 <= trust.share < 0.5 and 0.1 < trust.gain <= 3


def conv_layer() -> Layer:
    model = nn.Sequential(nn.Conv2d(3, 4, (1, 2)))
    return flow(model, torch.zeros(2, 3, 4, 4)).layers["0"]


def statistics(layer: Layer) -> Gram:
    """Of three channels with two taps each."""
    root = torch.randn(6, 6, generator=generator())
    return Gram(torch.rand(1, 6, generator=generator()), (root @ root.T)[None])


def test_statistics_are_those_expected_under_unknown_gains() -> None:
    """Every combination of gains that are 1 - d or 1 + d, for each channel and for the layer: E[a_i a_j (H + m m^T)] - m m^T, exactly."""
    layer, gain, common = conv_layer(), 0.4, 0.25
    gram = statistics(layer)
    outer = gram.mean[0].outer(gram.mean[0])
    total = torch.zeros(6, 6)
    for signs in itertools.product((-1, 1), repeat=4):
        own = 1 + math.sqrt(gain) * torch.tensor(signs[:3], dtype=torch.float32).repeat_interleave(2)
        total += (1 + math.sqrt(common) * signs[3]) ** 2 * own.outer(own) * (gram.cov[0] + outer) / 2**4
    found = expected_gram(gram, layer, Trust(1.0, gain, common))
    assert torch.allclose(found.cov[0] * (1 + common), total - outer, atol=1e-4)
    assert found.mean is gram.mean


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_variances_count_as_far_as_they_are_shared(share: float) -> None:
    layer = conv_layer()
    gram = statistics(layer)
    before, after = (each.cov.diagonal(dim1=1, dim2=2).view(3, 2).mean(1) for each in (gram, expected_gram(gram, layer, Trust(share))))
    assert torch.allclose(after.log() - after.log().mean(), share * (before.log() - before.log().mean()), atol=1e-4)


def test_a_dead_channel_gets_a_variance() -> None:
    layer = conv_layer()
    gram = statistics(layer)
    gram.cov[0, :2] = gram.cov[0, :, :2] = 0
    diagonal = expected_gram(gram, layer, Trust(0.0)).cov.diagonal(dim1=1, dim2=2).view(3, 2).mean(1)
    assert torch.allclose(diagonal, diagonal[:1].expand(3))


def test_a_norm_before_a_layer_makes_kinds_of_inputs_agree() -> None:
    """Channels differ in scale by kind of input: before the anchored norm these gains are found, behind it nothing is left of them."""
    model = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3), nn.Conv2d(4, 2, 1)).eval()
    model[0].weight.data = torch.eye(6)[:, :, None, None]
    gains = torch.exp(0.5 * torch.randn(3, 6, generator=generator()))
    kinds = [gain.view(6, 1, 1) * torch.randn(32, 6, 8, 8, generator=generator()) for gain in gains]
    read = flow(model, kinds[0][:2])
    with anchored(model):
        found = channel_trust(model, read, read.layers, kinds)
    expected = trust_of(gains.square())
    assert found["0"].gain == pytest.approx(expected.gain, rel=0.05) and found["0"].share == pytest.approx(expected.share, abs=0.05)
    assert found["2"].gain < 0.01 * found["0"].gain and found["2"].common < 1e-3


class Detectors(nn.Module):
    """Half of its channels respond to everything, half to gratings of one direction and wavelength, which no picture has."""

    def __init__(self) -> None:
        super().__init__()
        self.see, self.classify = nn.Conv2d(1, 32, 7, padding=3), nn.Conv2d(32, 24, 1)
        gratings = torch.stack([grating(kind) for kind in range(16)])
        gratings -= gratings.mean((1, 2), keepdim=True)
        gratings *= 4 / gratings.abs().sum((1, 2), keepdim=True)
        everything = torch.rand(16, 7, 7, generator=generator()) / 49
        self.see.weight.data = torch.cat([gratings, everything])[:, None]
        self.see.bias.data = torch.tensor([-0.6] * 16 + [0.0] * 16)
        self.classify.weight.data = torch.randn(24, 32, 1, 1, generator=generator())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classify(torch.relu(self.see(x))).mean((2, 3))
        return out


def grating(kind: int, size: int = 7, phase: float = 0.0) -> Tensor:
    angle, wave = math.pi * (kind % 8) / 8, (2.5, 4.0)[kind // 8]
    y, x = torch.meshgrid(*(torch.arange(size, dtype=torch.float32) - size // 2,) * 2, indexing="ij")
    return torch.cos(2 * math.pi * (x * math.cos(angle) + y * math.sin(angle)) / wave + phase)


@torch.no_grad()
def test_channels_that_respond_to_no_picture_are_not_given_up() -> None:
    """Error feedback puts errors where pictures vary little: into the channels that matter to the data, without doubts about pictures."""
    model, task = Detectors().eval(), Task(shape=(1, 24, 24), classes=24)
    phases = (2 * math.pi * torch.rand(64, generator=generator())).tolist()
    data = torch.stack([grating(number % 16, 24, phase) for number, phase in enumerate(phases)])[:, None] / 2 + 0.5
    target = Target(4, protocol="paper", keep=("see",))

    def worst(method: str | Method) -> float:
        students = [datafree.quantize(model, task, method=method, target=target, seed=seed).student for seed in (0, 1)]
        return min(sqnr(model(data), student(data)) for student in students)

    robust, blind = (worst(datafree.methods()["anchor"](robust=each)) for each in (True, False))
    assert robust > blind + 3
    assert robust > worst("rtn") - CLOSE
