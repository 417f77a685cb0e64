"""Expected losses fall with the bits, agree with loops, and need no forward pass."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datafree.bits.sensitivity import answer_divergence, distortions, moments_energy, per_output
from datafree.closed.moments import Moments, tap_correlation
from datafree.closed.propagate import layer_inputs
from datafree.graph.flow import Flow, Layer, flow
from datafree.graph.fold import by_outputs
from datafree.plan import LayerPlan, Plan, QSpec
from datafree.quant.grid import fake_quantize
from datafree.quant.insert import insert, weight_quantizer
from datafree.quant.ranges import minmax, mse
from networks import NAMES, build

WIDTHS = (2, 3, 4, 6, 8)


def read(name: str) -> tuple[nn.Module, Flow]:
    model, task = build(name)
    return model, flow(model, torch.randn(2, *task.shape, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("name", NAMES)
def test_more_bits_lose_less(name: str) -> None:
    model, found = read(name)
    lost = distortions(found, model, dict.fromkeys(found.layers, WIDTHS), moments_energy(found, layer_inputs(found, model)))
    assert list(lost) == list(found.layers)
    for table in lost.values():
        values = [table[bits] for bits in WIDTHS]
        assert all(0 <= fine < coarse for coarse, fine in zip(values, values[1:], strict=False)) and values[-1] < 1e-3
        assert values[0] < 1.5


def test_weights_on_the_grid_lose_nothing() -> None:
    model, found = read("vgg")
    with torch.no_grad():
        for name, layer in found.layers.items():
            weight = model.get_submodule(name).weight
            spec = per_output(layer, 4)
            weight.copy_(fake_quantize(weight, *minmax(weight, spec), spec))
    lost = distortions(found, model, dict.fromkeys(found.layers, (4,)), moments_energy(found, layer_inputs(found, model)))
    assert max(table[4] for table in lost.values()) < 1e-9


@pytest.mark.parametrize("name", ["mobilenet", "grouped", "without_norm"])
def test_agrees_with_loops(name: str) -> None:
    model, found = read(name)
    inputs = layer_inputs(found, model)
    lost = distortions(found, model, dict.fromkeys(found.layers, (3,)), moments_energy(found, inputs))
    for layer in found.layers.values():
        torch.testing.assert_close(lost[layer.name][3], looped(model, layer, inputs[layer.name]), rtol=1e-4, atol=1e-9)


def looped(model: nn.Module, layer: Layer, moments: Moments) -> float:
    weight = model.get_submodule(layer.name).weight.detach()
    spec = QSpec(3, axis=layer.out_axis)
    error = by_outputs(weight - fake_quantize(weight, *mse(weight, spec), spec), layer).double()
    rows = by_outputs(weight, layer).double()
    taps = tap_correlation(layer.kernel).double()
    noise = signal = 0.0
    for j in range(len(rows)):
        group = j * layer.groups // len(rows)

        def energy(row: Tensor, group: int = group) -> float:
            return sum(
                float(moments.var[group * rows.shape[1] + c]) * float(row[c].flatten() @ taps @ row[c].flatten())
                for c in range(rows.shape[1])
            )

        if layer.norm is None:
            noise, signal = noise + energy(error[j]), signal + energy(rows[j])
        else:
            norm = model.get_submodule(layer.norm)
            assert isinstance(norm, nn.BatchNorm2d)
            gamma, var = float(norm.weight.detach()[j]), float(norm.running_var[j])
            noise, signal = noise + energy(error[j]) * gamma**2 / (var + norm.eps), signal + gamma**2
    return noise / signal


def test_predicts_the_noise_to_signal_ratio_behind_the_norm() -> None:
    """On inputs that fit the model: white ones, seen by a 1x1 convolution."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 4, 1))
    x = torch.randn(64, 16, 16, 16)
    model.train()
    for _ in range(60):
        model(x)
    model.eval()
    found = flow(model, x[:2])
    lost = distortions(found, model, dict.fromkeys(found.layers, (3,)), moments_energy(found, layer_inputs(found, model)))["0"][3]
    weight = model[0].weight.detach()
    spec = QSpec(3, axis=0)
    with torch.no_grad():
        clean, noisy = (model[1](F.conv2d(x, each)) for each in (weight, fake_quantize(weight, *mse(weight, spec), spec)))
    measured = (noisy - clean).var((0, 2, 3)).sum() / clean.var((0, 2, 3)).sum()
    assert lost == pytest.approx(float(measured), rel=0.05)


def test_another_energy_and_another_grid_are_used() -> None:
    model, found = read("without_norm")
    four = dict.fromkeys(found.layers, (4,))
    seen = []

    def plain(name: str, weight: Tensor) -> Tensor:
        seen.append(name)
        return by_outputs(weight, found.layers[name]).square().flatten(1).sum(1)

    lost = distortions(found, model, four, plain)
    assert set(seen) == set(found.layers)
    for name, layer in found.layers.items():
        weight = model.get_submodule(name).weight.detach()
        spec = per_output(layer, 4)
        error = weight - fake_quantize(weight, *mse(weight, spec), spec)
        assert lost[name][4] == pytest.approx(float(error.square().sum() / weight.square().sum()), rel=1e-4)
    coarse = distortions(found, model, four, plain, lambda layer, bits: QSpec(bits))
    assert sum(table[4] for table in coarse.values()) > sum(table[4] for table in lost.values())
    perfect = distortions(found, model, four, plain, rounded=lambda layer, weight, spec: weight)
    assert all(table == {4: 0.0} for table in perfect.values())


def test_a_dead_layer_loses_nothing() -> None:
    model, found = read("without_norm")
    with torch.no_grad():
        model[2].weight.zero_()
    assert distortions(found, model, dict.fromkeys(found.layers, (2,)), moments_energy(found, layer_inputs(found, model)))["2"] == {2: 0.0}


@pytest.mark.parametrize("name", ["resnet_basic", "twice", "without_norm"])
def test_divergence_of_answers_is_that_of_a_network_with_only_these_layers_quantized(name: str) -> None:
    model, task = build(name)
    _, found = read(name)
    inputs = torch.randn(70, *task.shape, generator=torch.Generator().manual_seed(3))
    lost = answer_divergence(found, model, task, inputs)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        t = model(inputs).double().log_softmax(1)
    for widths in ({each: 3} for each in found.layers):
        student = insert(model, Plan({each: LayerPlan(per_output(found.layers[each], bits)) for each, bits in widths.items()}))
        for each in widths:
            weight = model.get_submodule(each).weight.detach()
            weight_quantizer(student.get_submodule(each)).set(*mse(weight, per_output(found.layers[each], 3)))
        with torch.no_grad():
            s = student(inputs).double().log_softmax(1)
        assert lost(widths) == pytest.approx(float((t.exp() * (t - s)).sum(1).mean()), rel=1e-3, abs=1e-7)
    assert lost({}) == 0 and lost(dict.fromkeys(found.layers, 3)) > 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
