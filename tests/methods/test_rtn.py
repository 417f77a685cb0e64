"""Round to nearest: nearly exact with many bits, and each of its options does what it is for."""

import pytest
import torch
from torch import Tensor, nn

from datafree import Ctx, Result, Target, Task, quantize
from datafree.closed.clip import aciq_range
from datafree.closed.hqq import hqq
from datafree.closed.moments import Moments
from datafree.closed.propagate import layer_inputs
from datafree.closed.ranges import closed_ranges
from datafree.errors import NetworkError, TargetError
from datafree.graph.flow import read
from datafree.methods.rtn import RoundToNearest
from datafree.plan import QSpec
from datafree.quant.insert import effective_weight, quantizers, weight_quantizer
from networks import NAMES, build


def rounded(network: str, target: Target, **options: object) -> tuple[nn.Module, Result]:
    model, task = build(network)
    return model, quantize(model, task, method=RoundToNearest(**options), target=target)  # type: ignore[arg-type]


def sqnr(result: Result) -> float:
    fidelity = result.run["fidelity"]
    assert isinstance(fidelity, dict)
    return float(fidelity["sqnr"])


def weight_errors(model: nn.Module, student: nn.Module, result: Result) -> dict[str, float]:
    """Squared error of each weight, relative to its energy."""
    pairs = (
        (name, model.get_submodule(name).weight.detach(), effective_weight(student.get_submodule(name))) for name in result.plan.layers
    )
    return {name: float((full - low).square().sum() / full.square().sum()) for name, full, low in pairs}


@pytest.mark.parametrize("network", NAMES)
def test_eight_bits_are_nearly_exact(network: str) -> None:
    _, result = rounded(network, Target(8))
    assert sqnr(result) > 30, "a hundredth of the output's variance would be 20 dB"


@pytest.mark.parametrize("network", NAMES)
def test_more_bits_are_better(network: str) -> None:
    found = [sqnr(rounded(network, Target(bits))[1]) for bits in (3, 5, 8)]
    assert found == sorted(found)


