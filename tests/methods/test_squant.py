"""SQuant end to end: the codes of every layer, its plan and options, and ranges from uniform noise."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from datafree import Ctx, Target, Task, quantize
from datafree.errors import MethodError, NetworkError
from datafree.graph.flow import Layer, read
from datafree.graph.fold import by_outputs, from_outputs
from datafree.methods.squant import SQuant, deviations
from datafree.plan import QSpec
from datafree.quant import grid
from datafree.quant.insert import codes_of, effective_weight, quantizers, weight_quantizer
from datafree.quant.ranges import minmax, mse
from networks import build
from tests.reference import rounding as reference

METHODS = (SQuant(), SQuant(symmetric=True, weight_range="mse"), SQuant(stages="ek"), SQuant(stages="ec"))


def reference_codes(weight: Tensor, layer: Layer, spec: QSpec, method: SQuant) -> Tensor:
    """Codes by loops, of a weight whose outputs may lie in groups and along any axis."""
    scale, zero = (minmax if method.weight_range == "minmax" else mse)(weight, spec)
    rows = by_outputs(weight, layer)
    per_row = [by_outputs(grid.broadcast(each, spec, weight).expand_as(weight), layer).flatten(1)[:, 0] for each in (scale, zero)]
    codes, _ = reference.squant(rows.reshape(*rows.shape[:2], -1), *per_row, spec, method.stages)
    return from_outputs(codes.view_as(rows), layer)


@pytest.mark.parametrize("network", ["mobilenet", "sequence", "grouped"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_every_layer_gets_its_codes(network: str, method: SQuant) -> None:
    model, task = build(network)
    found = quantize(model, task, method=method, target=Target(4, protocol="paper"))
    layers = read(model, task, Ctx.create()).layers
    assert list(found.plan.layers) == list(layers)
    changed = 0
    for name, plan in found.plan.layers.items():
        weight, module = model.get_submodule(name).weight.detach(), found.student.get_submodule(name)
        scale, zero = (minmax if method.weight_range == "minmax" else mse)(weight, plan.weight)
        assert torch.equal(weight_quantizer(module).scale, scale) and torch.equal(weight_quantizer(module).zero, zero)
        assert torch.equal(codes_of(module), reference_codes(weight, layers[name], plan.weight, method))
        changed += int((codes_of(module) != grid.quantize(weight, scale, zero, plan.weight)).sum())
        if module.bias is not None:
            assert torch.equal(module.bias, model.get_submodule(name).bias)
    assert changed > 0


def test_stages_differ_where_there_is_a_kernel_and_a_channel() -> None:
    model, task = build("vgg")
    codes = [codes_of(quantize(model, task, method=SQuant(stages=each), target=Target(4)).student[3]) for each in ("ekc", "ek", "ec")]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(codes, 2))


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_plan_has_a_scale_for_each_output_channel(symmetric: bool) -> None:
    model, task = build("grouped")
    found = quantize(model, task, method=SQuant(symmetric=symmetric), target=Target(4, 4, keep=("head",)))
    assert "head" not in found.plan.layers and found.plan.layers["up.0"].weight == QSpec(4, symmetric, axis=1)
    assert {layer.weight.axis for name, layer in found.plan.layers.items() if name != "up.0"} == {0}
    assert {layer.weight.symmetric for layer in found.plan.layers.values()} == {symmetric}
    assert found.plan.layers["stem.0"].weight.bits == found.plan.layers["depthwise.0"].weight.bits == 8  # the protocol deploy
    assert all(quantizer.spec == QSpec(quantizer.spec.bits, symmetric=False) for quantizer in quantizers(found.student).values())


def test_least_squared_error_lessens_the_error_of_the_weights() -> None:
    model, task = build("vgg")
    errors = []
    for rule in ("mse", "minmax"):
        student = quantize(model, task, method=SQuant(weight_range=rule), target=Target(2, protocol="paper")).student
        errors.append(sum(float((effective_weight(student[at]) - model[at].weight.detach()).square().sum()) for at in (0, 3, 7, 10)))
    assert errors[0] < 0.95 * errors[1]


@pytest.mark.parametrize(("field", "value"), [("stages", "kc"), ("weight_range", "aciq"), ("symmetric", 1)])
def test_options_out_of_range_are_refused(field: str, value: object) -> None:
    model, task = build("vgg")
    with pytest.raises(MethodError, match=f"squant: {field} cannot be {value!r}"):
        quantize(model, task, method=SQuant(**{field: value}))  # type: ignore[arg-type]


@pytest.mark.parametrize(("bits", "expected"), [(4, 12), (6, 14), (8, 25), (5, 13), (7, 19.5), (3, 11), (2, 10)])
def test_widths_in_deviations(bits: int, expected: float) -> None:
    assert deviations(bits) == expected


class Signs(nn.Module):
    """Two points behind a layer, one of them with values of both signs, and an input that is quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 3, 1)
        self.relu, self.leaky = nn.ReLU(), nn.LeakyReLU(0.5)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.third(self.leaky(self.second(self.relu(self.first(x)))))
        return found


