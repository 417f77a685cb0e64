"""Noise, procedural pictures and pools behind one interface."""

import pytest
import torch
from torch import nn

from datafree.errors import MethodError, NetworkError
from datafree.fit import Stateful
from datafree.synth.prior import pictures
from datafree.synth.source import Batch, Gaussian, Mixed, Pool, Prior, Shown, Source
from datafree.task import Task

TASK = Task(shape=(3, 8, 8))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_noise_and_pictures_are_those_of_task_and_prior() -> None:
    noise, prior = Gaussian(TASK, seeded()), Prior("pink", TASK, seeded())
    assert torch.equal(noise.sample(5).inputs, TASK.noise(5, seeded()))
    assert torch.equal(prior.sample(5).inputs, pictures("pink", 5, TASK, seeded()))
    assert not torch.equal(noise.sample(5).inputs, noise.sample(5).inputs)


def test_a_pool_gives_parts_of_itself() -> None:
    inputs, labels = torch.arange(10.0)[:, None], torch.arange(10)
    pool = Pool(Batch(inputs, labels), seeded())
    part = pool.sample(4)
    assert part.labels is not None and part.labels.unique().numel() == 4 and torch.equal(part.inputs[:, 0].long(), part.labels)
    assert sorted(pool.sample(10).inputs[:, 0].tolist()) == list(range(10))
    assert Pool(Batch(inputs), seeded()).sample(3).labels is None
    for n in (0, 11):
        with pytest.raises(NetworkError, match=f"{n} inputs were asked of a pool of 10"):
            pool.sample(n)


@pytest.mark.parametrize("source", (Gaussian(TASK, seeded()), Prior("mix", TASK, seeded()), Pool(Batch(torch.ones(2, 1)), seeded())))
def test_fixed_sources_have_nothing_to_learn(source: Source) -> None:
    assert dict(source.update(nn.Identity())) == {}


def test_a_listener_is_shown_every_batch() -> None:
    seen: list[torch.Tensor] = []
    source = Shown(Prior("pink", TASK, seeded()), seen.append)
    batches = [source.sample(2), source.sample(3)]
    assert [batch.inputs is shown for batch, shown in zip(batches, seen, strict=True)] == [True, True]
    assert dict(source.update(nn.Identity())) == {}


class Counter:
    """A source that learns to count its updates."""

    def __init__(self, labels: torch.Tensor | None = None, answer: torch.Tensor | None = None) -> None:
        self.count, self.labels, self.answer = 0, labels, answer

    def sample(self, n: int) -> Batch:
        cut = [None if each is None else each[:n] for each in (self.labels, self.answer)]
        return Batch(torch.full((n, 1), float(self.count)), *cut)

    def update(self, student: nn.Module) -> dict[str, torch.Tensor]:
        self.count += 1
        return {"count": torch.tensor(float(self.count))}

    def state_dict(self) -> dict[str, object]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, object]) -> None:
        assert isinstance(state["count"], int)
        self.count = state["count"]


def test_shares_of_a_mixture_hold_on_average_for_any_size() -> None:
    tens, ones = Pool(Batch(torch.full((99, 1), 10.0)), seeded()), Pool(Batch(torch.ones(99, 1)), seeded())
    mixed = Mixed((tens, ones), (0.3, 0.7), seeded())
    assert (mixed.sample(10).inputs == 10).sum() == 3
    parts = [(mixed.sample(3).inputs == 10).sum().item() for _ in range(300)]
    assert set(parts) <= {0, 1} and sum(parts) / 900 == pytest.approx(0.3, abs=0.03)
    assert Mixed((tens, ones), (1.0, 0.0), seeded()).sample(4).inputs.unique().tolist() == [10.0]
    for shares in ((0.5,), (0.5, 0.6), (1.5, -0.5)):
        with pytest.raises(MethodError, match="give each source one, together 1"):
            Mixed((tens, ones), shares, seeded())
    with pytest.raises(NetworkError, match="at least 1"):
        mixed.sample(0)


def test_a_mixture_knows_what_all_of_its_parts_know() -> None:
    one, other = Counter(torch.tensor([2, 1]), torch.ones(2, 3)), Counter(torch.tensor([[0.5, 0.5, 0.0]]).expand(2, 3), torch.zeros(2, 3))
    batch = Mixed((one, other), (0.5, 0.5), seeded()).sample(4)
    assert batch.labels is not None and batch.labels.tolist() == [[0, 0, 1], [0, 1, 0], [0.5, 0.5, 0], [0.5, 0.5, 0]]
    assert batch.answer is not None and batch.answer.sum(1).tolist() == [3, 3, 0, 0]
    batch = Mixed((one, one), (0.5, 0.5), seeded()).sample(4)
    assert batch.labels is not None and batch.labels.tolist() == [2, 1, 2, 1]
    batch = Mixed((one, Gaussian(Task(shape=(1,)), seeded())), (0.5, 0.5), seeded()).sample(4)
    assert batch.labels is None and batch.answer is None


def test_sources_that_learn_do_so_inside_others_and_are_kept() -> None:
    def nested() -> tuple[Counter, Counter, Mixed]:
        one, other = Counter(), Counter()
        return one, other, Mixed((Shown(one, lambda inputs: None), Gaussian(TASK, seeded()), other), (0.5, 0.0, 0.5), seeded())

    one, other, mixed = nested()
    assert isinstance(mixed, Stateful) and isinstance(mixed.sources[0], Stateful)
    assert dict(mixed.update(nn.Identity())) == {"1, count": 1, "3, count": 1}
    other.update(nn.Identity())
    fresh_one, fresh_other, fresh = nested()
    fresh.load_state_dict(mixed.state_dict())
    assert (fresh_one.count, fresh_other.count) == (one.count, other.count) == (1, 2)
    assert Shown(Gaussian(TASK, seeded()), lambda inputs: None).state_dict() == {}
