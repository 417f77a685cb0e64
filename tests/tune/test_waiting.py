"""How often training reads a number back, for which a GPU has to be waited."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import datafree
from datafree.context import Ctx
from datafree.errors import NetworkError
from datafree.quant.observe import observe
from datafree.synth.source import Prior
from datafree.task import Task
from datafree.tune.distill import Recipe, distill


class Waits(TorchDispatchMode):
    """Counts how often a number is read back, for which a GPU would be waited."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Callable[..., object], types: object, args: tuple[object, ...] = (), kwargs: object = None
    ) -> object:
        self.count += "_local_scalar_dense" in str(func)
        return func(*args, **(kwargs or {}))


def network(layers: int) -> tuple[nn.Module, Task]:
    torch.manual_seed(0)
    parts = [part for _ in range(layers) for part in (nn.Linear(6, 6), nn.ReLU())]
    return nn.Sequential(*parts, nn.Linear(6, 3)).eval(), Task(shape=(6,))


def waits(layers: int, steps: int) -> int:
    model, task = network(layers)
    student = datafree.quantize(model, task, method="rtn", target=datafree.Target(4, 8)).student
    ctx = Ctx.create(0)
    with Waits() as seen:
        distill(model, student, task, Prior("white", task, ctx.generator), steps, ctx, Recipe(batch=4, act_range="stay", average=0.0))
    return seen.count


def test_a_step_waits_for_the_device_as_often_for_many_layers_as_for_few() -> None:
    few, many = (waits(layers, 6) - waits(layers, 2) for layers in (1, 5))
    assert few == many == 4 * 3, "the loss, twice, and the norm of its gradient"


def test_ranges_are_observed_without_waiting_for_each_batch() -> None:
    model, task = network(3)
    student = datafree.quantize(model, task, method="rtn", target=datafree.Target(4, 8)).student
    found = []
    for batches in (1, 9):
        with Waits() as seen:
            observe(student, [task.noise(4, torch.Generator().manual_seed(each)) for each in range(batches)], "minmax", task.run)
        found.append(seen.count)
    assert found[0] == found[1]


def test_values_that_are_not_finite_are_told_with_their_place() -> None:
    model, task = network(1)
    student = datafree.quantize(model, task, method="rtn", target=datafree.Target(4, 8)).student
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(NetworkError, match=":(input|output): NaN or infinity passed there"):
            observe(student, [torch.full((4, 6), value), torch.zeros(4, 6)], "minmax", task.run)
