"""Noise layer by layer: against loops in float64, for every method, and where there is nothing to compare."""

import pytest
import torch
from torch import Tensor, nn

import datafree
from datafree.context import Ctx
from datafree.graph.flow import read
from datafree.measure.layers import BINS, WORST, LayerReport, layer_report
from datafree.plan import LayerPlan, Plan, QSpec
from datafree.quant.insert import insert
from datafree.task import Task
from datafree.zoo.digits import digits
from networks import NAMES, build
from test_contract import METHODS, quick

TASK = Task(shape=(3, 8, 8))
SPEC = QSpec(4, axis=0)


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    parts = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(80, 3))
    return nn.Sequential(*parts).eval()


def measured(model: nn.Module, student: nn.Module, inputs: Tensor, task: Task = TASK) -> LayerReport:
    return layer_report(model, student, read(model, task, Ctx.create()), task, inputs, "noise")


def noise(n: int, task: Task = TASK) -> Tensor:
    return task.noise(n, torch.Generator().manual_seed(1))


def test_errors_are_those_of_a_loop(model: nn.Sequential) -> None:
    plan = Plan({name: LayerPlan(SPEC) for name in ("0", "3", "5")}, {"2:output": QSpec(4, symmetric=False)})
    student, x = insert(model, plan), noise(7)
    student.get_submodule("2.output_quantizer").set(torch.tensor(0.2), torch.tensor(0.0))
    found = measured(model, student, x)
    assert found.inputs == "noise" and [layer.name for layer in found.layers] == ["0", "3", "5"]
    one, two = x, x
    expected = {}
    with torch.no_grad():
        for name, (first, second) in enumerate(zip(model, student, strict=True)):  # type: ignore[arg-type]
            one, two = first(one), second(two)
            expected[str(name)] = 100 * float((one.double() - two.double()).square().sum() / one.double().square().sum())
    errors = [layer.error for layer in found.layers]
    assert errors == pytest.approx([expected["1"], expected["3"], expected["5"]])  # behind the norm of the first layer
    assert [layer.rounded for layer in found.layers] == pytest.approx(errors)  # this student is rounded to nearest, no more


def test_activations_and_what_is_clipped(model: nn.Sequential) -> None:
    student, x = insert(model, Plan({}, {"2:output": QSpec(4, symmetric=False)})), noise(4)
    student.get_submodule("2.output_quantizer").set(torch.tensor(0.05), torch.tensor(0.0))
    (found,) = measured(model, student, x).activations
    with torch.no_grad():
        values = model[:3](x).double()
    rounded = (values / 0.05).round().clamp(0, 15) * 0.05
    assert found.point == "2:output" and found.bits == 4
    assert found.error == pytest.approx(100 * float((rounded - values).square().sum() / values.square().sum()), rel=1e-4)
    assert found.histogram is not None and found.histogram.clip == pytest.approx((0, 0.75))
    assert found.histogram.clipped == pytest.approx(100 * float((values > 0.75).double().mean()), abs=1e-6)
    assert sum(found.histogram.counts) == values.numel() and len(found.histogram.counts) == BINS


def test_weights_are_clipped_channel_by_channel() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.5], [3.0, 0.1]]))
    student = insert(model, Plan({"0": LayerPlan(SPEC)}))
    student.get_submodule("0").parametrizations["weight"][0].set(torch.tensor([0.1, 0.2]))  # type: ignore[index,union-attr]
    (layer,) = measured(model, student, torch.ones(1, 2), Task(shape=(2,))).layers
    assert layer.histogram is not None and layer.histogram.clip == pytest.approx((-1.4, 1.4))
    assert layer.histogram.clipped == 50 and layer.weights == 4


@pytest.mark.usefixtures("few_pictures")
@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_told(method: str) -> None:
    model, task = digits()
    result = datafree.quantize(model, task, method=quick(method), target=datafree.Target(4, 4))
    before = [each.clone() for each in (*model.state_dict().values(), *result.student.state_dict().values())]
    found = measured(model, result.student, noise(3, task), task)
    after = [*model.state_dict().values(), *result.student.state_dict().values()]
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
    assert [layer.name for layer in found.layers] == list(result.plan.layers)
    assert all(layer.error is not None and layer.rounded is not None for layer in found.layers)
    assert sum(layer.histogram is not None for layer in found.layers) == WORST
    assert not any(module._forward_hooks for module in model.modules())


def test_a_layer_of_the_student_alone_is_told_without_an_error(model: nn.Sequential) -> None:
    student = insert(model, Plan({"3": LayerPlan(SPEC)}))
    student.add_module("extra", insert(nn.Sequential(nn.Linear(3, 3)), Plan({"0": LayerPlan(SPEC)})))
    found = measured(model, student, noise(2))
    extra = found.layers[-1]
    assert extra.name == "extra.0" and extra.error is None and extra.rounded is None and extra.histogram is None


@pytest.mark.parametrize("name", NAMES)
def test_every_network_can_be_told(name: str) -> None:
    model, task = build(name)
    result = datafree.quantize(model, task, method="rtn", target=datafree.Target(4, 8))
    found = measured(model, result.student, noise(3, task), task)
    assert [layer.name for layer in found.layers] == list(result.plan.layers)
    assert all(layer.error is not None and 0 < layer.error < 100 for layer in found.layers)
