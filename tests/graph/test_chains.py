"""Chains, roles and pairs: figure 2 of DF-MPC on the tiny networks."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from datafree.graph.chains import Chain, Pair, chains, pairs, roles
from datafree.graph.flow import Flow, flow
from networks import NAMES, build

PAIRS = {
    "cifar_resnet": [(f"{block}.conv1", f"{block}.conv2") for block in ("layer1.0", "layer1.1", "layer2.0")],
    "resnet_basic": [("layers.0.conv1", "layers.0.conv2"), ("layers.1.conv1", "layers.1.conv2")],
    "resnet_bottleneck": [("layers.0.conv2", "layers.0.conv3"), ("layers.1.conv2", "layers.1.conv3")],
    "densenet": [("block.0.conv2", None), ("block.1.conv2", None)],
    "mobilenet": [(f"{block}.conv.0.0", f"{block}.conv.1.0") for block in "123"],
    "vgg": [("3", "7"), ("10", "15")],
    "twice": [],
    "branching": [],
    "grouped": [],
    "sequence": [("3", "6")],
    "without_norm": [("2", "4")],
    "transformer": [("blocks.0.fc1", "blocks.0.fc2"), ("blocks.1.fc1", "blocks.1.fc2")],
}


class Net(nn.Module):
    def __init__(self, run: Callable[..., object]):
        super().__init__()
        self.run = run
        for name in "abcdef":
            self.add_module(name, nn.Conv2d(3, 3, 3, padding=1))

    def forward(self, x: Tensor) -> object:
        return self.run(self, x)


def read(run: Callable[..., object]) -> Flow:
    return flow(Net(run), torch.zeros(2, 3, 8, 8))


def read_tiny(name: str) -> Flow:
    model, task = build(name)
    return flow(model, torch.zeros(2, *task.shape))


@pytest.mark.parametrize("name", NAMES)
def test_pairs(name: str) -> None:
    found = read_tiny(name)
    assert [(pair.low, pair.high) for pair in pairs(found)] == PAIRS[name]
    low = [name for name, role in roles(found).items() if role == "low"]
    assert low == [pair.low for pair in pairs(found)] and list(roles(found)) == list(found.layers)


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_is_in_one_chain(name: str) -> None:
    found = read_tiny(name)
    assert sorted(each for chain in chains(found) for each in chain.layers) == sorted(found.layers)
    given = roles(found)
    for layer in found.layers.values():
        if layer.first or layer.last or layer.depthwise or not layer.scale_per_output:
            assert given[layer.name] == "high"
    assert all(pair.high is None or given[pair.high] == "high" for pair in pairs(found))


def test_chains_and_their_ends() -> None:
    assert chains(read_tiny("resnet_bottleneck")) == (
        Chain(("conv1",), "branch"),
        Chain(("layers.0.conv1", "layers.0.conv2", "layers.0.conv3"), "add"),
        Chain(("layers.0.downsample.0",), "add"),
        Chain(("layers.1.conv1", "layers.1.conv2", "layers.1.conv3"), "add"),
        Chain(("layers.1.downsample.0",), "add"),
        Chain(("fc",), "output"),
    )
    assert [chain.end for chain in chains(read_tiny("densenet"))] == ["cat", "cat", "cat", "output"]
    assert [len(chain.layers) for chain in chains(read_tiny("twice"))] == [1] * 5


@pytest.mark.parametrize(("names", "low"), [("a", ""), ("ab", ""), ("abc", ""), ("abcd", "b"), ("abcde", "b"), ("abcdef", "bd")])
def test_plain_networks_alternate_and_end_high(names: str, low: str) -> None:
    def run(self: Net, x: Tensor) -> Tensor:
        for name in names:
            x = self.get_submodule(name)(x)
        return x

    assert "".join(pair.low for pair in pairs(read(run))) == low


@pytest.mark.parametrize(
    ("run", "ends"),
    [
        (lambda self, x: (self.b(h := self.a(x)), h), ["branch", "output"]),  # an output breaks a chain
        (lambda self, x: self.b(self.a(x) * x.sigmoid()), ["other", "output"]),
        (lambda self, x: self.b(self.a(x).softmax(1)), ["other", "output"]),
        (lambda self, x: self.c(self.a(x) - self.b(x)), ["add", "add", "output"]),
        (lambda self, x: self.b(self.a(x)) * float(x.sum()), ["other"]),
        (lambda self, x: self.b(x[:, :1].expand_as(self.a(x))), ["other", "output"]),  # only a shape is taken from a
        (lambda self, x: self.b(self.b(self.a(x))), ["other", "other"]),  # a layer called twice
    ],
)
def test_what_ends_a_chain(run: Callable[..., object], ends: list[str]) -> None:
    found = chains(read(run))
    assert [chain.end for chain in found] == ends or [len(chain.layers) for chain in found] == [2]
    assert pairs(read(run)) == ()


def test_moves_pools_and_activations_do_not_end_a_chain() -> None:
    def run(self: Net, x: Tensor) -> Tensor:
        h = nn.functional.max_pool2d(self.a(x).relu(), 2)
        h = self.c(nn.functional.dropout(self.b(h).flip(3).contiguous(), training=False).tanh())
        return self.d(nn.functional.interpolate(h, scale_factor=2)).mean((2, 3))

    assert chains(read(run)) == (Chain(("a", "b", "c", "d"), "output"),)
    assert pairs(read(run)) == (Pair("b", "c"),)
