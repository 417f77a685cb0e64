"""The low-pass keeps what is slow, texture does not depend on the contrast, and procedural pictures lie within their own band."""

import math

import pytest
import torch
from torch import Tensor

from datafree.synth.filters import low_pass, masks, natural_band, texture, texture_gap
from datafree.synth.prior import patterns
from datafree.task import Task

TASK = Task(shape=(3, 16, 16))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def wave(side: int, cycles: int) -> Tensor:
    return torch.sin(2 * math.pi * cycles * torch.arange(side) / side)


@pytest.mark.parametrize("cycles", (0, 1, 3, 6))
def test_each_frequency_is_damped_as_told(cycles: int) -> None:
    x = (wave(16, cycles) + 1).view(1, 1, 16, 1).expand(2, 3, 16, 15)
    expected = 1 + math.exp(-((cycles / 4) ** 2) / 2) * (x - 1)
    torch.testing.assert_close(low_pass(x, 4.0), expected, atol=1e-5, rtol=0)
    along = x[:, :, :, 0]
    torch.testing.assert_close(low_pass(along, 4.0), expected[:, :, :, 0], atol=1e-5, rtol=0)


def test_no_cutoff_and_no_axes_leave_inputs_alone() -> None:
    x = TASK.noise(2, seeded())
    assert low_pass(x, 0.0) is x and not torch.equal(low_pass(x, 4.0), x)
    assert low_pass(x[:, :, 0, 0], 1.0).equal(x[:, :, 0, 0])


def test_there_are_25_masks_of_which_all_but_the_level_are_blind_to_it() -> None:
    found = masks(2, torch.device("cpu"))
    assert found.shape == (25, 5, 5) and len({tuple(each.flatten().tolist()) for each in found}) == 25
    assert found.sum((1, 2)).tolist() == [256.0] + [0.0] * 24
    assert found[1].tolist() == torch.outer(torch.tensor([1.0, 4, 6, 4, 1]), torch.tensor([-1.0, -2, 0, 2, 1])).tolist()


def test_texture_has_24_numbers_that_contrast_does_not_change() -> None:
    x = TASK.noise(4, seeded())
    assert texture(x).shape == (4, 24)
    torch.testing.assert_close(texture(7.5 * x), texture(x))
    assert not torch.allclose(texture(low_pass(x, 2.0)), texture(x), atol=0.1)
    assert [texture(Task(shape=shape).noise(2, seeded())).shape[1] for shape in ((4, 9), (4,), (1, 2, 2))] == [4, 0, 24]
    assert torch.isfinite(texture(torch.zeros(2, 3, 8, 8))).all()


def test_procedural_pictures_lie_in_the_band_and_noise_does_not() -> None:
    band = natural_band(TASK, seeded())
    low, high = band
    assert low.shape == high.shape == (24,) and (low < high).all()
    natural, noise = (
        texture_gap(x, band) for x in (patterns("mix", 64, TASK.shape, seeded(1)), torch.randn(64, *TASK.shape, generator=seeded(1)))
    )
    assert natural < 0.1 * noise
    inside = patterns("mix", 64, TASK.shape, seeded(1))
    within = ((texture(inside) >= low) & (texture(inside) <= high)).all(1)
    assert within.any() and texture_gap(inside[within], band) == 0
