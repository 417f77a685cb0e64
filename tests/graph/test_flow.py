"""Layers and their surroundings, exactly as the tiny networks have them, and awkward networks read or refused."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datafree.context import Ctx
from datafree.errors import FlowError, NetworkError
from datafree.graph.flow import Flow, Layer, flow, read
from networks import NAMES, build
from networks import Scripted as Net

# name: norm, activation; "^" in front of the first layer, "$" in front of the last.
EXPECTED = {
    "cifar_resnet": """
        ^conv1 bn1 relu, layer1.0.conv1 layer1.0.bn1 relu, layer1.0.conv2 layer1.0.bn2 -, layer1.1.conv1 layer1.1.bn1 relu,
        layer1.1.conv2 layer1.1.bn2 -, layer2.0.conv1 layer2.0.bn1 relu, layer2.0.conv2 layer2.0.bn2 -, $linear - -""",
    "resnet_basic": """
        ^conv1 bn1 relu, layers.0.conv1 layers.0.bn1 relu, layers.0.conv2 layers.0.bn2 -,
        layers.1.downsample.0 layers.1.downsample.1 -, layers.1.conv1 layers.1.bn1 relu, layers.1.conv2 layers.1.bn2 -, $fc - -""",
    "resnet_bottleneck": """
        ^conv1 bn1 relu, layers.0.conv1 layers.0.bn1 relu, layers.0.conv2 layers.0.bn2 relu, layers.0.conv3 layers.0.bn3 -,
        layers.0.downsample.0 layers.0.downsample.1 -, layers.1.conv1 layers.1.bn1 relu, layers.1.conv2 layers.1.bn2 relu,
        layers.1.conv3 layers.1.bn3 -, layers.1.downsample.0 layers.1.downsample.1 -, $fc - -""",
    "densenet": """
        ^conv0 norm0 relu, block.0.conv1 block.0.norm2 relu, block.0.conv2 - -, block.1.conv1 block.1.norm2 relu, block.1.conv2 - -,
        transition - -, $classifier - -""",
    "mobilenet": """
        ^0.0 0.1 hardtanh, 1.conv.0.0 1.conv.0.1 hardtanh, 1.conv.1.0 1.conv.1.1 hardtanh, 1.conv.2 1.conv.3 -,
        2.conv.0.0 2.conv.0.1 hardtanh, 2.conv.1.0 2.conv.1.1 hardtanh, 2.conv.2 2.conv.3 -,
        3.conv.0.0 3.conv.0.1 hardtanh, 3.conv.1.0 3.conv.1.1 hardtanh, 3.conv.2 3.conv.3 -, 4.0 4.1 hardtanh, $8 - -""",
    "vgg": "^0 1 relu, 3 4 relu, 7 8 prelu, 10 11 leaky_relu, 15 - relu, $17 - -",
    "twice": "^stem stem_bn relu, conv bn relu, left shared relu, right shared relu, $fc - -",
    "branching": "^a bn_a relu, b bn_b silu, $fc - -",
    "grouped": """
        ^stem.0 stem.1 hardswish, grouped.0 grouped.1 relu, depthwise.0 depthwise.1 relu, up.0 up.1 gelu, gate.1 - sigmoid, $head - -""",
    "sequence": "^0 1 relu, 3 4 elu, 6 7 relu, $11 - -",
    "without_norm": "^0 - relu, 2 - relu, 4 - relu, $7 - -",
    "transformer": """
        ^patch - -, blocks.0.qkv - -, blocks.0.proj - -, blocks.0.fc1 - gelu, blocks.0.fc2 - -,
        blocks.1.qkv - -, blocks.1.proj - -, blocks.1.fc1 - gelu, blocks.1.fc2 - -, $head - -""",
}


def noise(*shape: int) -> Tensor:
    return torch.randn(2, *(shape or (3, 8, 8)), generator=torch.Generator().manual_seed(0))


def read_tiny(name: str) -> Flow:
    model, task = build(name)
    return flow(model, noise(*task.shape))


def told(layer: Layer) -> str:
    return f"{'^' * layer.first}{'$' * layer.last}{layer.name} {layer.norm or '-'} {layer.activation or '-'}"


def net(run: Callable[..., object], **parts: nn.Module) -> Net:
    return Net(run, a=nn.Conv2d(3, 4, 3, padding=1), b=nn.Conv2d(4, 2, 1), **parts).eval()


def followed(module: nn.Module, *behind: nn.Module) -> Flow:
    return flow(nn.Sequential(module, *behind, nn.Conv2d(4, 2, 1)).eval(), noise())


@pytest.mark.parametrize("name", NAMES)
def test_layers_norms_activations_and_edges(name: str) -> None:
    assert [told(layer) for layer in read_tiny(name).layers.values()] == [each.strip() for each in EXPECTED[name].split(",")]


@pytest.mark.parametrize("name", NAMES)
def test_the_parts_fit_together(name: str) -> None:
    model, task = build(name)
    found = flow(model, noise(*task.shape))
    for layer in found.layers.values():
        module = model.get_submodule(layer.name)
        assert layer.weight_shape == module.weight.shape and layer.kernel == module.weight.shape[2:]
        assert layer.weight_shape[layer.out_axis] * (layer.groups if layer.kind == "conv_transpose" else 1) == (
            module.out_features if isinstance(module, nn.Linear) else module.out_channels
        )
        assert len(found.calls_of[layer.name]) == len(layer.calls)
        for call, source in zip(layer.calls, found.data(layer.name), strict=True):
            assert found.nodes[call].op == layer.kind and found.nodes[call].module == layer.name
            assert found.layer_at[call] == layer.name and call in found.consumers[source]
    for node in found.nodes:
        assert all(node.index in found.nodes[each].inputs for each in found.consumers[node.index])


def test_kinds_groups_and_calls() -> None:
    grouped, twice = read_tiny("grouped").layers, read_tiny("twice").layers
    assert [layer.kind for layer in grouped.values()] == ["conv"] * 3 + ["conv_transpose"] + ["conv"] * 2
    assert [layer.groups for layer in grouped.values()] == [1, 4, 16, 2, 1, 1]
    assert [layer.name for layer in grouped.values() if layer.depthwise] == ["depthwise.0"]
    assert [layer.name for layer in grouped.values() if not layer.scale_per_output] == ["up.0"]
    assert [len(layer.calls) for layer in twice.values()] == [1, 2, 1, 1, 1]
    assert read_tiny("transformer").layers["head"].kind == "linear" and read_tiny("transformer").layers["head"].kernel == ()


def test_the_origin_of_a_moved_value() -> None:
    found = read_tiny("mobilenet")
    (data,) = found.data("8")
    assert [found.nodes[data].op, found.nodes[found.origin(data)].op] == ["flatten", "adaptive_avg_pool"]


def test_read_names_what_stays_float_and_is_repeatable() -> None:
    model, task = build("branching")
    found = read(model, task, Ctx.create())
    assert dict(found.floats) == {"unused": "its forward was not called"}
    assert read(model, task, Ctx.create(seed=7)).layers == found.layers


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1)), "its weight is computed on the fly"),
        (nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 1)), "its weight is computed on the fly"),
        (nn.utils.spectral_norm(nn.Conv2d(3, 4, 1)), "its weight is computed on the fly"),
    ],
)
def test_computed_weights_stay_float(module: nn.Module, reason: str) -> None:
    found = followed(module)
    assert list(found.layers) == ["1"] and reason in found.floats["0"] and found.layers["1"].first is False


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias)


class Fixed(nn.Conv2d):
    """Its weight is a buffer."""

    def __init__(self) -> None:
        super().__init__(3, 4, 1)
        weight = self.weight.detach()
        del self.weight
        self.register_buffer("weight", weight)


class HalfBias(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight) + self.bias.view(-1, 1, 1) / 2


@pytest.mark.parametrize("kind", [Standardised, Fixed, HalfBias])
def test_layers_with_a_forward_of_their_own_stay_float(kind: Callable[..., nn.Module]) -> None:
    found = followed(kind() if kind is Fixed else kind(3, 4, 1))
    assert list(found.layers) == ["1"] and list(found.floats) == ["0"]


def test_padding_modes_and_string_padding_are_plain_layers() -> None:
    for options in ({"padding_mode": "circular", "padding": 1}, {"padding_mode": "reflect", "padding": 1}, {"padding": "same"}):
        found = followed(nn.Conv2d(3, 4, 3, **options), nn.BatchNorm2d(4), nn.ReLU())
        assert [told(layer) for layer in found.layers.values()] == ["^0 1 relu", "$3 - -"]
        assert found.origin(found.data("0")[0]) == 0


def test_reasons_for_layers_that_are_not_on_the_tape() -> None:
    mixing = flow(
        net(lambda self, x: self.b(self.a(x)) + self.mix(t := x.mean((2, 3))[None], t, t)[0].mean(), mix=nn.MultiheadAttention(3, 1)),
        noise(),
    )
    assert "another operation uses its weight" in mixing.floats["mix.out_proj"]
    constant = flow(net(lambda self, x: self.b(self.a(x)) + self.c(torch.ones(1, 1, 8, 8)), c=nn.Conv2d(1, 2, 1)), noise())
    assert "does not depend on the network's input" in constant.floats["c"]
    mapped = net(lambda self, x: self.c(x) + torch.vmap(lambda each: self.b(self.a(each[None]))[0])(x), c=nn.Conv2d(3, 2, 1))
    assert "through operations that can be followed" in flow(mapped, noise()).floats["a"]


def test_a_shared_norm_a_norm_called_twice_and_affine_free_norms() -> None:
    shared = flow(net(lambda self, x: self.norm(self.b(self.norm(self.b(self.a(x))).repeat(1, 2, 1, 1))), norm=nn.BatchNorm2d(2)), noise())
    assert shared.layers["b"].norm == "norm" and shared.layers["a"].norm is None
    double = flow(net(lambda self, x: self.b(self.norm(self.norm(self.a(x)))), norm=nn.BatchNorm2d(4)), noise())
    assert double.layers["a"].norm == "norm"
    assert followed(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False)).layers["0"].norm == "1"
    assert followed(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)).layers["0"].norm is None


@pytest.mark.parametrize(
    "run",
    [
        lambda self, x: (self.b(self.norm(h := self.a(x)).relu()), h),  # an output as well
        lambda self, x: self.b(self.norm(h := self.a(x)).relu()) + h.mean(),
        lambda self, x: self.b(self.norm(h := self.a(x)).relu()) * float(h.mean()),  # gone to Python
        lambda self, x: self.b(self.norm(self.a(x) * 2).relu()),
    ],
)
def test_a_norm_that_is_not_alone_is_none(run: Callable[..., object]) -> None:
    layer = flow(net(run, norm=nn.BatchNorm2d(4)), noise()).layers["a"]
    assert layer.norm is None and layer.activation is None


def test_an_activation_that_is_not_alone_is_none() -> None:
    assert flow(net(lambda self, x: (self.b((h := self.a(x)).relu()), h)), noise()).layers["a"].activation is None
    assert flow(net(lambda self, x: self.b((h := self.a(x)).relu() + h)), noise()).layers["a"].activation is None
    assert flow(net(lambda self, x: self.b(self.a(x).relu())), noise()).layers["a"].activation == "relu"


def test_a_batch_norm_over_tokens_is_not_that_of_a_linear_layer() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(64, 3), nn.BatchNorm1d(3), nn.Linear(9, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.norm(self.a(x.flatten(2))).flatten(1))

    assert flow(Tokens().eval(), noise()).layers["a"].norm is None


def test_layers_called_several_times_and_under_two_names() -> None:
    class Alias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = self.b = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    found = flow(Alias(), noise())
    assert list(found.layers) == ["a"] and len(found.layers["a"].calls) == 2
    assert found.layers["a"].first and found.layers["a"].last


def test_several_heads_and_a_bare_layer() -> None:
    heads = flow(net(lambda self, x: {"one": self.b(h := self.a(x).relu()), "two": [self.c(h)]}, c=nn.Conv2d(4, 3, 1)), noise())
    assert [told(layer) for layer in heads.layers.values()] == ["^a - relu", "$b - -", "$c - -"] and len(heads.outputs) == 2
    assert [told(layer) for layer in flow(nn.Conv2d(3, 4, 1), noise()).layers.values()] == ["^$ - -"]


def test_wrappers_are_transparent() -> None:
    inner = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    assert [told(layer) for layer in flow(nn.DataParallel(inner), noise()).layers.values()] == ["^module.0 module.1 relu", "$module.3 - -"]


@torch.jit.ignore
def doubled(x: Tensor) -> Tensor:
    return torch.from_numpy(x.numpy() * 2)


@pytest.mark.parametrize(
    "run",
    [
        lambda self, x: self.b(doubled(self.a(x))),
        lambda self, x: self.b(doubled(self.a(x).relu())).relu(),
        lambda self, x: doubled(self.b(self.a(x))),
    ],
)
def test_a_value_lost_in_unseen_code_is_refused_with_the_layer(run: Callable[..., object]) -> None:
    with pytest.raises(FlowError, match="what layer 'a' computes never reaches the output"):
        flow(net(run), noise())


def test_networks_without_layers_are_refused_with_the_reasons() -> None:
    with pytest.raises(NetworkError, match="no convolution or linear layer that can be quantized$"):
        flow(nn.ReLU(), noise())
    with pytest.raises(NetworkError, match="can be quantized; a: its forward was not called; b: its forward was not called"):
        flow(net(lambda self, x: x * 2), noise())