class Unequal(nn.Module):
    """A low layer whose output channels differ in size by up to a thousandfold, which its batch norm takes out again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.conv, self.norm = nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        return self.fc(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


TASK = Task(shape=(3, 10, 10))


def unequal() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Unequal().train()
        with torch.no_grad():
            model.conv.weight *= torch.logspace(-3, 0, 8).view(-1, 1, 1, 1)
            for _ in range(50):
                model(torch.randn(32, *TASK.shape))
    return model.eval()


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_a_scale_for_each_channel_serves_unequal_channels(bits: int) -> None:
    model = unequal()
    each, one = (
        quantize(model, TASK, method=RoundToNearest(per_channel=chosen), target=Target(bits, keep=("stem", "fc")))
        for chosen in (True, False)
    )
    assert each.plan.layers["conv"].weight.axis == 0 and one.plan.layers["conv"].weight.axis is None
    assert sqnr(each) > sqnr(one) + 10


@pytest.mark.parametrize("network", NAMES)
def test_least_squared_error_beats_min_max_at_three_bits(network: str) -> None:
    (model, best), (_, whole) = (rounded(network, Target(3, protocol="dfmpc"), weight_range=rule) for rule in ("mse", "minmax"))
    errors, others = (weight_errors(model, each.student, each) for each in (best, whole))
    assert all(errors[name] <= others[name] for name in errors)
    assert sum(errors.values()) < 0.9 * sum(others.values())


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_clip_of_aciq_lies_between_them_on_heavy_tails(symmetric: bool) -> None:
    model, task = build("vgg")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in (model[3], model[7], model[15]):
            signs = torch.randn(layer.weight.shape, generator=generator).sign()
            layer.weight.copy_(signs * torch.rand(layer.weight.shape, generator=generator).log())  # Laplacian
    results = [
        quantize(
            model,
            task,
            method=RoundToNearest(weight_range=rule, symmetric=symmetric, per_channel=False),
            target=Target(4, protocol="paper"),
        )
        for rule in ("mse", "aciq", "minmax")
    ]
    least, aciq, whole = (weight_errors(model, each.student, each) for each in results)
    for name in ("3", "7", "15"):
        assert least[name] < aciq[name] < whole[name]
        quantizer = weight_quantizer(results[1].student.get_submodule(name))
        assert torch.equal(quantizer.scale, aciq_range(model.get_submodule(name).weight, quantizer.spec)[0])


@pytest.mark.parametrize("symmetric", [True, False])
def test_symmetric_grids(symmetric: bool) -> None:
    _, result = rounded("vgg", Target(4), symmetric=symmetric)
    assert {layer.weight.symmetric for layer in result.plan.layers.values()} == {symmetric}


def test_an_asymmetric_grid_serves_weights_of_one_sign() -> None:
    model, task = build("vgg")
    with torch.no_grad():
        model[3].weight.abs_()
    found = [quantize(model, task, method=RoundToNearest(symmetric=each), target=Target(4)) for each in (True, False)]
    even, odd = (weight_errors(model, each.student, each)["3"] for each in found)
    assert odd < 0.5 * even


def test_least_squared_error_clips_activations_and_min_max_does_not() -> None:
    least, whole = (tops(rounded("vgg", Target(8, 3), act_range=rule)[1]) for rule in ("mse", "minmax"))
    assert len(least) > 2 and (least < 0.98 * whole).all()


@pytest.mark.parametrize("rule", ["closed", "aciq"])
def test_statistics_alone_clip_activations_without_any_noise(rule: str) -> None:
    model, task = build("cifar_resnet")
    method, target = RoundToNearest(act_range=rule), Target(8, 3, protocol="paper")  # type: ignore[arg-type]
    found, again = (quantize(model, task, method=method, target=target, seed=seed) for seed in (1, 2))
    points = {point: quantizer.spec for point, quantizer in quantizers(found.student).items()}
    expected = closed_ranges(read(model, task, Ctx.create()), model, points, task, rule)  # type: ignore[arg-type]
    for point, quantizer in quantizers(found.student).items():
        assert torch.equal(quantizer.scale, quantizers(again.student)[point].scale)
        assert (quantizer.scale, quantizer.zero) == expected[point]
    _, noise = rounded("cifar_resnet", target, act_range="minmax")
    assert len(points) > 5 and tops(found).mean() < 0.9 * tops(noise).mean()


def test_the_closed_range_serves_activations_better_than_min_max() -> None:
    better = [
        sqnr(rounded(network, Target(8, 3, protocol="paper"), act_range="closed")[1])
        - sqnr(rounded(network, Target(8, 3, protocol="paper"), act_range="minmax")[1])
        for network in ("cifar_resnet", "resnet_basic", "vgg")
    ]
    assert min(better) > 0


def test_statistics_that_do_not_tell_a_range_are_refused() -> None:
    model, task = build("transformer")
    for rule in ("closed", "aciq"):
        with pytest.raises(NetworkError, match=r"what passes .*blocks\.0\.proj:input.* take activation ranges from pictures or noise"):
            quantize(model, task, method=RoundToNearest(act_range=rule), target=Target(8, 8))  # type: ignore[arg-type]
    quantize(model, task, method=RoundToNearest(act_range="closed"), target=Target(8))


def tops(result: Result) -> Tensor:
    """The largest value of each quantized activation of three bits."""
    found = (each for each in quantizers(result.student).values() if each.spec.bits == 3)
    return torch.stack([each.scale * (each.spec.levels[1] - each.zero) for each in found])


# ---------------------------------------------------------------- HQQ


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_hqq_gives_linear_layers_zero_points_and_leaves_others_alone(bits: int) -> None:
    target = Target(bits, protocol="paper")
    (model, found), (_, nearest) = (rounded("vgg", target, rounding=each, weight_range="minmax") for each in ("hqq", "nearest"))
    for name, layer in found.plan.layers.items():
        quantizer, other = (weight_quantizer(each.student.get_submodule(name)) for each in (found, nearest))
        if name not in ("15", "17"):
            assert layer == nearest.plan.layers[name] and torch.equal(quantizer.scale, other.scale)
            continue
        assert layer.weight == QSpec(bits, symmetric=False, axis=0)
        expected = hqq(model.get_submodule(name).weight, layer.weight)
        assert torch.equal(quantizer.scale, expected[0]) and torch.equal(quantizer.zero, expected[1])


@pytest.mark.parametrize("network", ["vgg", "transformer"])
def test_hqq_lessens_the_sum_that_it_minimises(network: str) -> None:
    target = Target(3, protocol="dfmpc")
    (model, found), (_, nearest) = (rounded(network, target, rounding=each, symmetric=False) for each in ("hqq", "nearest"))
    sums = []
    for result in (found, nearest):
        linear = [name for name in result.plan.layers if isinstance(model.get_submodule(name), nn.Linear)]
        gaps = (model.get_submodule(name).weight.detach() - effective_weight(result.student.get_submodule(name)) for name in linear)
        sums.append([float(gap.abs().pow(0.7).sum()) for gap in gaps])
    assert len(sums[0]) > 1 and all(one <= other for one, other in zip(*sums, strict=True)) and sum(sums[0]) < sum(sums[1])


def test_hqq_without_a_linear_layer_is_refused() -> None:
    model, task = build("vgg")
    for target in (Target(4, keep=("15", "17")), Target(4, protocol="paper", keep=("15", "17"))):
        with pytest.raises(TargetError, match="hqq is for linear layers, and none is quantized here: take rounding nearest"):
            quantize(model, task, method=RoundToNearest(rounding="hqq"), target=target)


# ---------------------------------------------------------------- bias correction


def students(model: nn.Module, task: Task) -> tuple[nn.Module, nn.Module]:
    """With and without the correction, at three bits."""
    methods, target = (RoundToNearest(), RoundToNearest(correct_bias=False)), Target(3, protocol="dfmpc")
    corrected, plain = (quantize(model, task, method=method, target=target).student for method in methods)
    return corrected, plain


def drawn(moments: Moments, shape: tuple[int, ...]) -> Tensor:
    """Inputs of a layer with just these moments: (n, channels, *shape[1:])."""
    values = torch.randn(shape[0], moments.mean.numel(), *shape[1:], generator=torch.Generator().manual_seed(3))
    values -= values.mean((0, 2, 3), keepdim=True)
    return moments.mean.view(-1, 1, 1) + moments.var.sqrt().view(-1, 1, 1) * values


def shifts(model: nn.Module, student: nn.Module, layer: str, norm: str, inputs: Tensor) -> Tensor:
    """How far the mean of each output of layer and norm has moved, in its standard deviations."""
    with torch.no_grad():
        full, low = (
            each.get_submodule(norm)(each.get_submodule(layer)(inputs))[..., 1:-1, 1:-1] for each in (model, student)
        )  # no padding
    return (low.mean((0, 2, 3)) - full.mean((0, 2, 3))).abs() / full.std((0, 2, 3))


@pytest.mark.parametrize(
    ("network", "layer", "norm"),
    [("vgg", "3", "4"), ("vgg", "10", "11"), ("cifar_resnet", "layer2.0.conv1", "layer2.0.bn1"), ("mobilenet", "1.conv.1.0", "1.conv.1.1")],
    ids=["conv", "wider", "residual", "depthwise"],
)
def test_bias_correction_removes_the_shift_of_the_mean(network: str, layer: str, norm: str) -> None:
    model, task = build(network)
    inputs = drawn(layer_inputs(read(model, task, Ctx.create()), model)[layer], (4000, 5, 5))
    corrected, plain = (
        quantize(model, task, method=RoundToNearest(correct_bias=each), target=Target(3, protocol="dfmpc")).student
        for each in (True, False)
    )
    before, after = (shifts(model, student, layer, norm, inputs) for student in (plain, corrected))
    assert before.max() > 0.05 and after.max() < 0.2 * before.max() and after.mean() < 0.2 * before.mean()


def test_a_layer_without_a_norm_of_its_own_is_corrected_in_its_bias() -> None:
    model, task = build("densenet")
    corrected, plain = (
        quantize(model, task, method=RoundToNearest(correct_bias=each), target=Target(3, protocol="dfmpc")).student
        for each in (True, False)
    )
    assert corrected.block[0].conv2.bias is not None and plain.block[0].conv2.bias is None
    assert torch.equal(effective_weight(corrected.block[0].conv2), effective_weight(plain.block[0].conv2))
