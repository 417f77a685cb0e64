import math

import pytest
import torch
from torch import Tensor

from datafree.errors import MethodError, NetworkError
from datafree.synth.prior import FAMILIES, Family, dead_leaves, patterns, pictures, pink_noise, white_noise
from datafree.task import Task

SHAPES = [(1, 32, 32), (3, 32, 32), (4, 17, 23), (12, 8, 8), (3, 5, 40), (2, 64), (1, 33), (3, 6, 7, 9), (3, 1, 1), (10,)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n", [64, 7])
def test_a_batch_of_any_shape_has_mean_0_and_variance_1(family: Family, shape: tuple[int, ...], n: int) -> None:
    batch = patterns(family, n, shape, seeded())
    assert batch.shape == (n, *shape) and batch.dtype == torch.float32
    channels = batch.transpose(0, 1).flatten(1).double()
    assert channels.mean(1).abs().max() < 1e-4
    assert (channels.square().mean(1) - 1).abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("mean", "std"), [((0.0,), (1.0,)), ((0.0,), (1 / 255,)), ((0.5,), (0.5,)), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
)
def test_pictures_are_pixels_between_black_and_white_with_the_spread_of_photographs(
    family: Family, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    task = Task(shape=(3, 32, 32), mean=mean, std=std)
    batch = pictures(family, 64, task, seeded())
    low, high = task.limits
    assert low - 1e-5 * (high - low) <= batch.min() and batch.max() <= high + 1e-5 * (high - low)
    pixels = batch * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    assert -1e-5 <= pixels.min() < 0.01 and 0.99 < pixels.max() <= 1 + 1e-5
    assert 0.38 < pixels.mean() < 0.52 and 0.18 < pixels.std() < 0.28


@pytest.mark.parametrize("family", FAMILIES)
def test_one_picture_alone_is_finite(family: Family) -> None:
    assert torch.isfinite(pictures(family, 1, Task(shape=(3, 16, 16)), seeded())).all()
    assert patterns(family, 1, (1, 1), seeded()).tolist() == [[[0.0]]]  # nothing to scale


@pytest.mark.parametrize("family", FAMILIES)
def test_the_generator_alone_decides(family: Family) -> None:
    task = Task(shape=(3, 20, 24))
    state = torch.random.get_rng_state()
    first = pictures(family, 9, task, seeded(5))
    assert torch.equal(first, pictures(family, 9, task, seeded(5)))
    assert not torch.equal(first, pictures(family, 9, task, seeded(6)))
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_generator_goes_on_to_other_pictures() -> None:
    generator, task = seeded(), Task(shape=(3, 16, 16))
    assert not torch.equal(pictures("leaves", 4, task, generator), pictures("leaves", 4, task, generator))


def test_mix_alternates_its_families() -> None:
    batch = patterns("mix", 65, (1, 32, 32), seeded())
    assert edge_kurtosis(batch[0::2]) > 10
    assert abs(edge_kurtosis(batch[1::2]) - 3) < 0.5
    assert [float(part.square().mean()) for part in (batch[0::2], batch[1::2])] == pytest.approx([1.0, 1.0], abs=1e-3)


def edge_kurtosis(batch: Tensor) -> float:
    """Of the differences of neighbouring pixels: 3 for Gaussian noise of any spectrum, more with flat regions and edges."""
    steps = batch.diff(dim=-1).double().flatten()
    return float((steps - steps.mean()).pow(4).mean() / steps.var().square())


@pytest.mark.parametrize("size", [32, 96])
def test_dead_leaves_have_flat_regions_and_edges(size: int) -> None:
    leaves = dead_leaves(32, (3, size, size), seeded())
    assert edge_kurtosis(leaves) > 8
    assert edge_kurtosis(pink_noise(32, (3, size, size), seeded())) == pytest.approx(3, abs=0.3)


def test_dead_leaves_without_texture_show_few_values_in_connected_regions() -> None:
    leaves = dead_leaves(16, (1, 64, 64), seeded(), texture=0.0)
    colours = [picture.unique().numel() for picture in leaves]
    assert min(colours) > 15  # things of many sizes, not hidden by a few
    assert max(colours) <= 1 + round(60 * 2 ** (math.log(10 / 3) / math.log(7)))  # no more than leaves and what lies behind
    assert (leaves.diff(dim=-1) == 0).float().mean() > 0.7  # what is next to a pixel mostly belongs to the same leaf
    areas = torch.cat([picture.unique(return_counts=True)[1] for picture in leaves])
    assert areas.min() < 10 and areas.max() > 1000


def test_leaves_turn_in_all_directions_and_lie_everywhere() -> None:
    leaves = dead_leaves(400, (1, 32, 32), seeded(), texture=0.0)[:, 0]
    across, down = (leaves.diff(dim=axis).ne(0).float().mean() for axis in (2, 1))
    assert float(across) == pytest.approx(float(down), rel=0.1)
    edges = leaves.diff(dim=2).ne(0).float().mean(0)
    halves = edges[:, :15].mean(), edges[:, 16:].mean()
    assert float(halves[0]) == pytest.approx(float(halves[1]), rel=0.1)


def test_channels_of_a_leaf_differ_by_its_colour() -> None:
    leaves = dead_leaves(200, (3, 32, 32), seeded(), texture=0.0).transpose(0, 1).flatten(1)
    assert leaves.var(1).tolist() == pytest.approx([1 + 0.35**2] * 3, rel=0.15)
    correlation = torch.corrcoef(leaves)[0, 1]
    assert float(correlation) == pytest.approx(1 / (1 + 0.35**2), abs=0.05)


@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 63, 65), (2, 255), (1, 24, 24, 24)], ids=str)
def test_pink_noise_falls_as_one_over_frequency(shape: tuple[int, ...]) -> None:
    dims = tuple(range(2, 1 + len(shape)))
    power = torch.fft.fftn(pink_noise(300, shape, seeded()).double(), dim=dims).abs().square().mean((0, 1))
    grid = torch.meshgrid(*(torch.fft.fftfreq(size, dtype=torch.float64) for size in shape[1:]), indexing="ij")
    frequency = torch.stack(grid).square().sum(0).sqrt().flatten()
    away = frequency > 1.5 / max(shape[1:])
    x, y = frequency[away].log(), power.flatten()[away].log()
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    assert slope == pytest.approx(-2, abs=0.05)  # of the power, the square of the amplitude


