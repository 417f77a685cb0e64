"""Rounding with the student's own inputs: the wanted weight against least squares, and what a pass does and leaves alone."""

import pytest
import torch
from torch import Tensor, nn

from datafree.closed import gram as gram_module
from datafree.closed.gram import Gram, patches, places_of, sampled_outputs
from datafree.closed.successive import successive, wanted_weight
from datafree.graph.calls import layer_call
from datafree.graph.flow import flow
from datafree.plan import LayerPlan, Plan, QSpec
from datafree.quant.grid import quantize
from datafree.quant.insert import assign, insert, quantizers
from datafree.quant.ranges import minmax
from networks import build


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


LAYERS = (
    (nn.Conv2d(4, 6, 3, padding=1, groups=2), (8, 4, 6, 6)),
    (nn.Conv2d(4, 4, 3, stride=2, groups=4), (8, 4, 9, 9)),
    (nn.Linear(5, 3), (40, 5)),
    (nn.Linear(5, 3), (8, 6, 5)),
)


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=("grouped", "depthwise", "linear", "tokens"))
def test_wanted_weight_is_the_ridge_regression(layer: nn.Module, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram_module, "PATCHES", 10**9)
    x = torch.randn(shape, generator=seeded())
    noisy = x + 0.5 * torch.randn(shape, generator=seeded(1)) * x.abs() + 0.3
    read = flow(nn.Sequential(layer), x).layers["0"]
    with torch.no_grad():
        output = layer(x)
    places = places_of(output, read, seeded())
    seen = patches(layer_call(layer, (noisy,), {}), read, places)
    targets = sampled_outputs(output, read, places)
    full = layer.weight.detach()
    for ridge in (1e-6, 1.0):
        wanted, gram = wanted_weight(full, seen, targets, read, ridge)
        assert wanted.shape == full.shape
        rows, start = wanted.reshape(read.groups, -1, seen.shape[2]).double(), full.reshape(read.groups, -1, seen.shape[2]).double()
        for group in range(read.groups):
            inputs, outputs = (each[group].double() - each[group].double().mean(0) for each in (seen, targets))
            penalty = ridge * inputs.square().mean(0).mean() * len(inputs)
            left = torch.cat([inputs, penalty.sqrt() * torch.eye(inputs.shape[1], dtype=torch.float64)])
            right = torch.cat([outputs - inputs @ start[group].T, torch.zeros(inputs.shape[1], outputs.shape[1], dtype=torch.float64)])
            expected = start[group] + torch.linalg.lstsq(left, right).solution.T
            torch.testing.assert_close(rows[group], expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(gram.cov[0], torch.cov(seen[0].T, correction=0), rtol=1e-3, atol=1e-5)
    same, _ = wanted_weight(full, patches(layer_call(layer, (x,), {}), read, places), targets, read, 1.0)
    torch.testing.assert_close(same, full, rtol=1e-3, atol=1e-4)


def test_every_layer_is_rewritten_once_in_order_and_biases_follow() -> None:
    model, task = build("without_norm")
    x = torch.randn(16, *task.shape, generator=seeded())
    read = flow(model, x[:2])
    spec = QSpec(3, axis=0)
    acts = QSpec(4, symmetric=False)
    student = insert(model, Plan({name: LayerPlan(spec, acts) for name in read.layers}))
    for quantizer in quantizers(student).values():
        quantizer.set(torch.tensor(0.1), torch.tensor(0.0))
    order: list[str] = []

    def rewrite(name: str, wanted: Tensor, gram: Gram) -> None:
        order.append(name)
        scale, zero = minmax(wanted, spec)
        assign(student.get_submodule(name), quantize(wanted, scale, zero, spec), scale, zero)

    with torch.no_grad(), successive(model, student, read, read.layers, rewrite, seeded()):
        expected = model(x)
        found = student(x)
    assert order == list(read.layers)
    assert torch.allclose(found.mean(0), expected.mean(0), atol=1e-3), "the bias of the last layer keeps the mean"
    assert not any(module._forward_pre_hooks and not hasattr(module, "input_quantizer") for module in student.modules())
    with torch.no_grad():
        assert not torch.equal(student(x), found), "activations are quantized again afterwards"


def test_layers_called_twice_are_left_alone() -> None:
    model, task = build("twice")
    x = torch.randn(4, *task.shape, generator=seeded())
    read = flow(model, x[:2])
    twice = {name for name, layer in read.layers.items() if len(layer.calls) > 1}
    student = insert(model, Plan({name: LayerPlan(QSpec(4, axis=0)) for name in read.layers}))
    seen: list[str] = []
    with torch.no_grad(), successive(model, student, read, read.layers, lambda name, wanted, gram: seen.append(name), seeded()):
        model(x)
        student(x)
    assert twice and set(seen) == set(read.layers) - twice
