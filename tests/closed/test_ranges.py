"""Closed ranges against the least squared error that brute force finds on what really passes."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datafree import Ctx, Plan, Target, Task
from datafree.bits.allocate import activation_points
from datafree.closed.clip import aciq
from datafree.closed.moments import tap_correlation
from datafree.closed.ranges import closed_ranges, point_nodes, sources
from datafree.errors import NetworkError, TargetError
from datafree.graph.flow import Flow, flow, read
from datafree.plan import QSpec
from datafree.quant.grid import fake_quantize
from datafree.quant.insert import insert
from datafree.quant.observe import watch
from networks import NAMES, Scripted, build, conv_bn

Ranges = dict[str, tuple[Tensor, Tensor]]
PLAIN = Task(shape=(3, 8, 8))
SIZE = 6


def spec(bits: int) -> QSpec:
    return QSpec(bits, symmetric=False)


def error(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> float:
    return float((fake_quantize(x, scale, zero, spec(bits)) - x).double().square().mean())


def least_error(x: Tensor, bits: int) -> float:
    """Of a dense search over scales and zero points."""
    steps, low, high = 2**bits - 1, float(x.min().clamp(max=0)), float(x.max().clamp(min=0))
    middle = round(-low / (high - low) * steps)
    zeros = {0} if low == 0 else {min(max(middle + shift, 0), steps) for shift in (*range(-4, 5), -32, -16, -8, 8, 16, 32)}
    scales = (high - low) / steps * torch.logspace(-1, 0.05, 36)
    return min(error(x, scale, torch.tensor(float(zero)), bits) for zero in zeros for scale in scales)


def settled(name: str) -> tuple[nn.Module, Task]:
    """A tiny network whose statistics have come to rest on standard normal inputs."""
    model, task = build(name)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        model.train()
        for _ in range(4):
            model(task.noise(64, generator))
    return model.eval().requires_grad_(False), task


def passing(model: nn.Module, task: Task, points: dict[str, QSpec]) -> dict[str, Tensor]:
    """Twenty thousand values of each point, on standard normal inputs."""
    found: dict[str, list[Tensor]] = {point: [] for point in points}

    def watcher(point: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        return lambda module, args, result: found[point].append(args[0].flatten().clone()) or args[0]

    batch = task.noise(96, torch.Generator().manual_seed(1))
    watch(insert(model, Plan({}, points)), [batch], {point: watcher(point) for point in points}, task.run)
    return {point: thinned(torch.cat(values)) for point, values in found.items()}


def thinned(values: Tensor) -> Tensor:
    return values[torch.randperm(values.numel(), generator=torch.Generator().manual_seed(2))[:20_000]]


def measured(name: str, target: Target) -> Iterator[tuple[str, int, Tensor, tuple[Tensor, Tensor]]]:
    """Of each point that the target quantizes: its bits, what passes it, and its range."""
    model, task = settled(name)
    tape = read(model, task, Ctx.create())
    acts = activation_points(tape, model, target)
    points = {
        point: spec(bits) for point, bits in ({f"{layer}:input": bits for layer, bits in acts.at_layers.items()} | acts.elsewhere).items()
    }
    ranges, values = closed_ranges(tape, model, points, task), passing(model, task, points)
    assert points
    for point in points:
        yield point, points[point].bits, values[point], ranges[point]


# Sums and products are taken for heavier-tailed than they are on noise; densenet norms what has been rectified already.
FACTORS = {"resnet_basic": 2.2, "resnet_bottleneck": 2.2, "densenet": 3.6, "grouped": 2.2, "without_norm": 1.9}


@pytest.mark.parametrize("name", NAMES)
def test_error_is_near_the_least_there_is_on_tiny_networks(name: str) -> None:
    for point, bits, x, found in measured(name, Target(8, 4, protocol="paper")):
        assert error(x, *found, bits) <= FACTORS.get(name, 1.5) * least_error(x, bits), point


@pytest.mark.parametrize("name", [name for name in NAMES if name != "transformer"])
def test_eight_bits_lose_little_wherever_a_runtime_rounds(name: str) -> None:
    share = {"densenet": 1e-2, "branching": 3e-3}.get(name, 2e-3)
    for point, bits, x, found in measured(name, Target(8, 8, protocol="deploy")):
        assert error(x, *found, bits) < share * float(x.var()), point


# ---------------------------------------------------------------- sources with just the assumed moments


class Sides(nn.Module):
    """Norms of the two halves of an input with known moments, an operation on them, and what reads its result."""

    def __init__(self, operation: Callable[..., Tensor], **parts: nn.Module):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.one, self.two = nn.Conv2d(4, 4, 1, groups=4, bias=False), nn.Conv2d(4, 4, 1, groups=4, bias=False)
        self.norm_one, self.norm_two = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        for layer in (self.one, self.two):
            nn.init.ones_(layer.weight)
        for norm in (self.norm_one, self.norm_two):
            norm.weight.data = torch.randn(4, generator=generator) + 0.3
            norm.bias.data = torch.randn(4, generator=generator)
        self.slopes = nn.Parameter(torch.tensor([0.1, 0.5, 1.0, 0.0]))
        self.operation = operation
        for name, part in parts.items():
            self.add_module(name, part)
        self.last = nn.Identity()
        self.head = nn.LazyLinear(2)

    def forward(self, x: Tensor) -> Tensor:
        one, two = x.chunk(2, dim=1)
        found: Tensor = self.head(self.last(self.operation(self, self.norm_one(self.one(one)), self.norm_two(self.two(two)))).flatten(1))
        return found


def made(operation: Callable[..., Tensor], **parts: nn.Module) -> tuple[Sides, Flow]:
    model = Sides(operation, **parts).eval()
    example = torch.zeros(2, 8, SIZE, SIZE)
    with torch.no_grad():
        model(example)
    return model.requires_grad_(False), flow(model, example)


POINT = "last:input"
TASK = Task(shape=(8, SIZE, SIZE))


def pictures(samples: int) -> Tensor:
    """Standard normal pictures whose pixels correlate by 0.6 to the L1 distance."""
    factor = torch.linalg.cholesky(tap_correlation((SIZE, SIZE)).double()).float()
    noise = torch.randn(samples, 8, SIZE * SIZE, generator=torch.Generator().manual_seed(4))
    return (noise @ factor.T).view(samples, 8, SIZE, SIZE)


def behind(model: Sides, inputs: Tensor) -> Tensor:
    """What passes the point."""
    found: list[Tensor] = []
    handle = model.last.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    model(inputs)
    handle.remove()
    return found[0]


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "nothing": lambda net, a, b: a,
    "relu": lambda net, a, b: F.relu(a),
    "relu6": lambda net, a, b: F.relu6(a),
    "leaky relu": lambda net, a, b: F.leaky_relu(a, 0.2),
    "prelu": lambda net, a, b: F.prelu(a, net.slopes),
    "silu": lambda net, a, b: F.silu(a),
    "gelu": lambda net, a, b: F.gelu(a),
    "hardswish": lambda net, a, b: F.hardswish(a),
    "sigmoid": lambda net, a, b: torch.sigmoid(a),
    "in place": lambda net, a, b: a.relu_(),
    "concat": lambda net, a, b: torch.cat([F.relu(a), b], 1),
    "prelu of a concat": lambda net, a, b: F.prelu(torch.cat([a, b], 1), net.slopes.repeat(2)),
    "sum": lambda net, a, b: a + b,
    "relu of a sum": lambda net, a, b: F.relu(a + b),
    "average": lambda net, a, b: F.avg_pool2d(F.relu(a), 2),
    "global average": lambda net, a, b: F.relu(a).mean((2, 3)),
    "upsampled": lambda net, a, b: F.interpolate(F.relu(a), scale_factor=2),
    "maximum": lambda net, a, b: F.max_pool2d(F.relu(a), 2),
    "rearranged": lambda net, a, b: F.relu(a).permute(0, 2, 3, 1).reshape(-1, 4, SIZE, SIZE),
}
# Some are given room on purpose.
WIDER = {"relu of a sum": 1.2, "global average": 1.8}


@pytest.mark.parametrize(("bits", "factor"), [(3, 1.3), (5, 2.0)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_error_is_near_the_least_there_is_where_values_are_normal(name: str, bits: int, factor: float) -> None:
    model, tape = made(OPERATIONS[name])
    found = closed_ranges(tape, model, {POINT: spec(bits)}, TASK)[POINT]
    x = thinned(behind(model, pictures(600)).flatten())
    assert error(x, *found, bits) <= WIDER.get(name, 1.0) * factor * least_error(x, bits)


def ends(ranges: Ranges, bits: int, point: str = POINT) -> tuple[float, float]:
    scale, zero = map(float, ranges[point])
    return -scale * zero, scale * (2**bits - 1 - zero)


def test_bounds_of_activation_functions_hold() -> None:
    model, tape = made(lambda net, a, b: F.relu6(a))
    model.norm_one.weight.data *= 20
    assert ends(closed_ranges(tape, model, {POINT: spec(8)}, TASK), 8) == (0, pytest.approx(6))
    for bits in (2, 4, 8):
        low, high = ends(closed_ranges(tape, model, {POINT: spec(bits)}, TASK), bits)
        assert low == 0 and high <= 6.00001


def test_ranges_follow_the_weights_that_are_handed_in() -> None:
    model, tape = made(lambda net, a, b: F.relu(a))
    before = ends(closed_ranges(tape, model, {POINT: spec(4)}, TASK), 4)
    model.norm_one.weight.data *= 3
    model.norm_one.bias.data *= 3
    assert ends(closed_ranges(tape, model, {POINT: spec(4)}, TASK), 4) == pytest.approx((0, 3 * before[1]))


def test_sums_are_given_more_room_than_a_norm_of_the_same_moments() -> None:
    model, tape = made(lambda net, a, b: a + b)
    alone, tape_alone = made(lambda net, a, b: a)
    alone.norm_one.bias.data = model.norm_one.bias + model.norm_two.bias
    alone.norm_one.weight.data = (model.norm_one.weight.square() + model.norm_two.weight.square()).sqrt()
    low, high = ends(closed_ranges(tape, model, {POINT: spec(6)}, TASK), 6)
    less = ends(closed_ranges(tape_alone, alone, {POINT: spec(6)}, TASK), 6)
    assert low < less[0] and high > 1.1 * less[1]


def test_averages_vary_less_than_pixels() -> None:
    pixels, fewer, none = (
        ends(closed_ranges(*reversed(made(operation)), {POINT: spec(3)}, TASK), 3)[1]
        for operation in (
            lambda net, a, b: F.relu(a),
            lambda net, a, b: F.avg_pool2d(F.relu(a), 2),
            lambda net, a, b: F.adaptive_avg_pool2d(F.relu(a), 1),
        )
    )
    assert none < 0.9 * pixels and none < fewer < pixels


def test_a_module_called_twice_takes_both_calls_into_account() -> None:
    small, large = (
        ends(closed_ranges(*reversed(made(operation, act=nn.ReLU())), {"act:output": spec(4)}, TASK), 4, "act:output")[1]
        for operation in (lambda net, a, b: net.act(a) + 9 * b, lambda net, a, b: net.act(a) + net.act(9 * b))
    )
    assert large > 2 * small


@pytest.mark.parametrize(
    ("task", "expected"), [(Task(shape=(3, 8, 8), mean=(0.5, 0.4, 0.3), std=(0.2,)), (-2.5, 3.5)), (PLAIN, (0.0, 1.0))]
)
def test_pixels_take_their_whole_range(task: Task, expected: tuple[float, float]) -> None:
    model = nn.Sequential(*conv_bn(3, 4), nn.ReLU()).eval()
    found = ends(closed_ranges(read(model, task, Ctx.create()), model, {"0:input": spec(8)}, task), 8, "0:input")
    assert found == pytest.approx(expected, rel=0.03, abs=0.01)


def test_aciq_takes_the_clip_of_a_laplacian_tensor() -> None:
    model, tape = made(lambda net, a, b: F.relu(a))
    model.norm_one.bias.data.zero_()
    model.norm_one.weight.data.fill_(2.0)
    found = closed_ranges(tape, model, {POINT: spec(4)}, TASK, "aciq")
    expected = float(aciq(torch.tensor(2 / 2**0.5), 4, "laplace", one_sided=True))
    assert ends(found, 4) == (0, pytest.approx(expected, rel=0.02))
    signed, tape_signed = made(lambda net, a, b: a)
    signed.norm_one.bias.data.fill_(1.0)
    signed.norm_one.weight.data.fill_(2.0)
    low, high = ends(closed_ranges(tape_signed, signed, {POINT: spec(4)}, TASK, "aciq"), 4)
    expected = float(aciq(torch.tensor(2 / 2**0.5), 4, "laplace"))
    assert high - low == pytest.approx(2 * expected, rel=0.02) and high + low == pytest.approx(2.0, abs=(high - low) / 15)


def test_sources_of_points() -> None:
    model, tape = made(lambda net, a, b: torch.cat([F.relu(a + b), F.max_pool2d(b, 3, 1, 1)], 1))
    (index,) = point_nodes(tape, POINT)
    assert sorted(tape.nodes[each].op for each in sources(tape, index)) == ["add", "batch_norm"]
    assert point_nodes(tape, "nowhere:input") == []


# ---------------------------------------------------------------- refusals


def test_points_behind_an_attention_are_named() -> None:
    model, task = build("transformer")
    points = {"blocks.0.fc2:input": spec(8), "blocks.1.proj:input": spec(8)}
    with pytest.raises(NetworkError, match=r"what passes blocks\.1\.proj:input \(.*take activation ranges from pictures or noise"):
        closed_ranges(read(model, task, Ctx.create()), model, points, task)


def test_points_that_nothing_is_known_to_pass_are_named() -> None:
    model, tape = made(lambda net, a, b: F.relu(a))
    with pytest.raises(NetworkError, match="what passes nowhere:output"):
        closed_ranges(tape, model, {"nowhere:output": spec(8)}, TASK)


@pytest.mark.parametrize("wrong", [QSpec(8), QSpec(8, symmetric=False, axis=0)])
def test_grids_other_than_those_of_activations_are_refused(wrong: QSpec) -> None:
    model, tape = made(lambda net, a, b: F.relu(a))
    with pytest.raises(TargetError, match="one scale"):
        closed_ranges(tape, model, {POINT: wrong}, TASK)


def test_parameters_of_channels_that_cannot_be_told_apart_are_refused() -> None:
    model = Scripted(
        lambda net, x: net.last(net.act(net.first(x))), first=nn.Conv1d(2, 3, 3, padding=1), act=nn.PReLU(3), last=nn.Conv1d(3, 1, 1)
    )
    nn.init.ones_(model.first.bias)  # so that the border differs
    stacked = nn.Sequential(nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2), nn.ReLU(), model.eval()).eval()
    task = Task(shape=(2, 9))
    with pytest.raises(NetworkError, match=r"a prelu in 3\.act has parameters of 3 channels, and statistics are known of 27"):
        closed_ranges(read(stacked, task, Ctx.create()), stacked, {"3.last:input": spec(8)}, task)
