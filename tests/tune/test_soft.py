"""Soft rounding starts at the weight and ends on its grid; learned ranges quantize as ever, with the gradient of LSQ."""

import pytest
import torch
from torch import Tensor

from datafree.plan import QSpec
from datafree.quant.grid import dequantize, fake_quantize, quantize
from datafree.quant.quantizer import Quantizer
from datafree.quant.ranges import minmax, mse
from datafree.tune.soft import BETA, LEAST, LearnedRange, SoftWeight, annealed, logit, mixed, share, undecided

SPECS = (
    QSpec(3, symmetric=False, axis=0), QSpec(4, symmetric=True, axis=1), QSpec(2, symmetric=False), QSpec(2, axis=0, grid="ternary"),
    QSpec(3, axis=0, grid="dorefa"),
)  # fmt: skip


def random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def made(spec: QSpec, clip: bool = False, learn_scale: bool = True) -> tuple[Tensor, Quantizer, SoftWeight]:
    weight = torch.randn(4, 6, 3, generator=random())
    quantizer = Quantizer(spec, None if spec.axis is None else weight.shape[spec.axis])
    quantizer.set(*(mse if clip else minmax)(weight, spec))
    return weight, quantizer, SoftWeight(weight, weight, quantizer, learn_scale)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_it_starts_at_the_float_weight_and_within_its_grid(spec: QSpec) -> None:
    weight, quantizer, soft = made(spec)
    low, high = (dequantize(torch.full(weight.shape, code), quantizer.scale, quantizer.zero, spec) for code in spec.levels)
    inside = (weight >= low) & (weight <= high)
    assert inside.float().mean() > 0.5
    torch.testing.assert_close(soft(weight)[inside], weight[inside], atol=1e-5, rtol=1e-5)
    assert (soft(weight) >= low - 1e-6).all() and (soft(weight) <= high + 1e-6).all()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_hard_rounding_is_at_first_to_nearest_and_then_to_either_side(spec: QSpec) -> None:
    weight, quantizer, soft = made(spec, clip=True)
    assert torch.equal(soft.hard()[0], quantize(weight, quantizer.scale, quantizer.zero, spec).float())
    for side in (-9.0, 9.0):
        with torch.no_grad():
            soft.v.fill_(side)
        codes, scale = soft.hard()
        assert torch.equal(codes, (soft.base + (side > 0)).clamp(*spec.levels))
        assert torch.equal(soft(weight), dequantize(codes, scale, quantizer.zero, spec)), "a decided weight is on its grid"


def test_other_codes_are_where_it_starts_and_the_float_weight_says_which_way_it_leans() -> None:
    spec = QSpec(4, symmetric=False, axis=0)
    weight, quantizer, _ = made(spec)
    codes = (quantize(weight, quantizer.scale, quantizer.zero, spec) + 3).clamp(*spec.levels)
    given = dequantize(codes, quantizer.scale, quantizer.zero, spec)
    soft = SoftWeight(weight, given, quantizer, learn_scale=True)
    assert torch.equal(soft.hard()[0], codes.float())
    lean = (soft(given) - given) / quantizer.scale[:, None, None]
    assert (lean <= 0).all() and (lean >= -0.5).all() and (lean[codes < spec.levels[1]] < 0).all()


def test_the_scale_learns_alone_and_at_its_first_value_all_is_as_if_it_did_not() -> None:
    spec = QSpec(3, symmetric=False, axis=0)
    weight, _, joint = made(spec)
    fixed = made(spec, learn_scale=False)[2]
    assert torch.equal(joint(weight), fixed(weight)) and not fixed.scale.requires_grad
    before, codes = joint(weight).detach(), joint.hard()[0]
    with torch.no_grad():
        joint.scale.mul_(2)
    assert torch.equal(joint(weight), 2 * before) and torch.equal(joint.hard()[0], codes)
    with torch.no_grad():
        joint.scale.fill_(-1)
    assert torch.equal(joint.hard()[1], LEAST * fixed.scale)


def test_the_share_and_its_inverse() -> None:
    h = torch.linspace(0, 1, 11)
    torch.testing.assert_close(share(logit(h)), h)
    assert share(torch.tensor([-9.0, 0.0, 9.0])).tolist() == [0.0, 0.5, 1.0]


def test_the_rounding_term_counts_what_is_undecided() -> None:
    assert float(undecided(torch.tensor([-9.0, 9.0]), 5.0)) == 0
    assert float(undecided(torch.zeros(7), 5.0)) == 7
    v = logit(torch.tensor([0.75]))
    assert float(undecided(v, 2.0)) == pytest.approx(1 - 0.5**2, abs=1e-5)


def test_beta_falls_along_a_line_after_the_warm_up() -> None:
    assert annealed(0.0, 0.2) is None and annealed(0.19, 0.2) is None
    assert annealed(0.2, 0.2) == pytest.approx(BETA[0]) and annealed(0.6, 0.2) == pytest.approx(sum(BETA) / 2)
    assert annealed(1.0, 0.2) == pytest.approx(BETA[1])
    assert annealed(1.0, 1.0) == BETA[1]


def ranged(drop: float = 0.0, axis: int | None = None) -> tuple[Tensor, Quantizer, LearnedRange]:
    spec = QSpec(3, symmetric=False, axis=axis)
    x = torch.randn(2, 5, 6, generator=random())
    quantizer = Quantizer(spec)
    quantizer.set(*(0.6 * each if i == 0 else each for i, each in enumerate(minmax(x, spec))))  # the ends are clipped
    return x, quantizer, LearnedRange(quantizer, drop, random())


@pytest.mark.parametrize("axis", (None, 1))
def test_a_learned_range_quantizes_as_the_quantizer_does(axis: int | None) -> None:
    x, quantizer, learned = ranged(axis=axis)
    torch.testing.assert_close(learned(x), fake_quantize(x, quantizer.scale, quantizer.zero, quantizer.spec))


@pytest.mark.parametrize("axis", (None, 1))
def test_its_gradient_is_that_of_rounding_straight_through(axis: int | None) -> None:
    x, quantizer, learned = ranged(axis=axis)
    weight = torch.randn(x.shape, generator=random())
    x.requires_grad_()
    found = torch.autograd.grad((weight * learned(x)).sum(), (x, learned.scale))
    shape = (-1, 1) if axis else ()
    scale, zero = (each.reshape(shape) for each in (learned.scale, quantizer.zero))
    steps = x / scale
    codes = (steps + (steps.round() - steps).detach() + zero).clamp(*quantizer.spec.levels)
    expected = torch.autograd.grad((weight * scale * (codes - zero)).sum(), (x, learned.scale))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert (found[0] == 0).any() and (found[0] != 0).any(), "some values were clipped, some not"


def test_a_share_of_the_values_is_dropped_and_passes_in_float() -> None:
    x, quantizer, learned = ranged(drop=1.0)
    assert torch.equal(learned(x), x)
    x, quantizer, learned = ranged(drop=0.25)
    passed = torch.stack([learned(x) == x for _ in range(40)]).float()
    assert 0.2 < passed.mean() < 0.3 and passed.std(0).min() > 0, "each value has its turn"


def test_without_dropping_nothing_is_drawn() -> None:
    generator = random()
    before, x = generator.get_state(), torch.zeros(3)
    assert mixed(x, x + 1, 0.0, generator) is x and torch.equal(generator.get_state(), before)
