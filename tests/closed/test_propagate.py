import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datafree.closed.moments import Moments, outputs_first, tap_correlation, window_maximum
from datafree.closed.propagate import layer_inputs, node_moments
from datafree.errors import NetworkError
from datafree.graph.flow import Flow, flow
from tests.networks import NAMES, build

SIZE = 4


class Net(nn.Module):
    """Batch norms on the two independent halves of the input, an operation on them, and a layer to make it a network."""

    def __init__(self, operation: Callable[..., Tensor], norm: bool = True):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.one, self.two = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.operation = operation
        for each in (self.one, self.two) if norm else ():
            each.weight.data = torch.randn(4, generator=generator) + 0.3
            each.bias.data = torch.randn(4, generator=generator)
        self.scale = nn.Parameter(torch.tensor([0.5, -2.0, 0.0, 1.0]).view(4, 1, 1))
        self.slopes = nn.Parameter(torch.tensor([0.1, 0.5, 1.0, 0.0]))
        self.last = nn.LazyLinear(2)

    def middle(self, x: Tensor) -> Tensor:
        one, two = x.chunk(2, dim=1)
        return self.operation(self, self.one(one), self.two(two))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(x).flatten(1))


def correlated(samples: int, channels: int, size: int, generator: torch.Generator) -> Tensor:
    """Standard normal pictures whose pixels correlate by 0.6 to the L1 distance."""
    factor = torch.linalg.cholesky(tap_correlation((size, size)).double()).float()
    return (torch.randn(samples, channels, size * size, generator=generator) @ factor.T).view(samples, channels, size, size)


def read(model: nn.Module, shape: tuple[int, ...]) -> Flow:
    with torch.no_grad():
        model.eval()(torch.zeros(1, *shape))  # lazy layers take their shape
    return flow(model.requires_grad_(False), torch.zeros(1, *shape))


