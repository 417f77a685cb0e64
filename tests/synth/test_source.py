"""Noise, procedural pictures and pools behind one interface."""

import pytest
import torch
from torch import nn

from datafree.errors import NetworkError
from datafree.synth.prior import pictures
from datafree.synth.source import Batch, Gaussian, Pool, Prior, Shown, Source
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
