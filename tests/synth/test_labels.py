"""Labels of one class and of several, and how often each is drawn."""

import torch

from datafree.synth.labels import Blend, Superposed, one_class


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_labels_are_classes_or_shares_that_add_up() -> None:
    assert Blend(torch.tensor([[2], [0]]), torch.ones(2, 1)).labels(3).tolist() == [2, 0]
    shares = Blend(torch.tensor([[2, 0], [1, 1]]), torch.tensor([[0.25, 0.75], [0.5, 0.5]])).labels(3)
    assert shares.tolist() == [[0.75, 0.0, 0.25], [0.0, 1.0, 0.0]]


def test_single_classes_are_drawn_evenly() -> None:
    blend = one_class(5000, 5, seeded())
    assert (blend.classes.flatten().bincount() - 1000).abs().max() < 120 and bool((blend.shares == 1).all())


def test_a_superposed_label_adds_up_and_repeats_accumulate() -> None:
    blend = Superposed(1.0, 7)(50, 3, seeded())  # seven of three: some are drawn twice
    assert blend.classes.shape == blend.shares.shape == (50, 7)
    labels = blend.labels(3)
    torch.testing.assert_close(labels.sum(1), torch.ones(50))
    for row in range(50):
        for y in range(3):
            torch.testing.assert_close(labels[row, y], blend.shares[row][blend.classes[row] == y].sum())


def test_shares_are_the_softmax_of_normal_numbers() -> None:
    shares = Superposed(1.0, 2)(20000, 5, seeded()).shares
    apart = (shares[:, 0].logit()).std()  # the difference of two standard normal numbers
    assert abs(float(apart) - 2**0.5) < 0.03


def test_the_coin_falls_once_a_batch_with_its_probability() -> None:
    policy, generator = Superposed(0.4, 3), seeded()
    counts = [policy(4, 10, generator).classes.shape[1] for _ in range(1000)]
    assert set(counts) == {1, 3} and abs(counts.count(3) - 400) < 60


def test_without_chance_and_with_one_slot_each_input_shows_one_class() -> None:
    generator, reference = seeded(), seeded()
    blend = Superposed(0.0, 3)(8, 10, generator)
    torch.rand((), generator=reference)  # the coin
    assert torch.equal(blend.classes, one_class(8, 10, reference).classes)
    single = Superposed(1.0, 1)(8, 10, seeded(1))
    assert single.labels(10).shape == (8,) and bool((single.shares == 1).all())