def before_last(net: Net) -> Moments:
    """What the operation gives, in its own shape: the node that the last layer's flatten takes."""
    found = read(net, (8, SIZE, SIZE))
    index = found.nodes[found.data("last")[0]].inputs[0]
    return node_moments(found, net, [index])[index]


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "relu": lambda net, a, b: F.relu(a),
    "relu in place": lambda net, a, b: a.relu_() + b,
    "relu6": lambda net, a, b: F.relu6(3 * a + 2),
    "hardtanh": lambda net, a, b: F.hardtanh(a, -0.5, 1.5),
    "clamp": lambda net, a, b: a.clamp(max=0.5),
    "silu": lambda net, a, b: F.silu(a),
    "gelu": lambda net, a, b: F.gelu(a),
    "hardswish": lambda net, a, b: F.hardswish(a),
    "hardswish in place": lambda net, a, b: F.hardswish(a, inplace=True) + F.sigmoid(b),
    "prelu": lambda net, a, b: F.prelu(a, net.slopes),
    "add": lambda net, a, b: F.relu(a) + b,
    "add with alpha": lambda net, a, b: torch.add(a, b, alpha=-0.5),
    "add in place": lambda net, a, b: a.add_(b).sub_(1),
    "add to itself": lambda net, a, b: a + a,
    "sub": lambda net, a, b: a - F.relu(b),
    "from a number": lambda net, a, b: 1 - a,
    "rsub": lambda net, a, b: torch.rsub(a, b, alpha=2),
    "neg": lambda net, a, b: -a + 2,
    "scale": lambda net, a, b: net.scale * a + net.scale,
    "div": lambda net, a, b: a / 3,
    "product": lambda net, a, b: a * b.sigmoid(),
    "square": lambda net, a, b: a * a,
    "power": lambda net, a, b: a**2,
    "cat": lambda net, a, b: torch.cat((a, F.relu(b)), 1),
    "cat with constant": lambda net, a, b: torch.cat((net.scale.expand(a.shape), a), 1),
    "cat with zeros": lambda net, a, b: torch.cat((torch.zeros_like(a), a), 1),
    "stack": lambda net, a, b: torch.stack((a, b), 1),
    "pad": lambda net, a, b: F.pad(a, (1, 0, 0, 2), value=3.0),
    "shortcut": lambda net, a, b: F.pad(a[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)) + 1,
    "shuffle": lambda net, a, b: a.view(-1, 2, 2, SIZE, SIZE).transpose(1, 2).reshape(a.shape),
    "unsqueeze in place": lambda net, a, b: a.unsqueeze_(1) + 0,
    "split": lambda net, a, b: a.split(1, 1)[2] + b,
    "dropout": lambda net, a, b: F.dropout(a, 0.5, training=False),
    "upsample": lambda net, a, b: F.interpolate(a, scale_factor=2, mode="nearest"),
    "roll": lambda net, a, b: torch.roll(a, 1, 1),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_rules_equal_sampled_moments(name: str) -> None:
    net = Net(OPERATIONS[name])
    found = before_last(net)
    x = torch.randn(4000, 8, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        values = net.middle(x)
    assert found.known and found.mean.shape == found.var.shape == (1, *values.shape[1:])
    spread = 0.05 * float(values.std())
    assert torch.allclose(found.mean[0], values.mean(0), atol=2.5 * spread, rtol=0.05)
    assert torch.allclose(found.var[0].sqrt(), values.std(0), atol=2 * spread, rtol=0.15)
    assert (found.mean[0] - values.mean(0)).abs().mean() < spread / 2


def test_sides_of_sums_may_correlate() -> None:
    net = Net(lambda net, a, b: (a - 2 * b) + a)
    found = read(net, (8, SIZE, SIZE))
    index = found.nodes[found.data("last")[0]].inputs[0]
    (m1, s1), (m2, s2) = ((each.bias, each.weight.abs()) for each in (net.one, net.two))
    for correlation, sd in ((0.0, (2 * s1**2 + 4 * s2**2).sqrt()), (1.0, 2 * s1 + 2 * s2)):
        moments = node_moments(found, net, [index], correlation)[index]
        assert torch.allclose(moments.mean[0, :, 0, 0], 2 * (m1 - m2), atol=1e-5)
        assert torch.allclose(moments.var[0, :, 0, 0].sqrt(), sd, rtol=1e-4)


def test_products_of_independent_values_are_exact() -> None:
    net = Net(lambda net, a, b: a * b)
    found = before_last(net)
    (m1, s1), (m2, s2) = ((each.bias, each.weight) for each in (net.one, net.two))
    assert torch.allclose(found.mean[0, :, 0, 0], m1 * m2, rtol=1e-4)
    assert torch.allclose(found.var[0, :, 0, 0], (m1**2 + s1**2) * (m2**2 + s2**2) - (m1 * m2) ** 2, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", OPERATIONS)
def test_asking_for_all_nodes_at_once_gives_each_its_shape(name: str) -> None:
    net = Net(OPERATIONS[name])
    found = read(net, (8, SIZE, SIZE))
    asked = [node for node in found.nodes if node.shape]
    moments = node_moments(found, net, [node.index for node in asked])
    alone = {node.index: node_moments(found, net, [node.index])[node.index] for node in asked}
    for node in asked:
        assert moments[node.index].mean.shape == moments[node.index].var.shape == node.shape
        assert torch.equal(moments[node.index].mean, alone[node.index].mean)


def test_functions_with_a_parameter_per_channel_see_all_channels() -> None:
    net = nn.Sequential(nn.PReLU(3), nn.Conv2d(3, 2, 1))
    net[0].weight.data = torch.tensor([1.0, -1.0, 0.0])
    moments = layer_inputs(read(net, (3, 4, 4)), net)["1"]
    half = (2 / torch.pi) ** 0.5
    assert torch.allclose(moments.mean, torch.tensor([0, half, half / 2]), atol=2 * 6e-4)  # the slope changes by up to 2
    assert torch.allclose(moments.var, torch.tensor([1, 1 - half**2, 0.5 - half**2 / 4]), atol=3e-3)


def test_averages_keep_mean_and_variance() -> None:
    for operation in (
        lambda net, a, b: F.avg_pool2d(F.relu(a), 2),
        lambda net, a, b: F.adaptive_avg_pool2d(F.relu(a), 1),
        lambda net, a, b: F.relu(a).mean((2, 3)),
    ):
        found, before = before_last(Net(operation)), before_last(Net(OPERATIONS["relu"]))
        for after, given in ((found.mean, before.mean), (found.var, before.var)):
            assert torch.allclose(after.flatten(2).mean(-1) if after.dim() > 2 else after, given[:, :, 0, 0], rtol=1e-5)


@pytest.mark.parametrize("activation", [lambda x: x, F.relu, F.relu6])
def test_max_pool_equals_sampled_moments(activation: Callable[[Tensor], Tensor]) -> None:
    net = Net(lambda net, a, b: F.max_pool2d(activation(a), 3, stride=2, padding=1))
    found = before_last(net)
    with torch.no_grad():
        values = net.middle(correlated(20_000, 8, SIZE, torch.Generator().manual_seed(2)))
    inner = values[:, :, 1, 1]  # a window that does not touch the border
    # The documented error of the approximation, in units of the spread before the maximum, and 4 standard errors.
    unit, noise = net.one.weight.abs(), 4 * inner.std(0) / len(inner) ** 0.5
    assert ((found.mean[0, :, 1, 1] - inner.mean(0)).abs() <= 0.04 * unit + noise).all()
    assert ((found.var[0, :, 1, 1].sqrt() - inner.std(0)).abs() <= 0.015 * unit + noise).all()


@pytest.mark.parametrize(
    ("kernel", "of_mean", "of_var"),
    [((1,), 0, 0), ((1, 1), 0, 0), ((3,), 0.04, 0.015), ((2, 2), 0.04, 0.015), ((3, 3), 0.04, 0.015), ((7, 7), 0.08, 0.03)],
)
def test_window_maximum_errs_no_more_than_documented(kernel: tuple[int, ...], of_mean: float, of_var: float) -> None:
    samples, sd = 100_000, 2.0
    factor = torch.linalg.cholesky(tap_correlation(kernel).double())
    taps = torch.randn(samples, len(factor), generator=torch.Generator().manual_seed(3), dtype=torch.float64) @ factor.T
    largest = (0.5 + sd * taps).max(1).values
    mean, var = window_maximum(torch.tensor(0.5), torch.tensor(sd), kernel)
    noise = 4 * float(largest.std()) / samples**0.5
    assert abs(float(mean - largest.mean())) <= of_mean * sd + noise
    assert abs(float(var - largest.var())) <= of_var * sd**2 + 2 * float(largest.std()) * noise


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv": (nn.Conv2d(4, 3, 3), (4, 3, 3)),
    "conv1d": (nn.Conv1d(4, 3, 2), (4, 2)),
    "grouped": (nn.Conv2d(4, 6, 2, groups=2), (4, 2, 2)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4, bias=False), (4, 3, 3)),
    "transposed": (nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (4, 2, 2)),
    "linear": (nn.Linear(4, 3), (4,)),
    "tokens": (nn.Linear(4, 3), (5, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_without_norm_equal_sampled_moments(name: str) -> None:
    layer, shape = copy.deepcopy(LAYERS[name])
    generator = torch.Generator().manual_seed(4)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    x = torch.randn(50_000, *shape, generator=generator)
    if len(shape) > 1 and name != "tokens":
        factor = torch.linalg.cholesky(tap_correlation(shape[1:]).double()).float()
        x = (x.flatten(2) @ factor.T).view(x.shape)
    found = read(nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(1)), shape)
    index = found.layers["0"].calls[0]
    moments = node_moments(found, nn.Sequential(layer), [index])[index]
    with torch.no_grad():
        values = layer(x)
    assert torch.allclose(moments.mean[0], values.mean(0), atol=0.03 * float(values.std()))
    # A position of a strided transposed convolution sees only some taps: the average over positions is meant.
    axis = values.dim() - 1 if isinstance(layer, nn.Linear) else 1
    sampled = values.var(0, keepdim=True).movedim(axis, 0).flatten(1).mean(1)
    assert torch.allclose(moments.var.movedim(axis, 0).flatten(1).mean(1), sampled, rtol=0.03)


def test_outputs_first_is_the_same_layer() -> None:
    layer = nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False)
    x = torch.randn(1, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    same = F.conv2d(x, outputs_first(layer.weight, 2).flip(2, 3), padding=2, groups=2)
    assert torch.allclose(same, layer(x), atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_network(name: str) -> None:
    net, task = build(name)
    net.eval().requires_grad_(False)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    found = flow(net, task.noise(2, torch.Generator().manual_seed(0)))
    inputs = layer_inputs(found, net)
    assert list(inputs) == list(found.layers)
    for layer, moments in inputs.items():
        of = net.get_submodule(layer)
        channels = of.in_features if isinstance(of, nn.Linear) else of.in_channels
        assert moments.mean.shape == moments.var.shape == (channels,)
        assert torch.isfinite(moments.mean).all() and (moments.var >= 0).all() and moments.var.max() > 0
        assert moments.known or name == "transformer"
    for node in found.nodes:
        if node.shape:
            moments = node_moments(found, net, [node.index])[node.index]
            assert moments.mean.shape == moments.var.shape == node.shape, node
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_first_layer_sees_a_normalised_input_and_others_what_their_norm_gives() -> None:
    net, task = build("cifar_resnet")
    inputs = layer_inputs(found := flow(net.eval().requires_grad_(False), torch.zeros(1, *task.shape)), net)
    assert torch.equal(inputs["conv1"].mean, torch.zeros(3)) and torch.equal(inputs["conv1"].var, torch.ones(3))
    norm = net.get_submodule(found.layers["layer1.0.conv1"].norm or "")
    sampled = F.relu(norm.bias + norm.weight * torch.randn(100_000, 8, generator=torch.Generator().manual_seed(0)))  # type: ignore[operator]
    assert torch.allclose(inputs["layer1.0.conv2"].mean, sampled.mean(0), atol=0.02)
    assert torch.allclose(inputs["layer1.0.conv2"].var, sampled.var(0), rtol=0.03)


def test_what_stands_before_a_norm_is_not_computed() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    found = read(net, (3, 5, 5))
    net[0].weight = nn.Parameter(torch.zeros(1), requires_grad=False)  # a convolution with it would raise
    index = found.data("3")[0]
    assert torch.allclose(node_moments(found, net, [index])[index].mean, torch.tensor(0.3989), atol=1e-4)


def test_a_channel_that_never_moves_has_no_variance() -> None:
    net = nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1))
    net[0].running_var.copy_(torch.tensor([0.0, 1.0]))
    assert layer_inputs(read(net, (2, 3, 3)), net)["1"].var.tolist() == pytest.approx([0, 1], rel=1e-4)


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True), nn.InstanceNorm2d(4)])
def test_other_norms(norm: nn.Module) -> None:
    weight = torch.tensor([1.0, -2.0, 0.0, 3.0]) if len(list(norm.parameters())) else torch.ones(4)
    bias = weight - 1
    for parameter, values in zip(norm.parameters(), (weight, bias), strict=False):
        parameter.data = values
    net = nn.Sequential(norm, nn.Conv2d(4, 2, 1))
    moments = layer_inputs(read(net, (4, 3, 3)), net)["1"]
    assert torch.equal(moments.mean, bias) and torch.equal(moments.var, weight**2)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.again, self.last = nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        mixed = F.relu(2 * torch.softmax(self.qkv(self.norm(x)), -1) + x)
        x = x + self.proj(mixed)
        return self.last(self.again(x))