@pytest.mark.parametrize("bits", [4, 6])
def test_ranges_follow_from_uniform_noise(bits: int) -> None:
    torch.manual_seed(0)
    model, task = Signs().eval(), Task(shape=(2, 12, 12), mean=(0.5,), std=(0.25,))
    student = quantize(model, task, method=SQuant(), target=Target(8, bits, protocol="deploy", keep=("third",)), seed=4).student
    noise = torch.rand(256, 2, 12, 12, generator=torch.Generator().manual_seed(99))
    behind: dict[str, Tensor] = {}
    for name in ("relu", "leaky"):
        model.get_submodule(name).register_forward_hook(lambda module, args, result, name=name: behind.update({name: result}))
    with torch.no_grad():
        model(task.scaled(noise))
    points = quantizers(student)
    source = points["first:input"]
    assert source.spec.bits == 8 and float(source.scale) == pytest.approx(4 / 255) and float(source.zero) in (127, 128)  # pixels: -2 to 2
    inner = points["second:input"]
    alpha = deviations(bits) * float(behind["relu"][behind["relu"] > 0].std())
    alpha = min(alpha, float(behind["relu"].max())) if bits < 6 else alpha
    scatter = 0.15 if bits < 6 else 0.02  # of a maximum, and of a deviation
    assert float(inner.zero) == 0 and float(inner.scale) * (2**bits - 1) == pytest.approx(alpha, rel=scatter)


def test_signed_points_get_both_sides() -> None:
    torch.manual_seed(1)
    model, task = Signs().eval(), Task(shape=(2, 12, 12))
    for bits in (4, 8):
        student = quantize(model, task, method="squant", target=Target(8, bits, protocol="paper")).student
        quantizer = quantizers(student)["third:input"]
        with torch.no_grad():
            x = model.leaky(model.second(model.relu(model.first(task.scaled(torch.rand(256, 2, 12, 12))))))
        alpha = deviations(bits) / 1.25 * float(x[x > 0].std())
        alpha = min(alpha, float(x.abs().max())) if bits == 4 else alpha
        assert float(quantizer.scale) * (2**bits - 1) == pytest.approx(2 * alpha, rel=0.05)
        assert float(quantizer.zero) in (2 ** (bits - 1) - 1, 2 ** (bits - 1))  # the middle lies between the two


def test_ranges_of_activations_do_not_depend_on_the_bits_of_weights() -> None:
    model, task = build("cifar_resnet")
    found = [quantizers(quantize(model, task, method="squant", target=Target(bits, 4, protocol="paper")).student) for bits in (2, 8)]
    assert found[0] and all(torch.equal(found[0][point].scale, found[1][point].scale) for point in found[0])


def test_a_network_that_overflows_on_noise_is_refused() -> None:
    first = nn.Conv2d(4, 2, 1)
    model = nn.Sequential(first, nn.ReLU(), nn.Conv2d(2, 1, 1)).eval()
    nn.init.constant_(first.weight, 3e38)
    with pytest.raises(NetworkError, match="NaN or infinity"):
        quantize(model, Task(shape=(4, 4, 4)), method="squant", target=Target(8, 8, protocol="paper"))
