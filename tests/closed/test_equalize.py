"""Equalization and absorption keep the function, even out ranges, and leave alone what they must."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datafree.closed.equalize import Edge, absorb_biases, edges, equalize_layers, fold_weights
from datafree.closed.propagate import layer_inputs
from datafree.graph.flow import Flow, flow
from datafree.graph.fold import by_outputs, norm_vectors
from networks import NAMES, build, conv_bn

PICTURE = (3, 12, 12)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(4, *(shape or PICTURE), generator=torch.Generator().manual_seed(seed))


def trained(*modules: nn.Module, shape: tuple[int, ...] = PICTURE) -> nn.Sequential:
    """In eval mode, with statistics, and channels of very different size."""
    model = nn.Sequential(*modules)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            for name, value in module.named_parameters(recurse=False):
                size = 0.3 * torch.randn(value.shape, generator=generator)
                if isinstance(module, nn.PReLU):
                    size = size.abs()
                elif name == "weight" and value.dim() > 1:
                    size *= torch.exp(1.5 * torch.randn(value.shape[0], *(1,) * (value.dim() - 1), generator=generator))
                value.copy_(size + (1.0 if isinstance(module, nn.modules.batchnorm._BatchNorm) and name == "weight" else 0.0))
        model.train()
        for seed in range(20):
            model(noise(*shape, seed=seed))
    return model.eval()


def prepared(model: nn.Module, shape: tuple[int, ...] = PICTURE) -> tuple[nn.Module, Flow]:
    found = flow(model, noise(*shape))
    return fold_weights(model, found), found


def conv(inputs: int, outputs: int, kernel: int = 3, **options: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_folded_weights_keep_function_modules_and_moments(name: str) -> None:
    model, task = build(name)
    before = copy.deepcopy(model.state_dict())
    made, found = prepared(model, task.shape)
    x = noise(*task.shape)
    with torch.no_grad():
        close(made(x), model(x))
    assert made.state_dict().keys() == before.keys() and all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    old, new = layer_inputs(found, model), layer_inputs(found, made)
    for layer in found.layers:
        assert old[layer].known == new[layer].known
        close(new[layer].mean, old[layer].mean)
        close(new[layer].var, old[layer].var)


@pytest.mark.parametrize("to_convergence", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_equalizing_keeps_the_function(name: str, to_convergence: bool) -> None:
    model, task = build(name)
    made, found = prepared(model, task.shape)
    factors = equalize_layers(made, found, to_convergence=to_convergence)
    assert set(factors) == set(edges(found))
    x = noise(*task.shape)
    with torch.no_grad():
        close(made(x), model(x))


def test_edges_of_known_networks() -> None:
    assert edges(read("cifar_resnet")) == tuple(
        Edge(f"{block}.conv1", f"{block}.conv2", ("relu",)) for block in ("layer1.0", "layer1.1", "layer2.0")
    )
    assert edges(read("transformer")) == ()  # GELU, layer norm, attention
    assert edges(read("twice")) == ()  # called twice, shared norm, sum
    assert edges(read("densenet")) == tuple(Edge(f"block.{i}.conv1", f"block.{i}.conv2", ("relu",)) for i in range(2))
    assert [(edge.first, edge.second) for edge in edges(read("vgg"))] == [("0", "3"), ("3", "7"), ("7", "10"), ("10", "15"), ("15", "17")]
    assert [(edge.first, edge.second) for edge in edges(read("sequence"))] == [("0", "3"), ("6", "11")]  # not across ELU
    mobile = read("mobilenet")
    assert all(edge.capped or not edge.activations for edge in edges(mobile)) and sum(edge.capped for edge in edges(mobile)) == 7


def read(name: str) -> Flow:
    model, task = build(name)
    return flow(model, noise(*task.shape))


PAIRS: tuple[tuple[str, Callable[[], list[nn.Module]]], ...] = (
    ("relu", lambda: [*conv_bn(3, 8), nn.ReLU(), *conv_bn(8, 6)]),
    ("no activation", lambda: [*conv_bn(3, 8), conv(8, 6)]),
    ("no norm", lambda: [conv(3, 8), nn.ReLU(), conv(8, 6)]),
    ("prelu", lambda: [*conv_bn(3, 8), nn.PReLU(8), conv(8, 6)]),
    ("leaky relu, average pool", lambda: [*conv_bn(3, 8), nn.LeakyReLU(), nn.AvgPool2d(2), conv(8, 6)]),
    ("max pool, zero pad, dropout", lambda: [conv(3, 8), nn.MaxPool2d(2), nn.ReLU(), nn.ZeroPad2d(1), nn.Dropout(), conv(8, 6)]),
    ("flatten", lambda: [*conv_bn(3, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 6)]),
    ("global pool", lambda: [*conv_bn(3, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6)]),
    ("transposed", lambda: [nn.ConvTranspose2d(3, 8, 2, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 6, 3)]),
    ("depthwise second", lambda: [conv(3, 8), nn.ReLU(), conv(8, 16, groups=8)]),
    ("depthwise first", lambda: [conv(3, 3, groups=3), nn.ReLU(), conv(3, 6, 1)]),
)


@pytest.mark.parametrize("build_it", [each for _, each in PAIRS], ids=[name for name, _ in PAIRS])
def test_a_pair_has_equal_ranges_after_one_pass(build_it: Callable[[], list[nn.Module]]) -> None:
    model = trained(*build_it())
    made, found = prepared(model)
    (edge,) = edges(found)
    before = ranges(made, found, edge)
    factor = equalize_layers(made, found)[edge]
    with torch.no_grad():
        close(made(noise()), model(noise()))
    first, second = ranges(made, found, edge)
    torch.testing.assert_close(first, second, atol=0, rtol=1e-4)
    torch.testing.assert_close(first, (before[0] * before[1]).sqrt(), atol=0, rtol=1e-4)
    torch.testing.assert_close(factor, (before[0] / before[1]).sqrt(), atol=0, rtol=1e-4)
    assert factor.max() / factor.min() > 1.5


def ranges(model: nn.Module, found: Flow, edge: Edge) -> tuple[Tensor, Tensor]:
    """Largest |w| of each channel on both sides, in loops."""
    layers = [found.layers[edge.first], found.layers[edge.second]]
    one, two = (by_outputs(model.get_submodule(layer.name).weight.detach(), layer).abs() for layer in layers)
    groups, per_group = layers[1].groups, two.shape[1]
    inputs = [
        two[(each := c // per_group) * len(two) // groups : (each + 1) * len(two) // groups, c % per_group].max()
        for c in range(groups * per_group)
    ]
    width = len(inputs) // len(one)
    return torch.stack([row.max() for row in one]), torch.stack([max(inputs[c * width : (c + 1) * width]) for c in range(len(one))])


def test_a_depthwise_triple_shares_the_geometric_mean() -> None:
    model = trained(*conv_bn(3, 8), nn.ReLU(), *conv_bn(8, 8, groups=8), nn.ReLU(), *conv_bn(8, 6, 1))
    made, found = prepared(model)
    one, two = edges(found)
    (r1, r2), (_, r3) = ranges(made, found, one), ranges(made, found, two)
    factors = equalize_layers(made, found)
    with torch.no_grad():
        close(made(noise()), model(noise()))
    mean = (r1 * r2 * r3) ** (1 / 3)
    torch.testing.assert_close(factors[one], r1 / mean)
    torch.testing.assert_close(factors[two], mean / r3)
    for edge in (one, two):
        for side in ranges(made, found, edge):
            torch.testing.assert_close(side, mean)


def test_to_convergence_evens_out_a_whole_chain() -> None:
    model = trained(conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 6))

    def unevenness(to_convergence: bool) -> float:
        made, found = prepared(model)
        equalize_layers(made, found, to_convergence=to_convergence)
        return max(float((one / two).log().abs().max()) for one, two in (ranges(made, found, edge) for edge in edges(found)))

    assert unevenness(True) < 1e-3 < unevenness(False)


class Joined(nn.Module):
    """Two layers with ``between`` them, and perhaps a second reader of the first."""

    def __init__(self, between: Callable[[Tensor], Tensor], groups: int = 1, inputs: int = 8) -> None:
        super().__init__()
        self.one, self.two = conv(3, 8), conv(inputs, 8, groups=groups)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.between(self.one(x)))


REFUSED: tuple[tuple[str, Callable[[], nn.Module]], ...] = (
    ("two consumers", lambda: Joined(lambda x: F.relu(x) * x.mean((2, 3), keepdim=True))),
    ("add", lambda: Joined(lambda x: F.relu(x) + 1)),
    ("sum with itself", lambda: Joined(lambda x: F.relu(x) + x)),
    ("concat", lambda: Joined(lambda x: torch.cat([F.relu(x), x], 1), inputs=16)),
    ("gelu", lambda: Joined(F.gelu)),
    ("silu", lambda: Joined(F.silu)),
    ("sigmoid", lambda: Joined(torch.sigmoid)),
    ("hardtanh", lambda: Joined(F.hardtanh)),
    ("grouped", lambda: Joined(F.relu, groups=2)),
    ("mean over channels", lambda: Joined(lambda x: F.relu(x).mean(1, keepdim=True), inputs=1)),
    ("padded with ones", lambda: Joined(lambda x: F.pad(F.relu(x), (1, 1, 1, 1), value=1.0))),
    ("permuted", lambda: Joined(lambda x: F.relu(x).permute(0, 3, 2, 1), inputs=12)),
    ("mixed by a view", lambda: Joined(lambda x: F.relu(x).view(x.shape[0], 2, 4, 12, 12).transpose(1, 2).reshape(x.shape))),
    ("a batch norm in between", lambda: nn.Sequential(conv(3, 8), nn.ReLU(), nn.BatchNorm2d(8), conv(8, 6))),
    ("linear over positions", lambda: nn.Sequential(conv(3, 12), nn.ReLU(), nn.Linear(12, 6))),
)


@pytest.mark.parametrize("build_it", [each for _, each in REFUSED], ids=[name for name, _ in REFUSED])
def test_nothing_is_moved_across(build_it: Callable[[], nn.Module]) -> None:
    made, found = prepared(build_it().eval())
    before = copy.deepcopy(made.state_dict())
    assert edges(found) == () and equalize_layers(made, found) == {} and absorb_biases(made, found) == {}
    assert all(torch.equal(before[key], value) for key, value in made.state_dict().items())


def test_a_value_that_is_also_returned_stays() -> None:
    class Both(Joined):
        def forward(self, x: Tensor) -> Tensor:
            middle = F.relu(self.one(x))
            return torch.stack([self.two(middle).mean(), middle.mean()])

    assert edges(prepared(Both(F.relu).eval())[1]) == ()


def test_a_dead_channel_keeps_its_weights() -> None:
    model = trained(conv(3, 8), nn.ReLU(), conv(8, 6))
    with torch.no_grad():
        model[0].weight[2] = 0
        model[2].weight[:, 5] = 0
    made, found = prepared(model)
    (factor,) = equalize_layers(made, found).values()
    assert factor[2] == factor[5] == 1 and torch.isfinite(factor).all()
    assert torch.equal(made[2].weight[:, 2], model[2].weight[:, 2]) and torch.equal(made[0].weight[5], model[0].weight[5])
    with torch.no_grad():
        close(made(noise()), model(noise()))


def capped() -> nn.Sequential:
    """Some channels go far beyond 6, some never come near."""
    model = trained(*conv_bn(3, 8), nn.ReLU6(), *conv_bn(8, 8, groups=8), nn.ReLU6(), conv(8, 6, 1))
    with torch.no_grad():
        model[1].weight[:4] *= 0.5
        model[1].weight[4:] *= 4
        model[1].bias.clamp_(-1, 1)
    return model


@pytest.mark.parametrize("to_convergence", [False, True])
def test_relu6_keeps_what_its_cap_touches(to_convergence: bool) -> None:
    model = nn.Sequential(*capped()[:3], conv(8, 6))
    made, found = prepared(model)
    (one,) = equalize_layers(made, found, to_convergence=to_convergence).values()
    assert (one[4:] == 1).all() and (one[:4] != 1).all()
    norm = norm_vectors(made[1])
    assert (norm.beta + 3.9 * norm.gamma)[:4].max() < 6
    with torch.no_grad():
        assert (model[1](model[0](noise()))[:, 4:] > 6).any()
        close(made(noise()), model(noise()))


@pytest.mark.parametrize("to_convergence", [False, True])
def test_relu6_to_relu_only_widens_caps(to_convergence: bool) -> None:
    model = capped()
    made, found = prepared(model)
    one, two = equalize_layers(made, found, relu6_to_relu=True, to_convergence=to_convergence).values()
    torch.testing.assert_close(torch.stack([one.min(), two.min()]), torch.ones(2))
    with torch.no_grad():
        x = model[1](model[0](noise()))
        assert (x > 6).any()
        x = model[4](model[3](torch.minimum(F.relu(x), 6 * one.view(-1, 1, 1))))
        close(made(noise()), model[6](torch.minimum(F.relu(x), 6 * two.view(-1, 1, 1))))


def test_without_statistics_nothing_passes_relu6_unless_it_counts_as_relu() -> None:
    model = trained(conv(3, 8), nn.ReLU6(), conv(8, 6))
    made, found = prepared(model)
    assert len(edges(found)) == 1 and equalize_layers(made, found) == {}
    assert len(equalize_layers(made, found, relu6_to_relu=True)) == 1


def test_absorption_leaves_capped_channels() -> None:
    model = trained(*conv_bn(3, 8), nn.ReLU6(), conv(8, 6, 1))
    with torch.no_grad():
        model[1].weight.fill_(0.4)
        model[1].bias.copy_(torch.linspace(2, 5.5, 8))
    made, found = prepared(model)
    (c,) = absorb_biases(made, found).values()
    low = model[1].bias + 4 * 0.4 < 6
    assert low.any() and not low.all() and (c[low] > 0).all() and (c[~low] == 0).all()
    (free,) = absorb_biases(prepared(model)[0], found, relu6_to_relu=True).values()
    assert (free > 0).all()


def test_moments_are_scaled_along() -> None:
    model = trained(*conv_bn(3, 8), nn.ReLU(), *conv_bn(8, 8), nn.ReLU(), conv(8, 6))
    made, found = prepared(model)
    factors = {edge.first: factor for edge, factor in equalize_layers(made, found).items()}
    for norm, layer in (("1", "0"), ("4", "3")):
        old, new = norm_vectors(model.get_submodule(norm)), norm_vectors(made.get_submodule(norm))
        torch.testing.assert_close(new.beta, old.beta / factors[layer])
        torch.testing.assert_close(made.get_submodule(norm).running_var.sqrt(), old.gamma.abs() / factors[layer], rtol=1e-3, atol=1e-6)
    generator = torch.Generator().manual_seed(0)
    samples = norm_vectors(model[4]).beta + norm_vectors(model[4]).gamma * torch.randn(100_000, 8, generator=generator)
    rescaled = F.relu(samples) / factors["3"]
    torch.testing.assert_close(layer_inputs(found, made)["6"].mean, rescaled.mean(0), rtol=0.02, atol=1e-3)
    torch.testing.assert_close(layer_inputs(found, made)["6"].var, rescaled.var(0), rtol=0.03, atol=1e-3)


def test_equalizing_helps_one_scale_a_tensor() -> None:
    model = trained(*conv_bn(3, 8), nn.ReLU(), *conv_bn(8, 8, groups=8), nn.ReLU(), *conv_bn(8, 6, 1))
    made, found = prepared(model)
    equalize_layers(made, found)
    plain = fold_weights(model, found)

    def loss(network: nn.Module) -> float:
        rounded = copy.deepcopy(network)
        with torch.no_grad():
            for name in found.layers:
                weight = rounded.get_submodule(name).weight
                scale = weight.abs().max() / 31
                weight.copy_((weight / scale).round() * scale)
            return float((rounded(noise()) - model(noise())).square().mean())

    assert loss(made) < 0.5 * loss(plain)


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
def test_absorption_keeps_outputs_where_all_exceed_c(depthwise: bool, pooled: bool) -> None:
    second = nn.Conv2d(8, 16 if depthwise else 6, 3, groups=8 if depthwise else 1, bias=False)
    model = trained(*conv_bn(3, 8), nn.ReLU(), *([nn.AvgPool2d(2)] if pooled else []), second, nn.BatchNorm2d(second.out_channels))
    with torch.no_grad():
        model[1].bias.copy_(torch.linspace(2, 40, 8))
    made, found = prepared(model)
    bias = model[1].bias.detach()
    ((edge, c),) = absorb_biases(made, found).items()
    gamma = norm_vectors(model[1]).gamma.abs()
    torch.testing.assert_close(c, (bias - 3 * gamma).clamp(min=0), rtol=1e-3, atol=1e-4)
    assert (c > 0).sum() >= 6
    x = 0.1 * noise()
    with torch.no_grad():
        assert (model[1](model[0](x)).amin((0, 2, 3)) > c).all()
        torch.testing.assert_close(made(x), model(x), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(norm_vectors(made[1]).beta, bias - c)
    assert edge.second == str(len(model) - 2)


def test_absorption_without_rectifier_takes_the_whole_mean() -> None:
    model = trained(*conv_bn(3, 8), conv(8, 6, 1))
    made, found = prepared(model)
    (c,) = absorb_biases(made, found).values()
    assert torch.equal(c, model[1].bias) and not norm_vectors(made[1]).beta.any()
    with torch.no_grad():
        close(made(noise()), model(noise()))


def test_absorption_needs_statistics_before_and_a_bias_behind() -> None:
    model = trained(*conv_bn(3, 8), nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False), nn.ReLU(), conv(4, 6))
    assert absorb_biases(*prepared(model)) == {}
    model[3].bias = nn.Parameter(torch.zeros(4))
    assert [edge.first for edge in absorb_biases(*prepared(model))] == ["0"]


def test_activation_range_shrinks_with_absorption() -> None:
    """What absorption is for: less range of activations to cover."""
    model = trained(*conv_bn(3, 8), nn.ReLU(), nn.Conv2d(8, 6, 1))
    with torch.no_grad():
        model[1].bias.add_(20.0)
    made, found = prepared(model)
    absorb_biases(made, found)
    with torch.no_grad():
        assert made[:3](noise()).max() < 0.6 * model[:3](noise()).max()
        close(made(0.1 * noise()), model(0.1 * noise()))
