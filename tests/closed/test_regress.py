"""The regression of batch norms undoes what a per-channel scale, shift and noise did to the student."""

import copy

import pytest
import torch
from torch import nn

from datafree.closed.absorb import scale_layer, shift_output
from datafree.closed.regress import look, regress, regression
from datafree.context import Ctx
from datafree.graph.flow import flow
from datafree.graph.fold import norm_vectors
from datafree.plan import LayerPlan, Plan, QSpec
from datafree.quant.insert import codes_of, insert, weight_quantizer
from networks import NAMES, build


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_regression_is_least_squares() -> None:
    s = torch.randn(5000, 3, generator=generator())
    t = 1.5 * s + torch.tensor([0.0, 1.0, -2.0]) + 0.3 * torch.randn(5000, 3, generator=generator().manual_seed(1))
    a, b = regression(t, s)
    best = torch.linalg.lstsq(torch.stack([s[:, 1], torch.ones(5000)], 1), t[:, 1:2]).solution.flatten()
    assert torch.allclose(torch.stack([a[1], b[1]]), best, atol=1e-4)


def test_a_scale_is_corrected_as_far_as_its_share_goes_and_the_mean_wholly() -> None:
    s = torch.randn(5000, 2, generator=generator())
    t = torch.tensor([4.0, 0.25]) * s + 3
    for share, expected in ((0.0, [1.0, 1.0]), (0.5, [2.0, 0.5]), (1.0, [4.0, 0.25])):
        a, b = regression(t, s, share=share)
        assert a.tolist() == pytest.approx(expected, rel=1e-3)
        assert torch.allclose(a * s.mean(0) + b, t.mean(0), atol=1e-4)


def test_layers_take_their_share_of_the_correction() -> None:
    """Every output doubled: the scales of the layers come back by a half, by 2 to the power -share."""
    teacher, task = build("without_norm")
    inputs = torch.randn(64, *task.shape, generator=generator())
    read = flow(teacher, inputs[:2])
    first = next(iter(read.layers.values()))
    student = insert(teacher, Plan({first.name: LayerPlan(QSpec(8, axis=first.out_axis))}))
    before = weight_quantizer(student.get_submodule(first.name)).scale.clone()
    scale_layer(student, first, torch.full((first.weight_shape[first.out_axis],), 2.0))
    seen = look(teacher, student, read, inputs, Ctx(torch.device("cpu"), generator()))
    regress(teacher, student, read, seen, inputs, power=0.0, shares={first.name: 0.5})
    after = weight_quantizer(student.get_submodule(first.name)).scale
    assert torch.allclose(after / before, torch.full_like(before, 2**0.5), rtol=0.02)


def test_unrelated_channels_match_the_spread_and_dead_ones_stay() -> None:
    t = torch.randn(5000, 3, generator=generator())
    s = 2 * torch.randn(5000, 3, generator=generator().manual_seed(1))
    s[:, 1] = 0
    t[:, 2], s[:, 2] = 3.0, 3.0
    a, b = regression(t, s)
    assert a[0] == pytest.approx(0.5, rel=0.05)
    assert a[1] == 1 and a[2] == 1 and b[2] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_rescaled_and_shifted_student_comes_back(name: str) -> None:
    """Scaling a layer before its norm is undone exactly, on the pictures and by the stored statistics alike."""
    teacher, task = build(name)
    student = copy.deepcopy(teacher)
    inputs = torch.randn(64, *task.shape, generator=generator())
    read = flow(teacher, inputs[:2])
    for layer in read.layers.values():
        if layer.norm and len(read.calls_of[layer.norm]) == 1:
            module = student.get_submodule(layer.name)
            module.weight.data *= 1.7
            if module.bias is not None:
                module.bias.data *= 1.7
    regress(teacher, student, read, look(teacher, student, read, inputs, Ctx(torch.device("cpu"), generator())), inputs)
    for one, other in zip(teacher.modules(), student.modules(), strict=True):
        if isinstance(one, nn.modules.batchnorm._BatchNorm) and one.running_mean is not None:
            assert torch.allclose(norm_vectors(one).gamma, norm_vectors(other).gamma, rtol=1e-3)
    with torch.no_grad():
        assert torch.allclose(teacher(inputs), student(inputs), atol=1e-3, rtol=1e-3)
    assert not any(module._forward_pre_hooks for each in (teacher, student) for module in each.modules())


def test_layers_without_norms_come_back_through_their_scales_and_biases() -> None:
    """What per-channel scales and shifts did to each layer is undone, those of later layers on inputs corrected already."""
    teacher, task = build("without_norm")
    inputs = torch.randn(64, *task.shape, generator=generator())
    read = flow(teacher, inputs[:2])
    student = insert(teacher, Plan({name: LayerPlan(QSpec(8, axis=layer.out_axis)) for name, layer in read.layers.items()}))
    exact = copy.deepcopy(student)
    with torch.no_grad():
        for layer in read.layers.values():
            outputs = layer.weight_shape[layer.out_axis]
            scale_layer(student, layer, torch.linspace(0.5, 2.0, outputs))
            shift_output(student, layer, torch.linspace(-1, 1, outputs), None)
        before = (student(inputs) - teacher(inputs)).square().sum()
        regress(teacher, student, read, look(teacher, student, read, inputs, Ctx(torch.device("cpu"), generator())), inputs)
        assert (student(inputs) - teacher(inputs)).square().sum() < 1e-3 * before
    for name in read.layers:
        assert torch.equal(codes_of(student.get_submodule(name)), codes_of(exact.get_submodule(name)))
    assert not any(module._forward_hooks for each in (teacher, student) for module in each.modules())
