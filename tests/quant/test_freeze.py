"""Codes stand for the student's weights exactly, and the materialised network computes the same bits."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from datafree.plan import LayerPlan, Plan, QSpec
from datafree.quant.freeze import float_tensors, freeze, materialise, own_tensors
from datafree.quant.grid import dequantize
from datafree.quant.insert import insert, latent_weight, quantized_layers, quantizers
from datafree.quant.observe import observe

PLAN = Plan(
    {
        "0": LayerPlan(QSpec(3, axis=0), QSpec(8, symmetric=False)),
        "3": LayerPlan(QSpec(2, grid="ternary", axis=0)),
        "5": LayerPlan(QSpec(4, symmetric=False), QSpec(8, symmetric=False)),
    }
)


@pytest.fixture
def student() -> nn.Module:
    torch.manual_seed(0)
    teacher = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1, bias=False), nn.Flatten(), nn.Linear(36, 3)
    )
    student = insert(teacher.eval(), PLAN)
    observe(student, [inputs()], "minmax", lambda model, batch: model(batch))
    return student


def inputs() -> Tensor:
    return torch.randn(3, 2, 5, 5, generator=torch.Generator().manual_seed(7))


def test_codes_stand_for_the_weights(student: nn.Module) -> None:
    frozen = freeze(student)
    assert list(frozen) == ["0", "3", "5"]
    for name, layer in quantized_layers(student).items():
        part = frozen[name]
        assert part.spec == PLAN.layers[name].weight and part.codes.dtype == torch.int16 and part.codes.shape == latent_weight(layer).shape
        assert isinstance(layer.weight, Tensor)
        assert torch.equal(dequantize(part.codes, part.scale, part.zero, part.spec), layer.weight)
        part.scale.fill_(9)
    assert all((part.scale != 9).all() for part in freeze(student).values())


def test_materialised_is_bit_identical_and_leaves_the_student(student: nn.Module) -> None:
    before = student(inputs())
    plain = materialise(student)
    assert torch.equal(plain(inputs()), before) and torch.equal(student(inputs()), before)
    assert type(plain.get_submodule("0")) is nn.Conv2d and not parametrize.is_parametrized(plain.get_submodule("0"))
    assert list(quantizers(plain)) == ["0:input", "5:input"] and not freeze(plain)
    assert list(freeze(student)) == ["0", "3", "5"]
    assert torch.equal(materialise(student)(inputs()), before)
    with torch.no_grad():
        plain.get_parameter("5.weight").zero_()
    assert torch.equal(student(inputs()), before)


def test_float_tensors_are_all_the_rest_once(student: nn.Module) -> None:
    norm = {f"1.{key}" for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    assert set(float_tensors(student)) == {"0.bias", "5.bias", *norm}
    assert set(own_tensors(student)) == set()
    tied = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2, bias=False)})
    tied["b"].weight = tied["a"].weight
    tied.register_buffer("table", torch.ones(3))
    tied.register_buffer("scratch", torch.ones(3), persistent=False)
    assert set(float_tensors(tied)) == {"table", "a.weight", "a.bias"}
