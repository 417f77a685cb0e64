"""Folded networks compute the same, and rows of weights go back to where they came from."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from datafree.errors import NetworkError
from datafree.graph.flow import Flow, Layer, flow
from datafree.graph.fold import along_outputs, by_outputs, fold_batch_norm, foldable, from_outputs, norm_vectors
from networks import NAMES, build

LEFT = {"twice": ["shared"], "densenet": ["block.0.norm1", "block.1.norm1", "norm1", "norm5"]}  # shared, or behind no layer


def noise(*shape: int) -> Tensor:
    return torch.randn(2, *(shape or (3, 8, 8)), generator=torch.Generator().manual_seed(0))


def shaken(model: nn.Module) -> nn.Module:
    """In eval mode, batch norms with statistics and affine parts of their own."""
    generator = torch.Generator().manual_seed(1)
    for module in model.eval().modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for name, tensor in module.state_dict().items():
                if tensor.is_floating_point():
                    low = 0.5 if name in ("running_var", "weight") else -0.5
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + low)
    return model


def folded(model: nn.Module, x: Tensor, tolerance: float) -> nn.Module:
    """The folded network, after a look at what it computes and that ``model`` is unchanged."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = flow(model, x)
    made = fold_batch_norm(model, found)
    with torch.no_grad():
        torch.testing.assert_close(made(x), model(x), atol=tolerance, rtol=tolerance)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    return made


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("name", NAMES)
def test_folding_keeps_the_function(name: str, dtype: torch.dtype, tolerance: float) -> None:
    model, task = build(name)
    made = folded(model.to(dtype), noise(*task.shape).to(dtype), tolerance)
    left = [each for each, module in made.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert left == LEFT.get(name, [])
    assert all(parameter.dtype == dtype for parameter in made.parameters())


@pytest.mark.parametrize(
    "layer",
    [
        nn.ConvTranspose2d(3, 9, 2, 2, groups=3),
        nn.ConvTranspose2d(3, 9, 3, groups=3, bias=False),
        nn.ConvTranspose2d(3, 6, 3, output_padding=1, stride=2),
        nn.Conv2d(3, 9, 3, groups=3, bias=False),
        nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"affine": False}])
def test_kinds_of_layers_and_norms(layer: nn.Module, options: dict[str, bool]) -> None:
    model = shaken(nn.Sequential(copy.deepcopy(layer), nn.BatchNorm2d(layer.out_channels, **options), nn.ReLU())).double()
    made = folded(model, noise().double(), 1e-12)
    assert isinstance(made[1], nn.Identity) and made[0].bias is not None


def test_volumes_and_vectors() -> None:
    volume = shaken(nn.Sequential(nn.ConvTranspose3d(2, 4, 2, groups=2), nn.BatchNorm3d(4), nn.Conv3d(4, 2, 2), nn.BatchNorm3d(2))).double()
    assert not any(isinstance(each, nn.BatchNorm3d) for each in folded(volume, noise(2, 3, 4, 5).double(), 1e-12))
    vector = shaken(nn.Sequential(nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))).double()
    assert isinstance(folded(vector, noise(6).double(), 1e-12)[1], nn.Identity)


