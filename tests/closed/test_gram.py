"""Sampled patches against unfolding, and what follows from them against running the layer."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from datafree.closed import gram as module_under_test
from datafree.closed.gram import from_rows, grams, output_energy, output_mean, patches, places_of, rows_of
from datafree.graph.calls import layer_call
from datafree.graph.flow import flow
from networks import NAMES, build


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_under_test, "PATCHES", 10**9)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


LAYERS = (
    (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 7)),
    (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2)), (2, 4, 9, 9)),
    (nn.Conv2d(4, 6, 3, groups=2, padding="same"), (2, 4, 5, 5)),
    (nn.Conv2d(4, 4, 3, groups=4, padding=1, padding_mode="reflect"), (2, 4, 5, 5)),
    (nn.Conv1d(3, 5, 4, stride=2), (3, 3, 11)),
    (nn.Conv3d(2, 3, 2), (2, 2, 3, 4, 5)),
    (nn.Linear(5, 3), (4, 5)),
    (nn.Linear(5, 3), (2, 7, 5)),
    (nn.ConvTranspose2d(4, 6, 2, stride=2), (2, 4, 3, 3)),
    (nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (2, 4, 3, 3)),
)


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda value: str(value) if isinstance(value, nn.Module) else "")
@pytest.mark.usefixtures("everything")
def test_patches_times_rows_are_the_outputs(layer: nn.Module, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(layer)
    x = torch.randn(shape, generator=generator())
    read = flow(model, x).layers["0"]
    weight = layer.weight.detach()
    assert torch.equal(from_rows(rows_of(weight, read), read), weight)
    with torch.no_grad():
        output = x if read.kind == "conv_transpose" else layer(x)
    seen = patches(layer_call(layer, (x,), {}), read, places_of(output, read, generator()))
    product = seen @ rows_of(weight, read).transpose(1, 2)  # (groups, samples, rows)
    with torch.no_grad():
        channels = layer(x).movedim(1 if layer.__class__.__name__ != "Linear" else -1, -1)
    expected = (channels - layer.bias).detach().reshape(-1, channels.shape[-1])
    got = product.transpose(0, 1)
    if read.kind == "conv_transpose":  # each tap of the kernel is an output place of its own
        assert torch.allclose(got.flatten().sort().values, expected.flatten().sort().values, atol=1e-5)
    else:
        assert torch.allclose(got.reshape(got.shape[0], -1), expected, atol=1e-5)
    found = grams(model, flow(model, x), ["0"], x, generator())["0"]
    assert torch.allclose(output_mean(weight, found, read), expected.mean(0), atol=1e-5)
    if read.kind != "conv_transpose":
        assert torch.allclose(output_energy(weight, found, read), expected.var(0, correction=0), atol=1e-4)


def test_a_sample_of_patches_estimates_all_of_them() -> None:
    layer = nn.Conv2d(3, 4, 3)
    x = F.avg_pool2d(torch.randn(64, 3, 40, 40, generator=generator()), 3, 1)
    read = flow(nn.Sequential(layer), x)
    some = grams(nn.Sequential(layer), read, ["0"], x, generator())["0"]
    rows = F.unfold(x, 3).transpose(1, 2).reshape(-1, 27)
    places = places_of(layer(x), read.layers["0"], generator())
    assert patches(layer_call(layer, (x,), {}), read.layers["0"], places).shape == (1, module_under_test.PATCHES, 27)
    assert torch.allclose(some.cov[0], torch.cov(rows.T, correction=0), atol=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_of_every_network(name: str) -> None:
    model, task = build(name)
    inputs = torch.randn(8, *task.shape, generator=generator())
    read = flow(model, inputs)
    found = grams(model, read, read.layers, inputs, generator())
    for layer in read.layers.values():
        rows = rows_of(model.get_submodule(layer.name).weight.detach(), layer)
        assert found[layer.name].cov.shape == (rows.shape[0], rows.shape[2], rows.shape[2])
        assert bool((torch.linalg.eigvalsh(found[layer.name].cov.double()) > -1e-4).all())
    assert not any(module._forward_pre_hooks for module in model.modules())
