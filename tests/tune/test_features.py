"""Maps in which units end: which they are, what is captured, and every distance of two of them against float64 loops."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datafree.context import Ctx, Event
from datafree.errors import NetworkError
from datafree.graph.flow import flow
from datafree.synth.source import Batch, Prior
from datafree.tune import distill as training
from datafree.tune.distill import Recipe
from datafree.tune.features import (
    FeatureTerm,
    attention,
    captured,
    channel_energy,
    difference,
    position_energy,
    refined,
    relations,
    unit_ends,
)
from networks import Scripted, build

TERMS: tuple[FeatureTerm, ...] = (refined, attention, relations)
ENDS = {
    "cifar_resnet": ("layer1.0.bn2", "layer1.1.bn2", "layer2.0.bn2"),
    "resnet_basic": ("layers.0.bn2", "layers.1.bn2"),
    "resnet_bottleneck": ("layers.0.bn3", "layers.1.bn3"),
    "mobilenet": ("1.conv.3", "2.conv.3", "3.conv.3"),  # the last has no sum
    "vgg": ("4", "8", "11"),
    "sequence": ("4", "7"),
    "without_norm": ("2", "4"),
    "transformer": (),
}
Rows = list[list[float]]


def ends_of(name: str) -> tuple[str, ...]:
    model, task = build(name)
    return unit_ends(flow(model, torch.zeros(2, *task.shape)))


def maps(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(*shape, generator=generator) for _ in range(2))
    return one, other


@pytest.mark.parametrize("name", ENDS)
def test_units_end_where_their_body_does(name: str) -> None:
    assert ends_of(name) == ENDS[name]


def test_a_gate_and_a_shortcut_are_no_body() -> None:
    def run(net: nn.Module, x: Tensor) -> Tensor:
        y = net.second_norm(net.second(F.relu(net.first(x))))
        y = y * torch.sigmoid(net.excite(F.relu(net.squeeze(y.mean((2, 3), keepdim=True)))))
        return net.head((y + net.shortcut(x)).mean((2, 3)))

    convs = {name: nn.Conv2d(3, 3, 3, padding=1) for name in ("first", "second")}
    gates = {name: nn.Conv2d(3, 3, 1) for name in ("squeeze", "excite", "shortcut")}
    model = Scripted(run, second_norm=nn.BatchNorm2d(3), head=nn.Linear(3, 5), **convs, **gates).eval()
    assert unit_ends(flow(model, torch.zeros(2, 3, 8, 8))) == ("second_norm",)


def test_what_is_captured_is_what_stood_before_the_sum_was_written_into_it() -> None:
    model, task = build("cifar_resnet")
    inputs = task.noise(4, torch.Generator().manual_seed(0))
    with torch.no_grad(), captured(model, ends_of("cifar_resnet")) as seen:
        model(inputs)
        (first,) = seen["layer1.0.bn2"]
        x = F.relu(model.bn1(model.conv1(inputs)))
        block = model.get_submodule("layer1.0")
        expected = F.batch_norm(block.conv2(F.relu(block.bn1(block.conv1(x)))), block.bn2.running_mean, block.bn2.running_var,
                                block.bn2.weight, block.bn2.bias)  # fmt: skip
    torch.testing.assert_close(first, expected)
    assert list(seen) == list(ENDS["cifar_resnet"]) and not any(each._forward_hooks for each in model.modules())


def softmax(row: list[float]) -> list[float]:
    parts = [math.exp(each) for each in row]
    return [each / sum(parts) for each in parts]


def unit(row: list[float]) -> list[float]:
    length = math.sqrt(sum(each * each for each in row))
    return [each / length for each in row]


def divergence(one: Rows, other: Rows, temperature: float) -> float:
    total = 0.0
    for p, q in zip(one, other, strict=True):
        pairs = zip(softmax([each / temperature for each in p]), softmax([each / temperature for each in q]), strict=True)
        total += sum(a * math.log(a / b) for a, b in pairs)
    return total / len(one)


def energies(x: Tensor) -> tuple[Rows, Rows]:
    """Mean squares over the positions, by channel, and over the channels, by position."""
    channels = [[sum(v * v for v in row) / len(row) for row in each] for each in x.double().flatten(2).tolist()]
    return channels, [
        [sum(v * v for v in column) / len(column) for column in zip(*each, strict=True)] for each in x.double().flatten(2).tolist()
    ]


def test_refined_is_akts_channel_and_spatial_divergence() -> None:
    t, s = maps(3, 4, 2, 3)
    (channels, positions), (own_channels, own_positions) = energies(t), energies(s)
    expected = divergence([softmax(row) for row in channels], [softmax(row) for row in own_channels], 8.0)
    expected += divergence([unit(row) for row in positions], [unit(row) for row in own_positions], 8.0)
    assert refined(t, s).item() == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(channel_energy(t).sum(1), torch.ones(3).double())
    torch.testing.assert_close(position_energy(t).norm(dim=1), torch.ones(3).double())


def test_attention_is_hasts_difference_of_energies_of_unit_length() -> None:
    t, s = maps(3, 4, 2, 3)
    gaps = [a - b for p, q in zip(energies(t)[0], energies(s)[0], strict=True) for a, b in zip(unit(p), unit(q), strict=True)]
    assert attention(t, s).item() == pytest.approx(sum(gap * gap for gap in gaps) / 12, rel=1e-5)


def related(x: Tensor) -> tuple[list[list[Rows]], ...]:
    """ZAQ's two maps of every input, rows of channels."""
    by_position, by_channel = [], []
    for each in x.double().flatten(2):
        f = [[value / length for value, length in zip(row, each.norm(dim=0).tolist(), strict=True)] for row in each.tolist()]
        channels, positions = range(len(f)), range(len(f[0]))
        alike = [softmax([sum(f[c][i] * f[c][j] for c in channels) for j in positions]) for i in positions]
        by_position.append([[f[c][i] + 0.1 * sum(alike[i][j] * f[c][j] for j in positions) for i in positions] for c in channels])
        far = []
        for c in channels:
            row = [sum(f[c][i] * f[d][i] for i in positions) for d in channels]
            far.append(softmax([max(row) - value for value in row]))
        by_channel.append([[f[c][i] + 0.1 * sum(far[c][d] * f[d][i] for d in channels) for i in positions] for c in channels])
    return by_position, by_channel