def test_the_unknown_spreads_up_to_the_next_norm() -> None:
    net = Tokens()
    net.again.bias.data.fill_(0.5)
    inputs = layer_inputs(read(net, (3, 4)), net)
    assert {name: moments.known for name, moments in inputs.items()} == {"qkv": True, "proj": False, "last": True}
    assert torch.equal(inputs["last"].mean, torch.full((4,), 0.5))
    assert torch.equal(inputs["proj"].mean, torch.zeros(4)) and torch.equal(inputs["proj"].var, torch.ones(4))


def test_roots_of_normal_values_are_unknown() -> None:
    assert not before_last(Net(lambda net, a, b: a**0.5)).known
    assert not before_last(Net(lambda net, a, b: a / b)).known


def test_a_layer_called_twice_sees_the_average() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            shifted = x + 3
            return self.layer(shifted) + self.layer(shifted) + self.layer(4 * x)

    net = Shared()
    moments = layer_inputs(read(net, (4, 3, 3)), net)["layer"]
    assert torch.allclose(moments.mean, torch.full((4,), 2.0)) and torch.allclose(moments.var, torch.full((4,), 6.0))


def test_deep_networks_need_no_deep_recursion() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3), *(nn.ReLU() for _ in range(1500)), nn.Linear(3, 2))
    assert layer_inputs(read(net, (3,)), net)[str(len(net) - 1)].known


def test_a_copy_with_other_weights_may_be_asked() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Conv2d(3, 2, 1))
    found, other = read(net, (2, 3, 3)), copy.deepcopy(net)
    other[0].bias.data += 5
    shift = layer_inputs(found, other)["1"].mean - layer_inputs(found, net)["1"].mean
    assert torch.allclose(shift, torch.full((3,), 5.0))


def test_tuples_are_refused() -> None:
    net = Net(OPERATIONS["split"])
    found = read(net, (8, SIZE, SIZE))
    index = next(node.index for node in found.nodes if node.op == "split")
    with pytest.raises(NetworkError, match="tuple of tensors"):
        node_moments(found, net, [index])
