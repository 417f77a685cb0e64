"""Attention maps and what is asked of them: against their definitions, at their bounds, and on networks of every shape."""

import pytest
import torch
from torch import Tensor, nn

from datafree.context import Ctx
from datafree.graph.taps import anchored, outputs
from datafree.synth.attention import Placed, attention, centre, disagreement, off_centre, sameness, spatial_module
from networks import build


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=seeded())


@pytest.mark.parametrize(
    ("network", "name"),
    (
        ("cifar_resnet", "layer2"), ("resnet_basic", "layers"), ("resnet_bottleneck", "layers"), ("densenet", "norm5"),
        ("mobilenet", "4"), ("vgg", "13"), ("twice", "shared"), ("branching", "bn_b"), ("grouped", "head"), ("sequence", "8"),
        ("without_norm", "5"), ("transformer", None),
    ),
)  # fmt: skip
def test_the_last_features_with_spatial_axes_are_found(network: str, name: str | None) -> None:
    assert spatial_module(*build(network), Ctx.create(0)) == name


@pytest.mark.parametrize("sizes", ((6,), (4, 6), (2, 3, 4)), ids=str)
def test_attention_adds_up_to_1_and_is_the_share_of_the_squares(sizes: tuple[int, ...]) -> None:
    features = normal(3, 5, *sizes)
    seen = attention(features)
    assert seen.shape == (3, *sizes)
    torch.testing.assert_close(seen.flatten(1).sum(1), torch.ones(3))
    torch.testing.assert_close(seen[1], features[1].square().sum(0) / features[1].square().sum())


def test_attention_to_nothing_is_even() -> None:
    torch.testing.assert_close(attention(torch.zeros(2, 3, 4, 4)), torch.full((2, 4, 4), 1 / 16))


@pytest.mark.parametrize("sizes", ((6,), (4, 6), (2, 3, 4)), ids=str)
def test_the_centre_of_one_cell_is_its_middle_and_of_an_even_map_the_middle(sizes: tuple[int, ...]) -> None:
    at = [size - 1 for size in sizes]
    hot = torch.zeros(1, *sizes)
    hot[(0, *at)] = 1
    torch.testing.assert_close(centre(hot)[0], torch.tensor([(place + 0.5) / size for place, size in zip(at, sizes, strict=True)]))
    torch.testing.assert_close(centre(attention(torch.ones(2, 3, *sizes))), torch.full((2, len(sizes)), 0.5))


def test_off_centre_is_the_squared_distance() -> None:
    hot = torch.zeros(2, 4, 4)
    hot[0, 0, 3] = hot[1, 1, 1] = 1
    place = torch.tensor([[0.5, 0.5], [0.375, 0.375]])
    assert off_centre(hot, place).item() == pytest.approx((0.375**2 + 0.375**2) / 2)


def test_sameness_is_minus_the_ratio_of_distances_at_most_1() -> None:
    features, noise = torch.zeros(4, 2, 3, 3), torch.zeros(4, 5)
    features[0, 0], features[1, 1, 0] = 0.5, 30.0  # pooled: 0.5 and 10
    noise[:2] = 0.2
    assert sameness(features, noise).item() == pytest.approx(-(0.5 + 1) / 2)
    order = torch.tensor([2, 3, 0, 1])
    assert sameness(features[order], noise[order]).item() == pytest.approx(-(0.5 + 1) / 2)
    assert sameness(features.zero_(), noise) == 0


def test_pairs_show_the_same_and_sameness_takes_them() -> None:
    for n in (6, 7):
        blend = Placed(2)(n, 1000, seeded())
        half = (n + 1) // 2
        assert blend.place is not None and blend.place.shape == (n, 2) and blend.classes.shape == (n, 1)
        for each in (blend.classes, blend.place):
            assert torch.equal(each[half:], each[: n - half]) and len(each[:half].unique(dim=0)) == half
        assert blend.place.min() >= 0.2 and blend.place.max() <= 0.8
        assert sameness(normal(n, 3, 4, 4), normal(n, 5)).shape == ()


def test_places_cover_their_range() -> None:
    place = Placed(1, pairs=False)(2000, 5, seeded()).place
    assert place is not None and 0.2 <= place.min() < 0.21 and 0.79 < place.max() <= 0.8 and abs(place.mean() - 0.5) < 0.02
    assert Placed(0)(4, 5, seeded()).place is None


def test_disagreement_is_symmetric_and_does_not_depend_on_the_number_of_cells() -> None:
    one, other = attention(normal(3, 2, 4, 4)), attention(normal(3, 2, 4, 4).flip(0))
    assert disagreement(one, one) == 0 and disagreement(one, other) == disagreement(other, one) > 0
    larger = [each.repeat_interleave(2, 1).repeat_interleave(2, 2) / 4 for each in (one, other)]
    torch.testing.assert_close(disagreement(*larger), disagreement(one, other))


def test_both_modes_agree_where_the_batch_has_the_stored_statistics_which_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    x, norm = normal(5, 3, 8, 8), model[1]
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None

    def modes() -> Tensor:
        with torch.no_grad():
            stored = model(x)
            with anchored(model), outputs(model, "2") as features:
                model(x)
        return disagreement(attention(stored), attention(features[-1]))

    with torch.no_grad():
        before = model[0](x)
        norm.running_mean.add_(0.5)
        kept = [each.clone() for each in model.state_dict().values()]
        assert modes() > 1e-4 and all(map(torch.equal, kept, model.state_dict().values()))
        norm.running_mean.copy_(before.mean((0, 2, 3)))
        norm.running_var.copy_(before.var((0, 2, 3), correction=0))
    assert modes() < 1e-10