def test_colours_of_pink_noise_follow_the_luminance() -> None:
    noise = pink_noise(400, (4, 32, 32), seeded()).transpose(0, 1).flatten(1)
    assert noise.var(1).tolist() == pytest.approx([1.0] * 4, rel=0.1)
    between = torch.corrcoef(noise)[~torch.eye(4, dtype=torch.bool)]
    assert between.tolist() == pytest.approx([0.81] * 12, abs=0.04)  # 0.9 with the luminance, so 0.9^2 with one another


def test_white_noise_has_no_neighbourhoods() -> None:
    noise = white_noise(100, (3, 32, 32), seeded())
    assert abs(float((noise[..., 1:] * noise[..., :-1]).mean())) < 0.01
    assert float(noise.std()) == pytest.approx(1, abs=0.01)


def test_a_vector_gets_independent_entries_whatever_the_family() -> None:
    task = Task(shape=(6,))
    expected = pictures("white", 20, task, seeded())
    assert all(torch.equal(pictures(family, 20, task, seeded()), expected) for family in FAMILIES)


def test_refuses_what_is_no_family_no_picture_and_no_number() -> None:
    task = Task(shape=(3, 8, 8))
    with pytest.raises(MethodError, match="leaves, pink, white, mix"):
        pictures("photos", 4, task, seeded())
    with pytest.raises(NetworkError, match="at least 1"):
        pictures("pink", 0, task, seeded())
    for draw in (pink_noise, dead_leaves):
        with pytest.raises(NetworkError, match="channels"):
            draw(4, (3,), seeded())
