"""Biases settle on what a runtime adds in its accumulator, and move by half of that at most."""

import copy

import pytest
import torch
from torch import Tensor, nn

from datafree.graph.flow import Flow, flow
from datafree.plan import LayerPlan, Plan, QSpec
from datafree.quant.insert import assign, codes_of, find_module, insert, quantizers, weight_quantizer
from datafree.quant.observe import observe
from datafree.quant.settle import input_quantizers, settle
from datafree.task import Task
from networks import NAMES, build

W4, A4 = QSpec(4, axis=0), QSpec(4, symmetric=False)
TASK = Task(shape=(3, 8, 8), classes=5)


class Net(nn.Module):
    """A norm of its own, a bias, a transposed convolution in groups, a shared norm, a float input."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 6, 2, 2, groups=2)
        self.left, self.right, self.shared = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)
        self.free, self.head = nn.Conv2d(4, 4, 1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(torch.relu(self.norm(self.own(x))))
        x = torch.relu(self.shared(self.left(x))) + torch.relu(self.shared(self.right(x)))
        return self.head(self.free(x).mean((2, 3)))


PLAN = Plan(
    {
        name: LayerPlan(QSpec(4, axis=1) if name == "up" else W4, None if name == "free" else A4)
        for name in ("own", "up", "left", "free", "head")
    }
)


@pytest.fixture
def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net()
        for norm in (model.norm, model.shared):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
        model(torch.randn(16, *TASK.shape))
    return model.eval()


def inputs() -> Tensor:
    return TASK.noise(8, torch.Generator().manual_seed(1))


def read(model: nn.Module) -> Flow:
    return flow(model, TASK.noise(2, torch.Generator().manual_seed(0)))


def student_of(model: nn.Module, plan: Plan = PLAN) -> nn.Module:
    student = insert(model, plan)
    observe(student, [inputs()], "minmax", TASK.run)
    return student


def tensor(model: nn.Module, name: str) -> Tensor:
    value = dict(model.named_parameters())[name]
    return value.detach()


def test_biases_end_on_the_grid(network: nn.Module) -> None:
    student = student_of(network)
    before = copy.deepcopy(student)
    settle(student, read(network))
    scale = {name: weight_quantizer(find_module(student, name)).scale.double() for name in PLAN.layers}
    step = {name: quantizers(student)[f"{name}:input"].scale.double() * scale[name] for name in PLAN.layers if name != "free"}
    assert isinstance(network, Net)
    factor = network.norm.weight.detach() / torch.sqrt(network.norm.running_var + network.norm.eps)
    folded = tensor(student, "norm.bias") + factor * (tensor(student, "own.bias") - network.norm.running_mean)
    for bias, each, moved in (
        (folded, step["own"] * factor.abs(), "norm.bias"),
        (tensor(student, "up.bias"), step["up"].repeat(2), "up.bias"),
        (tensor(student, "head.bias"), step["head"], "head.bias"),
    ):
        steps = bias.double() / each
        assert (steps - steps.round()).abs().max() < 1e-3
        change = (tensor(student, moved) - tensor(before, moved)).abs()
        assert 0 < change.max() and (change <= 0.5 * each * (1 + 1e-4) + 1e-7).all()


def test_all_else_is_left_alone(network: nn.Module) -> None:
    """Layers without a quantized input or weight, and a norm that serves two layers."""
    student = student_of(network)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    settle(student, read(network))
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"norm.bias", "up.bias", "head.bias"}
    per_channel = student_of(network, Plan({"head": LayerPlan(W4, QSpec(4, symmetric=False, axis=1))}))
    settle(per_channel, read(network))
    assert torch.equal(tensor(per_channel, "head.bias"), tensor(network, "head.bias"))


def test_settled_biases_stay(network: nn.Module) -> None:
    student = student_of(network)
    settle(student, read(network))
    before = {name: value.clone() for name, value in student.state_dict().items()}
    settle(student, read(network))
    assert all(torch.allclose(value, before[name], rtol=0, atol=1e-6) for name, value in student.state_dict().items())


def test_channels_of_zeros_take_the_steps_of_others(network: nn.Module) -> None:
    """Their own scale says nothing: at 1 it would round the bias to nothing, at 0 not at all."""
    assert isinstance(network, Net)
    network.norm.weight.data[2] = 0.0
    student = student_of(network)
    head, own = find_module(student, "head"), find_module(student, "own")
    codes, scale = codes_of(head), weight_quantizer(head).scale.clone()
    codes[1], scale[1] = 0, 100.0
    assign(head, codes, scale)
    bias = tensor(student, "head.bias").clone()
    settle(student, read(network))
    step = quantizers(student)["head:input"].scale * scale[[0, 2, 3, 4]].max()
    steps = tensor(student, "head.bias")[1] / step
    assert (steps - steps.round()).abs() < 1e-4 and (tensor(student, "head.bias")[1] - bias[1]).abs() <= step / 2
    factor = network.norm.weight.detach() / torch.sqrt(network.norm.running_var + network.norm.eps)
    largest = (quantizers(student)["own:input"].scale * weight_quantizer(own).scale * factor.abs()).max()
    steps = tensor(student, "norm.bias")[2] / largest
    assert (steps - steps.round()).abs() < 1e-4


def test_biases_beyond_32_bits_stay(network: nn.Module) -> None:
    student = student_of(network)
    head = find_module(student, "head")
    assign(head, codes_of(head), torch.full((5,), 1e-12))
    before = tensor(student, "head.bias").clone()
    settle(student, read(network))
    assert torch.equal(tensor(student, "head.bias"), before)


@pytest.mark.parametrize("name", NAMES)
def test_the_answer_hardly_changes(name: str) -> None:
    """Less than half a step of each layer: at 8 bits that is next to nothing."""
    model, task = build(name)
    network_flow = flow(model, task.noise(2, torch.Generator().manual_seed(0)))
    plan = Plan({layer: LayerPlan(QSpec(8, axis=each.out_axis), QSpec(8, symmetric=False)) for layer, each in network_flow.layers.items()})
    batch = task.noise(8, torch.Generator().manual_seed(0))
    student = insert(model, plan)
    observe(student, [batch], "minmax", task.run)
    with torch.no_grad():
        before = task.run(student, batch)
        settle(student, network_flow)
        after = task.run(student, batch)
    assert set(input_quantizers(network_flow, student)) == set(network_flow.layers)
    assert (after - before).abs().max() < 0.05 * before.std()


def test_which_quantizer_a_layer_reads(network: nn.Module) -> None:
    points = {"up:output": A4, "free:output": A4}
    student = student_of(network, Plan({"own": LayerPlan(W4, A4), "left": LayerPlan(W4, A4)}, points))
    found = input_quantizers(read(network), student)
    named = {id(quantizer): point for point, quantizer in quantizers(student).items()}
    assert {name: named[id(quantizer)] for name, quantizer in found.items()} == {
        "own": "own:input",
        "left": "left:input",
        "right": "up:output",
    }
