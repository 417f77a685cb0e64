"""SQuant against loops over single entries, and the bounds on its sums of errors; the ranges of its method."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from datafree import Plan, Target, Task, quantize
from datafree.closed.squant import squant
from datafree.errors import NetworkError
from datafree.methods.squant import SQuant, deviations
from datafree.plan import QSpec
from datafree.quant import grid
from datafree.quant.insert import codes_of, latent_weight, quantizers, weight_quantizer
from datafree.quant.ranges import minmax, mse
from networks import build
from tests.reference import rounding as reference

SPECS = (
    QSpec(4, symmetric=False, axis=0),
    QSpec(2, symmetric=False, axis=0),
    QSpec(3, axis=0),
    QSpec(2, axis=0, grid="ternary"),
    QSpec(3, axis=0, grid="dorefa"),
)
SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 6), st.sampled_from([1, 2, 9]))


def weights(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def steps(weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return weight / scale[:, None, None] + zero[:, None, None]


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 100_000), shape=SHAPES, spec=st.sampled_from(SPECS), stages=st.sampled_from(["ekc", "ek", "ec"]))
def test_equals_loops(seed: int, shape: tuple[int, int, int], spec: QSpec, stages: str) -> None:
    weight = weights(shape, seed)
    scale, zero = minmax(weight, spec)
    expected, _ = reference.squant(weight, scale, zero, spec, stages)
    found = squant(weight, scale, zero, spec, stages)  # type: ignore[arg-type]
    assert found.dtype == torch.int16 and torch.equal(found, expected)


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 100_000), shape=SHAPES, spec=st.sampled_from(SPECS))
def test_codes_stay_on_the_grid_also_where_the_range_clips(seed: int, shape: tuple[int, int, int], spec: QSpec) -> None:
    weight = weights(shape, seed)
    scale, zero = mse(weight, spec)
    codes = squant(0.5 * scale.mean() + weight, scale, zero, spec)
    assert codes.min() >= spec.levels[0] and codes.max() <= spec.levels[1]


@pytest.mark.parametrize("taps", [1, 9])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_sums_of_errors_are_bounded(bits: int, taps: int) -> None:
    spec, weight = QSpec(bits, symmetric=False, axis=0), weights((12, 20, taps), bits)
    scale, zero = minmax(weight, spec)
    t = steps(weight, scale, zero)
    after_k = squant(weight, scale, zero, spec, "ek") - t
    after_c = squant(weight, scale, zero, spec) - t
    assert after_c.abs().max() < 1
    assert after_c.sum((1, 2)).abs().max() <= 0.5 + 1e-3
    if taps > 1:
        assert after_k.sum(2).abs().max() <= 0.5 + 1e-3
        assert after_c.sum(2).abs().max() <= 1 + 1e-3
        assert after_k.sum((1, 2)).abs().max() > 0.5  # so C had something to do
        _, sums = reference.squant(weight, scale, zero, spec)
        assert torch.allclose(after_k.sum(2), torch.tensor(sums), atol=1e-3)


def test_kernels_are_skipped_at_one_tap_and_all_entries_serve_the_channel() -> None:
    spec, weight = QSpec(4, symmetric=False, axis=0), weights((5, 30, 1), 3)
    scale, zero = minmax(weight, spec)
    nearest = grid.quantize(weight, scale, zero, spec)
    assert torch.equal(squant(weight, scale, zero, spec, "ek"), nearest)
    found = squant(weight, scale, zero, spec)
    assert torch.equal(found, squant(weight.transpose(1, 2), scale, zero, spec, "ek").transpose(1, 2))  # one kernel of 30 taps
    assert not torch.equal(found, nearest)


def test_a_depthwise_layer_needs_no_channel_stage() -> None:
    spec, weight = QSpec(4, symmetric=False, axis=0), weights((40, 1, 9), 4)
    scale, zero = minmax(weight, spec)
    kernels = squant(weight, scale, zero, spec, "ek")
    assert torch.equal(squant(weight, scale, zero, spec), kernels)
    assert not torch.equal(kernels, grid.quantize(weight, scale, zero, spec))


def test_rows_without_a_sum_of_errors_do_not_change() -> None:
    spec = QSpec(4, axis=0)
    row = torch.tensor([0.25, -0.25, 0.5, -0.5, 3.0, 0.0, 0.375, -0.375, -2.0])  # exact in float
    codes = squant(row.view(1, 1, 9), torch.ones(1), torch.zeros(1), spec)
    assert codes.flatten().tolist() == [0, 0, 0, 0, 3, 0, 0, 0, -2]
    assert squant(torch.zeros(2, 3, 9), torch.ones(2), torch.zeros(2), spec).abs().max() == 0


def test_the_worked_example() -> None:
    spec, one, none = QSpec(4, axis=0), torch.ones(1), torch.zeros(1)
    kernels = torch.tensor([[[0.4, 0.3, 0.2], [0.4, 0.35, 0.0]]])  # e = -t: sums -0.9 and -0.75
    # K flips 0.4 in both, sums 0.1 and 0.25; C has a sum of 0.35 and leaves them
    assert squant(kernels, one, none, spec).flatten().tolist() == [1, 0, 0, 1, 0, 0]
    kernels = torch.tensor([[[0.4, 0.0], [0.35, 0.0], [0.2, 0.0]]])  # K flips none, C has -0.95: the first of the next in the queue
    assert squant(kernels, one, none, spec, "ek").flatten().tolist() == [0, 0, 0, 0, 0, 0]
    assert squant(kernels, one, none, spec).flatten().tolist() == [1, 0, 0, 0, 0, 0]
    kernels = torch.tensor([[[0.4, 0.2], [0.3, 0.25]]])  # K overshoots twice, sums 0.4 and 0.45; C has 0.85: 0.3 goes back
    assert squant(kernels, one, none, spec, "ek").flatten().tolist() == [1, 0, 1, 0]
    assert squant(kernels, one, none, spec).flatten().tolist() == [1, 0, 0, 0]


def test_too_few_candidates_at_the_end_of_the_grid() -> None:
    spec = QSpec(2, axis=0)  # -1, 0, 1
    kernel = torch.tensor([[[1.4, 1.45, 1.3, 1.4, 1.2, 0.4, 0.0, 0.0, 0.0]]])  # a sum of -2.15, but one entry may go up
    assert squant(kernel, torch.ones(1), torch.zeros(1), spec).flatten().tolist() == [1, 1, 1, 1, 1, 1, 0, 0, 0]
    assert squant(-kernel, torch.ones(1), torch.zeros(1), spec).flatten().tolist() == [-1, -1, -1, -1, -1, -1, 0, 0, 0]


def test_shapes_are_checked() -> None:
    with pytest.raises(NetworkError, match=r"weight \(2, 3\), scale \(2,\) and zero \(2,\) do not fit"):
        squant(torch.zeros(2, 3), torch.ones(2), torch.zeros(2), QSpec(4))
    with pytest.raises(NetworkError, match=r"expected \(out, in / groups, taps\)"):
        squant(torch.zeros(2, 3, 1), torch.ones(3), torch.zeros(3), QSpec(4))


def test_the_mean_of_an_output_moves_less_than_with_nearest() -> None:
    spec, weight = QSpec(3, symmetric=False, axis=0), weights((64, 32, 9), 9)
    scale, zero = minmax(weight, spec)
    shifts = [
        (grid.dequantize(codes, scale, zero, spec) - weight).sum((1, 2)).square().mean()
        for codes in (grid.quantize(weight, scale, zero, spec), squant(weight, scale, zero, spec))
    ]
    assert shifts[1] < 0.01 * shifts[0]


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
        model(noise)
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
            x = model.leaky(model.second(model.relu(model.first(torch.rand(256, 2, 12, 12)))))
        alpha = deviations(bits) / 1.25 * float(x[x > 0].std())
        alpha = min(alpha, float(x.abs().max())) if bits == 4 else alpha
        assert float(quantizer.scale) * (2**bits - 1) == pytest.approx(2 * alpha, rel=0.05)
        assert float(quantizer.zero) == 2 ** (bits - 1)


def test_ranges_of_activations_do_not_depend_on_the_bits_of_weights() -> None:
    model, task = build("cifar_resnet")
    found = [quantizers(quantize(model, task, method="squant", target=Target(bits, 4, protocol="paper")).student) for bits in (2, 8)]
    assert found[0] and all(torch.equal(found[0][point].scale, found[1][point].scale) for point in found[0])


@pytest.mark.parametrize("network", ["mobilenet", "sequence"])
@pytest.mark.parametrize(
    "method", [SQuant(), SQuant(symmetric=True, weight_range="mse"), SQuant(stages="ek"), SQuant(stages="ec")], ids=str
)
def test_the_method_gives_every_layer_its_codes(network: str, method: SQuant) -> None:
    model, task = build(network)
    student = quantize(model, task, method=method, target=Target(4, protocol="paper")).student
    plan: Plan = quantize(model, task, method=method, target=Target(4, protocol="paper")).plan
    changed = 0
    for name, layer_plan in plan.layers.items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor) and layer_plan.weight == QSpec(4, method.symmetric, 0)
        scale, zero = (minmax if method.weight_range == "minmax" else mse)(weight, layer_plan.weight)
        module = student.get_submodule(name)
        rows = weight.detach().reshape(*weight.shape[:2], -1)
        expected, _ = reference.squant(rows, scale, zero, layer_plan.weight, method.stages)
        assert torch.equal(codes_of(module), expected.view(weight.shape)) and torch.equal(weight_quantizer(module).scale, scale)
        changed += int((codes_of(module) != grid.quantize(weight, scale, zero, layer_plan.weight)).sum())
        assert latent_weight(module).shape == weight.shape
    assert changed > 0


def test_a_network_that_overflows_on_noise_is_refused() -> None:
    first = nn.Conv2d(4, 2, 1)
    model = nn.Sequential(first, nn.ReLU(), nn.Conv2d(2, 1, 1)).eval()
    nn.init.constant_(first.weight, 3e38)
    with pytest.raises(NetworkError, match="2:input: uniform noise gives NaN or infinity there"):
        quantize(model, Task(shape=(4, 4, 4)), method="squant", target=Target(8, 8, protocol="paper"))
