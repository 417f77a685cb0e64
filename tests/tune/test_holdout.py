"""What is held out is never learned from; the best on it is what stays, and the fit ends when nothing better comes."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from datafree import fit as loop
from datafree.bits.allocate import make_plan
from datafree.context import Ctx, Event
from datafree.errors import MethodError
from datafree.fit import fit
from datafree.graph.flow import Layer, read
from datafree.plan import QSpec, Target
from datafree.quant.insert import insert
from datafree.synth.prior import pictures
from datafree.synth.source import Batch, Pool, Prior
from datafree.tune.distill import Recipe, distill
from datafree.tune.holdout import HeldOut, set_aside
from datafree.tune.terms import mse
from datafree.zoo.digits import digits

MODEL, TASK = digits()
RECIPE = Recipe(batch=8, range_batches=1, hold_out=16, average=0.0)
STEPS = 6


class Killed(Exception):
    """Stands for the end of the process."""


def pool(n: int) -> Pool:
    numbers = torch.arange(float(n))
    return Pool(Batch(numbers[:, None], numbers.long(), -numbers[:, None]), torch.Generator().manual_seed(0))


def test_what_is_set_aside_is_no_more_in_the_pool() -> None:
    held, rest = set_aside(pool(10), 4)
    assert isinstance(rest, Pool) and rest.batch.labels is not None and rest.batch.answer is not None
    assert sorted([*held.flatten().tolist(), *rest.batch.inputs.flatten().tolist()]) == list(range(10))
    assert torch.equal(rest.batch.labels, rest.batch.inputs[:, 0].long()) and torch.equal(rest.batch.answer, -rest.batch.inputs)
    with pytest.raises(MethodError, match="10 of 10 inputs cannot be held out"):
        set_aside(pool(10), 10)


def test_a_source_that_makes_new_inputs_makes_those_too() -> None:
    source = Prior("mix", TASK, torch.Generator().manual_seed(0))
    held, rest = set_aside(source, 4)
    assert rest is source and torch.equal(held, pictures("mix", 4, TASK, torch.Generator().manual_seed(0)))


def descend(held_out: list[float], steps: int, ctx: Ctx | None = None, kill_at: int = 999) -> tuple[float, HeldOut, list[float]]:
    """A fit whose one parameter is the number of steps, and whose distances are told."""
    x = torch.zeros(1, requires_grad=True)
    held = HeldOut([x], lambda: held_out[round(x.item())], steps)

    class Loss:
        state_dict, load_state_dict = held.state_dict, held.load_state_dict

        def __call__(self) -> Tensor:
            if x.item() == kill_at:
                raise Killed
            return -x.sum()

    losses = fit([x], Loss(), steps, torch.optim.SGD([x], 1.0), ctx or Ctx.create(0), "descend", stop=held)
    held.look(len(losses))
    held.give()
    return x.item(), held, losses


def test_it_ends_ten_looks_after_the_best_and_gives_it_back() -> None:
    x, held, losses = descend([9, 8, 7, 3, *[5] * 40], 40)
    assert (x, held.at, held.least, len(losses)) == (3.0, 3, 3, 13)
    x, held, losses = descend([*range(40, 0, -1), 0], 40)
    assert (x, held.at, len(losses)) == (40.0, 40, 40), "the last state counts too"
    x, held, losses = descend([1, *[5] * 40], 40)
    assert (x, held.at, len(losses)) == (0.0, 0, 10), "and the first"


def test_it_looks_forty_times_in_all_steps() -> None:
    seen = [99.0] * 400
    seen[20], seen[25] = 2.0, 1.0
    x, held, _ = descend(seen, 400)
    assert (x, held.at) == (20.0, 20), "step 25 is between two looks"


def test_the_best_outlives_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_STEPS", 5)
    ctx = dataclasses.replace(Ctx.create(0), folder=tmp_path)
    distances = [9, 8, 7, 3, *[5] * 40]
    with pytest.raises(Killed):
        descend([float(each) for each in distances], 40, ctx, kill_at=12)
    unseen = [0.0 if number < 10 else each for number, each in enumerate(distances)]  # of looks before the checkpoint nothing is asked anew
    x, held, losses = descend(unseen, 40, dataclasses.replace(Ctx.create(0), folder=tmp_path))
    assert (x, held.at, held.least, len(losses)) == (3.0, 3, 3, 13)


def student() -> nn.Module:
    def spec(layer: Layer, bits: int) -> QSpec:
        return QSpec(bits, symmetric=False, axis=layer.out_axis)

    ctx = Ctx.create(0)
    return insert(MODEL, make_plan(read(MODEL, TASK, ctx), MODEL, Target(3, 3, protocol="paper"), spec, ctx)).requires_grad_(False)


@torch.no_grad()
def distance(learner: nn.Module, inputs: Tensor) -> float:
    return float(mse(MODEL(inputs), learner(inputs)))


@pytest.mark.parametrize("rate", (1e-3, 0.3))
def test_a_student_ends_as_it_was_best_on_inputs_it_has_not_learned_from(rate: float) -> None:
    """At the high rate, which does harm, it is left as it was."""
    held = pictures("mix", 16, TASK, torch.Generator().manual_seed(0))
    notes: list[str] = []

    def listen(event: Event) -> None:
        if event.name == "note":
            notes.append(event.message)

    found = {}
    for hold_out in (0, 16):
        ctx, learner = Ctx.create(0, on_event=listen), student()
        source = Prior("mix", TASK, ctx.generator)
        if not hold_out:
            source.sample(16)  # so that both learn from the same
        distill(MODEL, learner, TASK, source, STEPS, ctx, dataclasses.replace(RECIPE, rate=rate, hold_out=hold_out, clip=None))
        found[hold_out] = distance(learner, held)
    assert found[16] <= found[0] and (rate == 1e-3 or found[16] < 0.5 * found[0])
    assert notes[-1].startswith("distill: best on 16 held-out inputs after ")