class NormAct(nn.BatchNorm2d):
    """A batch norm with its activation in it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))


def test_a_norm_that_does_more_keeps_the_rest() -> None:
    model = shaken(nn.Sequential(nn.Conv2d(3, 4, 1), NormAct(4), nn.Conv2d(4, 2, 1))).double()
    assert isinstance(folded(model, noise().double(), 1e-12)[1], NormAct)
    hooked = shaken(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))).double()
    hooked[1].register_forward_hook(lambda module, args, result: result * 2)
    folded(hooked, noise().double(), 1e-12)


class Pieces(nn.Module):
    def __init__(self, run: Callable[..., Tensor]):
        super().__init__()
        self.run, self.a, self.b, self.norm, self.c = run, nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)
        self.alias = nn.ModuleList([self.norm])

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def test_tied_weights_and_norms_with_two_names() -> None:
    model = shaken(Pieces(lambda self, x: self.c(self.b(self.alias[0](self.a(x)))))).double()
    model.b.weight = model.a.weight
    made = folded(model, noise().double(), 1e-12)
    assert isinstance(made.norm, nn.Identity) and made.alias[0] is made.norm and made.a.weight is not made.b.weight


@pytest.mark.parametrize(
    "run",
    [
        lambda self, x: self.c(self.norm(self.norm(self.a(x)))),
        lambda self, x: self.c(self.norm(self.a(x)) + self.norm(self.b(x))),
        lambda self, x: self.c(self.norm(h := self.a(x)) + h),
        lambda self, x: self.c(self.norm(self.a(x)) + self.norm(x)),
        lambda self, x: self.c(self.norm(self.a(x).mul_(2))),
    ],
)
def test_a_norm_that_is_not_a_layers_own_stays(run: Callable[..., Tensor]) -> None:
    model = shaken(Pieces(run)).double()
    assert foldable(flow(model, noise().double())) == ()
    assert isinstance(folded(model, noise().double(), 1e-12).norm, nn.BatchNorm2d)


def test_a_layer_and_its_norm_called_twice_fold() -> None:
    model = shaken(Pieces(lambda self, x: self.c(self.norm(self.a(self.norm(self.a(x)).relu()))))).double()
    assert isinstance(folded(model, noise().double(), 1e-12).norm, nn.Identity)


def test_the_vectors_of_a_norm() -> None:
    norm = shaken(nn.BatchNorm1d(3, eps=0.25))
    found = norm_vectors(norm)
    x = noise(3)
    torch.testing.assert_close(found.gamma * (x - found.mu) / found.sigma + found.beta, norm(x).detach())
    plain = norm_vectors(nn.BatchNorm1d(3, affine=False))
    assert torch.equal(plain.gamma, torch.ones(3)) and torch.equal(plain.beta, torch.zeros(3))
    with pytest.raises(NetworkError, match="no stored statistics"):
        norm_vectors(nn.BatchNorm1d(3, track_running_stats=False))


def layer_of(module: nn.Module, x: Tensor) -> Layer:
    (layer,) = flow(module, x).layers.values()
    return layer


@settings(deadline=None, max_examples=40)
@given(st.booleans(), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_rows_by_outputs(transposed: bool, groups: int, inputs: int, outputs: int, kernel: int) -> None:
    """They are there and back again, and row i alone makes output i."""
    kind = nn.ConvTranspose1d if transposed else nn.Conv1d
    module = kind(groups * inputs, groups * outputs, kernel, groups=groups, bias=False).double()
    x = noise(groups * inputs, 5).double()
    layer = layer_of(module, x)
    with torch.no_grad():
        rows = by_outputs(module.weight, layer)
        assert rows.shape == (groups * outputs, inputs, kernel)
        assert torch.equal(from_outputs(rows, layer), module.weight)
        assert torch.equal(by_outputs(from_outputs(rows * 2, layer), layer), rows * 2)
        factor = torch.arange(1, groups * outputs + 1, dtype=torch.float64)
        before = module(x)
        scaled = from_outputs(rows * factor.view(-1, 1, 1), layer)
        torch.testing.assert_close(module.weight * along_outputs(factor, layer), scaled)
        module.weight.copy_(scaled)
        torch.testing.assert_close(module(x), before * factor.view(-1, 1))


def test_rows_of_linear_and_channels_last_weights() -> None:
    linear = nn.Linear(3, 4)
    layer = layer_of(linear, noise(3))
    assert by_outputs(linear.weight, layer) is linear.weight and from_outputs(linear.weight, layer) is linear.weight
    assert along_outputs(torch.ones(4), layer).shape == (4, 1)
    module = nn.ConvTranspose2d(4, 6, 3, groups=2).to(memory_format=torch.channels_last)
    layer = layer_of(module, noise(4, 5, 5))
    assert torch.equal(from_outputs(by_outputs(module.weight, layer), layer), module.weight)


def test_foldable_names_layers_in_order() -> None:
    model, task = build("twice")
    found: Flow = flow(model, noise(*task.shape))
    assert [layer.name for layer in foldable(found)] == ["stem", "conv"]
