"""Ranges that hold a percentile of what passes, against sorting, and ranges that move; the others are tested with the quantizers."""

import pytest
import torch
from torch import Tensor, nn

from datafree.errors import NetworkError
from datafree.plan import Plan, QSpec
from datafree.quant.insert import insert, quantizers
from datafree.quant.observe import observe_moving, observe_percentile


def student(axis: int | None = None) -> nn.Module:
    return insert(nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU()).eval(), Plan({}, {"0:input": QSpec(8, symmetric=False, axis=axis)}))


def batches(n: int = 3) -> list[Tensor]:
    return [torch.randn(5, 2, 10, 10, generator=torch.Generator().manual_seed(i)) for i in range(n)]


@pytest.mark.parametrize("percentile", [100.0, 99.0, 90.0])
@pytest.mark.parametrize("axis", [None, 1])
def test_each_end_is_the_mean_over_the_batches_of_what_so_many_percent_do_not_pass(axis: int | None, percentile: float) -> None:
    model = student(axis)
    observe_percentile(model, batches(), percentile, lambda each, x: each(x))
    (quantizer,) = quantizers(model).values()
    for channel in range(2 if axis else 1):
        ends = []
        for x in batches():
            values = sorted((x[:, channel] if axis else x).flatten().double().tolist())
            beyond = round(len(values) * (1 - percentile / 100))
            ends.append((values[beyond], values[-1 - beyond]))
        low, high = (sum(each) / len(ends) for each in zip(*ends, strict=True))
        scale, zero = (each[channel] if axis else each for each in (quantizer.scale, quantizer.zero))
        assert float(scale) == pytest.approx((high - low) / 255) and float(zero) == round(-low / float(scale))


def test_activations_pass_unchanged_meanwhile_and_hooks_go() -> None:
    model, answers = student(), []
    observe_percentile(model, batches(), 90.0, lambda each, x: answers.append(each(x)))
    plain = nn.Sequential(*model.children())
    assert len(answers) == 3 and not any(quantizer._forward_hooks for quantizer in quantizers(model).values())
    assert not torch.equal(plain(batches()[0]), answers[0])


def test_a_point_that_sees_nothing_is_named() -> None:
    with pytest.raises(NetworkError, match="no value passed 0:input"):
        observe_percentile(student(), [], 99.0, lambda each, x: each(x))


def moved(values: list[float]) -> list[float]:
    """The end of the range after each batch of a constant."""
    model, found = student(), []
    (quantizer,) = quantizers(model).values()

    def run(each: nn.Module, x: Tensor) -> None:
        each(x)
        found.append(255 * float(quantizer.scale))

    observe_moving(model, [torch.full((1, 2, 1, 1), value) for value in values], run)
    return found


def test_a_constant_moves_no_range() -> None:
    assert moved([1.0] * 150) == pytest.approx([1.0] * 150, rel=1e-6)


def test_ranges_are_the_mean_of_few_batches_and_forget_the_first_of_many() -> None:
    values = [float(value) for value in range(1, 41)]
    found = moved(values)
    assert found[:10] == pytest.approx([sum(values[:n]) / n for n in range(1, 11)])
    expected = found[9]
    for value, end in zip(values[10:], found[10:], strict=True):
        expected = 0.9 * expected + 0.1 * value
        assert end == pytest.approx(expected)


def test_what_passes_is_quantized_by_the_range_so_far() -> None:
    model, answers = student(), []
    observe_moving(model, batches(), lambda each, x: answers.append(each(x)))
    assert torch.equal(model(batches()[-1]), answers[-1]) and not any(each._forward_hooks for each in quantizers(model).values())
    with pytest.raises(NetworkError, match="no value passed 0:input"):
        observe_moving(student(), [], lambda each, x: each(x))
