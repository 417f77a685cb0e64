"""Bits by protocol and role, and where activations are quantized."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datafree.bits.allocate import ActivationPoints, activation_points, make_plan, weight_widths
from datafree.context import Ctx, Event
from datafree.errors import TargetError
from datafree.graph.chains import roles
from datafree.graph.flow import Flow, Layer, flow
from datafree.plan import LayerPlan, QSpec, Target
from networks import NAMES, build


def tiny(name: str) -> tuple[nn.Module, Flow]:
    model, task = build(name)
    return model, flow(model, torch.randn(2, *task.shape, generator=torch.Generator().manual_seed(0)))


def spec(layer: Layer, bits: int) -> QSpec:
    return QSpec(bits, axis=layer.out_axis)


@pytest.mark.parametrize("name", NAMES)
def test_one_width(name: str) -> None:
    _, found = tiny(name)
    for protocol in ("paper", "dfmpc"):
        assert weight_widths(found, Target(3, protocol=protocol)) == dict.fromkeys(found.layers, 3)
    deployed = weight_widths(found, Target((3,)))
    assert deployed == {name: 8 if layer.first or layer.last or layer.depthwise else 3 for name, layer in found.layers.items()}
    assert list(deployed) == list(found.layers)


@pytest.mark.parametrize("name", NAMES)
def test_two_widths_follow_the_roles_in_either_order(name: str) -> None:
    _, found = tiny(name)
    by_role = {name: 2 if role == "low" else 6 for name, role in roles(found).items()}
    for protocol in ("paper", "dfmpc"):
        assert weight_widths(found, Target((2, 6), protocol=protocol)) == by_role
        assert weight_widths(found, Target((6, 2), protocol=protocol)) == by_role
    edges = {name: 8 for name, layer in found.layers.items() if layer.first or layer.last or layer.depthwise}
    assert weight_widths(found, Target((2, 6))) == {**by_role, **edges}


def test_float_shortcuts_quantize_only_what_layers_take_in() -> None:
    model, found = tiny("cifar_resnet")
    for protocol in ("paper", "deploy"):
        given = activation_points(found, model, Target(4, 4, protocol=protocol, float_shortcuts=True))
        assert given.elsewhere == {} and given.unreached == ()
        assert set(given.at_layers) >= {name for name in found.layers if name not in ("conv1", "linear")}


def test_kept_layers_are_absent_and_may_be_float_already() -> None:
    _, found = tiny("branching")
    assert list(weight_widths(found, Target(4, keep=("b", "unused")))) == ["a", "fc"]
    with pytest.raises(TargetError, match="nothing is left to quantize"):
        weight_widths(found, Target(4, keep=("a", "b", "fc")))


def test_unknown_names_are_refused_with_suggestions() -> None:
    _, found = tiny("resnet_basic")
    with pytest.raises(TargetError, match="no layer 'layers.0.conv' to quantize; did you mean .*layers.0.conv"):
        weight_widths(found, Target(4, keep=("layers.0.conv",)))
    with pytest.raises(TargetError, match="'bn1'.*did you mean"):
        weight_widths(found, Target(4, keep=("bn1",)))


@pytest.mark.parametrize("name", NAMES)
def test_no_activation_bits_no_points(name: str) -> None:
    model, found = tiny(name)
    for protocol in ("deploy", "paper", "dfmpc"):
        assert activation_points(found, model, Target(4, protocol=protocol)) == ActivationPoints({}, {}, ())


def test_deploy_on_a_residual_network() -> None:
    """Edges 8 bits, other inputs as asked; branches that enter a sum 8 bits, a trunk that feeds layers too as asked."""
    acts = activation_points(*tiny("resnet_basic")[::-1], Target(4, act_bits=4))
    assert acts.at_layers == {
        "conv1": 8,
        "layers.0.conv2": 4,
        "layers.1.conv1": 4,
        "layers.1.conv2": 4,
        "layers.1.downsample.0": 4,
    }
    assert acts.elsewhere == {
        "relu:output": 4,  # behind it a max pool, which quantizes as well
        "layers.0.bn2:output": 8,
        "layers.1.bn2:output": 8,
        "layers.1.downsample.1:output": 8,
        "layers.1:output": 4,  # enters the average pool
        "avgpool:output": 8,  # enters the last layer
    }
    assert acts.unreached == ()


def test_deploy_on_a_dense_network() -> None:
    """What layers put beside what came before is quantized, once: a layer with a float output would run in no integer kernel."""
    acts = activation_points(*tiny("densenet")[::-1], Target(4, act_bits=4))
    assert acts.elsewhere == {"block.0.conv2:output": 8, "block.1.conv2:output": 8}
    shortcuts = activation_points(*tiny("densenet")[::-1], Target(4, act_bits=4, float_shortcuts=True))
    assert shortcuts.elsewhere == {}


def test_paper_on_a_residual_network() -> None:
    """Behind activation functions only: neither the picture, nor the sums, nor what the pool makes."""
    acts = activation_points(*tiny("resnet_basic")[::-1], Target(4, act_bits=4, protocol="paper"))
    assert acts.at_layers == {"layers.0.conv2": 4, "layers.1.conv1": 4, "layers.1.conv2": 4, "layers.1.downsample.0": 4}
    assert acts.elsewhere == {"relu:output": 4, "layers.1:output": 4} and acts.unreached == ()


def test_paper_leaves_linear_bottlenecks_and_answers_alone() -> None:
    acts = activation_points(*tiny("mobilenet")[::-1], Target(4, act_bits=4, protocol="paper"))
    assert "3.conv.0.0" not in acts.at_layers and "8" not in acts.at_layers
    answered = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.ReLU())
    found = flow(answered, torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)))
    assert activation_points(found, answered, Target(4, act_bits=4, protocol="paper")) == ActivationPoints({"2": 4}, {}, ())


@pytest.mark.parametrize("name", NAMES)
def test_deploy_bits_are_those_asked_for_or_eight(name: str) -> None:
    model, found = tiny(name)
    acts = activation_points(found, model, Target(4, act_bits=5))
    assert set(acts.at_layers.values()) | set(acts.elsewhere.values()) <= {5, 8}
    for layer, bits in acts.at_layers.items():
        edge = found.layers[layer].first or found.layers[layer].last
        assert bits == (8 if edge else 5) or not edge


def test_kept_layers_read_floats() -> None:
    model, found = tiny("vgg")
    acts = activation_points(found, model, Target(4, act_bits=4, keep=("3", "0")))
    assert "3" not in acts.at_layers and "0" not in acts.at_layers and acts.at_layers["10"] == 4


class Net(nn.Module):
    def __init__(self, run: Callable[..., Tensor]):
        super().__init__()
        self.run, self.a, self.b, self.c = run, nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def test_what_cannot_be_reached_is_noted_once() -> None:
    def run(self: Net, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        h = F.relu(self.b(h) * h)
        return self.c(h) * h

    model = Net(run)
    found = flow(model, torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)))
    events: list[Event] = []
    plan = make_plan(found, model, Target(4, act_bits=4), spec, Ctx.create(on_event=events.append))
    assert [event.message for event in events] == [
        "activations that stay in float for some of their consumers: output of 'relu' in the forward of the network"
    ]
    assert {name: layer.input and layer.input.bits for name, layer in plan.layers.items()} == {"a": 8, "b": 4, "c": 8}


def test_moves_are_looked_through() -> None:
    """A functional ReLU that is padded by hand reaches the layer at the layer."""

    def run(self: Net, x: Tensor) -> Tensor:
        return self.c(self.b(F.pad(F.relu(self.a(x)), (1, 1)).flip(2)))

    model = Net(run)
    found = flow(model, torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)))
    acts = activation_points(found, model, Target(4, act_bits=4))
    assert acts == ActivationPoints({"a": 8, "b": 4, "c": 8}, {}, ())


def test_the_plan() -> None:
    model, found = tiny("without_norm")
    plan = make_plan(found, model, Target((2, 6), act_bits=4), spec, Ctx.create())
    eight = QSpec(8, symmetric=False)
    four = QSpec(4, symmetric=False)
    assert plan.layers == {
        "0": LayerPlan(QSpec(8, axis=0), eight),
        "2": LayerPlan(QSpec(2, axis=0), four),
        "4": LayerPlan(QSpec(6, axis=0), four),
        "7": LayerPlan(QSpec(8, axis=0), None),
    }
    assert plan.tensors == {"5:output": eight} and list(plan.layers) == list(found.layers)
    floats = make_plan(found, model, Target((2, 6), protocol="dfmpc"), spec, Ctx.create())
    assert not floats.tensors and all(layer.input is None for layer in floats.layers.values())
    assert [layer.weight.bits for layer in floats.layers.values()] == [6, 2, 6, 6]
