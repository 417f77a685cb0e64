"""Device, randomness and progress of a run."""

import pytest
import torch

from datafree.context import Ctx, Event
from datafree.errors import DatafreeError, TargetError


def test_the_same_seed_draws_the_same() -> None:
    first, second, other = (torch.randn(4, generator=Ctx.create(seed).generator) for seed in (7, 7, 8))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    torch.randn(4, generator=Ctx.create(3).generator)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu")])
def test_device(device: str | torch.device | None) -> None:
    ctx = Ctx.create(device=device)
    assert ctx.device == torch.device("cpu") == ctx.generator.device


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_seeds(seed: int) -> None:
    assert Ctx.create(seed).generator.initial_seed() == seed


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, "1", None, True])
def test_a_bad_seed_is_told(seed: object) -> None:
    with pytest.raises(TargetError) as caught:
        Ctx.create(seed)  # type: ignore[arg-type]
    assert str(caught.value) == f"seed cannot be {seed!r}: expected a whole number from 0 to 2^63 - 1"


@pytest.mark.parametrize("device", ["toaster", "", "meta", "cuda:999", 3.5])
def test_a_bad_device_is_told(device: object) -> None:
    with pytest.raises(TargetError, match=f"device '{device}' cannot be used here: choose cpu, or cuda where torch finds it"):
        Ctx.create(device=device)  # type: ignore[arg-type]
    assert issubclass(TargetError, DatafreeError) and issubclass(TargetError, ValueError)


def test_events_reach_the_listener() -> None:
    heard: list[Event] = []
    ctx = Ctx.create(on_event=heard.append)
    ctx.progress("round", 1, 3)
    ctx.note("remarkable")
    assert heard == [Event("round", 1, 3), Event("note", message="remarkable")]


def test_without_a_listener_nothing_happens() -> None:
    ctx = Ctx.create()
    ctx.progress("round", 1, 3)
    ctx.note("unheard")
    assert ctx.folder is None