def test_relations_are_zaqs_of_positions_and_of_channels() -> None:
    t, s = maps(2, 3, 2, 2)
    expected = sum((torch.tensor(one) - torch.tensor(other)).abs().mean().item() for one, other in zip(related(t), related(s), strict=True))
    assert relations(t, s).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("shape", ((4, 6, 5), (4, 6, 3, 3)))
def test_equal_maps_cost_nothing_others_do_and_a_batch_that_is_repeated_costs_the_same(term: FeatureTerm, shape: tuple[int, ...]) -> None:
    t, s = maps(*shape)
    assert term(t, t) == 0.0 and term(t, t + 1e-3 * s) > 0.0
    axes = (1,) * (len(shape) - 1)
    torch.testing.assert_close(term(t.repeat(3, *axes), s.repeat(3, *axes)), term(t, s))
    assert term(t.bfloat16(), s.bfloat16()).dtype == torch.float32


def test_all_maps_are_compared_with_their_own() -> None:
    (t, s), (u, v) = maps(2, 3, 4, 4), maps(2, 5, 2, 2)
    found = difference(attention, {"a": [t, s], "b": [u]}, {"a": [s, s], "b": [v]})
    torch.testing.assert_close(found, attention(t, s) + attention(u, v))
    for teacher, student in (({}, {}), ({"a": [t]}, {}), ({"a": [t, t]}, {"a": [s]}), ({"a": [t]}, {"b": [s]})):
        with pytest.raises(NetworkError, match="they must be the same, and any"):
            difference(attention, teacher, student)


# ---------------------------------------------------------------- in distillation


class Answered:
    """A source that knows a wrong answer to what it gives."""

    def __init__(self, source: Prior) -> None:
        self.source = source

    def sample(self, n: int) -> Batch:
        batch = self.source.sample(n)
        return dataclasses.replace(batch, answer=torch.full((n, 5), torch.nan))

    def update(self, student: nn.Module) -> dict[str, Tensor]:
        return {}


def taught(name: str, recipe: Recipe, on_event: Callable[[Event], None] = lambda event: None) -> dict[str, Tensor]:
    """The terms of the first step, of a student whose last unit is off."""
    (model, task), (student, _), ctx = build(name), build(name), Ctx.create(0, on_event=on_event)
    with torch.no_grad():
        for each in student.parameters():
            each.mul_(0.9)
    source = Answered(Prior("mix", task, ctx.generator)) if recipe.features else Prior("mix", task, ctx.generator)
    lesson = training._Lesson(model, student, task, source, 1, ctx, recipe)
    return dict(lesson())


@pytest.mark.parametrize("term", TERMS)
def test_a_step_compares_maps_on_the_batch_at_hand_whatever_answer_its_source_knows(term: FeatureTerm) -> None:
    terms, plain = taught("cifar_resnet", Recipe(batch=4, features=term, feature_weight=2.0)), taught("cifar_resnet", Recipe(batch=4))
    assert list(terms) == ["mse", "features"] and torch.equal(terms["mse"], plain["mse"])
    half = taught("cifar_resnet", Recipe(batch=4, features=term, feature_weight=1.0))
    assert terms["features"] > 0
    torch.testing.assert_close(terms["features"], 2 * half["features"])


@pytest.mark.parametrize("term", TERMS)
def test_the_gradient_reaches_the_student_alone(term: FeatureTerm) -> None:
    (model, task), (student, _), ctx = build("cifar_resnet"), build("cifar_resnet"), Ctx.create(0)
    with torch.no_grad():
        student.layer1[0].bn1.weight.mul_(0.5)
    lesson = training._Lesson(model, student, task, Prior("mix", task, ctx.generator), 1, ctx, Recipe(batch=4, features=term))
    lesson()["features"].backward()  # type: ignore[no-untyped-call]
    slopes = {name: each.grad for name, each in student.named_parameters()}
    assert all(each.grad is None for each in model.parameters())
    for name in ("conv1.weight", "layer1.0.bn1.weight", "layer2.0.bn2.bias"):
        slope = slopes[name]
        assert slope is not None and bool(slope.abs().max() > 0)


def test_a_network_without_maps_is_noted_and_learns_without() -> None:
    notes: list[Event] = []
    recipe = Recipe(batch=4, features=attention)
    (model, task), ctx = build("transformer"), Ctx.create(0, on_event=notes.append)
    lesson = training._Lesson(model, model, task, Prior("mix", task, ctx.generator), 1, ctx, recipe)
    assert list(lesson()) == ["mse"]
    assert ["no convolutional units" in each.message for each in notes] == [True]
