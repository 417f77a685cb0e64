"""Block reconstruction: unit after unit, the student's codes and ranges follow the gradient until the unit answers as its teacher's.

AdaRound (arXiv 2004.10568) on the weights of a whole unit (BRECQ, arXiv 2102.05426), activations and the unit's input quantized but for
a random part of them (QDrop, arXiv 2203.05740), weight scales with them (GENIE-M, CVPR 2023). Biases and norms stay.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from datafree.context import Ctx
from datafree.errors import MethodError
from datafree.fit import Clock, duration, fit, in_turn
from datafree.graph.blocks import Unit, units
from datafree.graph.flow import Flow
from datafree.graph.swap import replace
from datafree.graph.taps import Entered, entering
from datafree.quant.insert import assign, is_quantized, latent_weight, plan_of, quantized_layers, quantizers, weight_quantizer
from datafree.quant.quantizer import Quantizer
from datafree.task import Task
from datafree.tune.soft import LearnedRange, SoftWeight, annealed, mixed, undecided

_WEIGHT = ".parametrizations.weight.0"  # the quantizer of a layer's weight
_AT_ONCE = 64  # inputs that pass a network while what enters a unit is recorded


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How units are reconstructed; the defaults are GENIE-M's.

    Args:
        steps: of Adam for each unit.
        batch: inputs of a step.
        rate: learning rate of what decides the rounding.
        scale_rate: of the weight scales.
        range_rate: of the activation scales, falling along a cosine.
        rounding: weight of the term that makes weights decide for a code (``soft.undecided``).
        warm_up: share of the steps without that term.
        drop: chance of an activation, and of a value that enters the unit, to be in float; 0: as BRECQ has it.
        joint_scale: weight scales learn as well.
        max_seconds: when to stop, recording included: what is left is shared evenly among the units to come, and rates and the rounding
            term follow the clock where it is ahead of the steps; None: never.
    """

    steps: int = 20000
    batch: int = 32
    rate: float = 1e-3
    scale_rate: float = 1e-4
    range_rate: float = 4e-5
    rounding: float = 1.0
    warm_up: float = 0.2
    drop: float = 0.5
    joint_scale: bool = True
    max_seconds: float | None = None


def reconstruct(
    teacher: nn.Module, student: nn.Module, flow: Flow, task: Task, inputs: Tensor, ctx: Ctx, recipe: Recipe | None = None
) -> dict[str, list[float]]:
    """Reconstruct ``student`` in place, unit after unit; returns the loss before each step, by the name of the unit's first module.

    What enters a unit is recorded anew for each, in teacher and student, whose earlier units are done by then; its target is what the
    teacher's unit makes of the teacher's. Afterwards every weight is on its grid. Layers in no unit stay as they are, which is noted.

    Args:
        teacher: the float network, in eval mode; it stays as it is.
        student: from ``quant.insert``, in eval mode, with ranges. Its codes are where the weights start, towards the teacher's weights.
        flow: of the teacher.
        task: how to call both.
        inputs: (n, *shape).
        ctx: its folder, if it has one, holds the checkpoints; random draws take its generator.
        recipe: the default one unless given.

    Raises:
        MethodError: a loss is not finite, and the message names it; the student's earlier units are done, this one is as it was. Or an
            activation has no range.
    """
    recipe = recipe or Recipe()
    if unset := [point for point, quantizer in quantizers(student).items() if not quantizer.ready]:
        raise MethodError(f"the ranges of {', '.join(unset[:5])} are unset: observe activations first")
    chosen = units(flow)
    losses: dict[str, list[float]] = {}
    for number, (unit, clock) in enumerate(zip(chosen, in_turn(recipe.max_seconds, len(chosen)), strict=True), 1):
        parts = _stand_ins(teacher, student, unit, flow, ctx, recipe)
        if not parts:  # all of it stays in float
            continue
        record = _record(teacher, student, unit, flow, task, inputs, ctx)
        lesson = _Lesson(unit, student, record, ctx, recipe, clock)
        losses[unit.modules[0]] = _learn(lesson, parts, f"reconstruct, unit {number} of {len(chosen)}")
    if alone := set(quantized_layers(student)) - {name for unit in chosen for name in unit.layers}:
        ctx.note(f"layers that several parts of the network call stay as they were rounded: {', '.join(sorted(alone))}")
    if short := [len(each) for each in losses.values() if len(each) < recipe.steps]:
        kept = f"to keep within {duration(recipe.max_seconds or 0)}"
        ctx.note(
            f"reconstruct: {len(short)} of {len(losses)} units stopped after {min(short)} to {max(short)} of {recipe.steps} steps, {kept}"
        )
    return losses


@dataclass(frozen=True)
class _Record:
    """What enters a unit in teacher and student, and what it is to make of that, all on the CPU; ``channels`` of the latter."""

    teacher: Entered
    student: Entered
    target: Tensor
    channels: int


@torch.no_grad()
def _record(teacher: nn.Module, student: nn.Module, unit: Unit, flow: Flow, task: Task, inputs: Tensor, ctx: Ctx) -> _Record:
    def entered(model: nn.Module) -> Entered:
        return entering(model, unit.modules[0], (part.to(ctx.device) for part in torch.split(inputs, _AT_ONCE)), task.run)

    t, s = entered(teacher), entered(student)
    parts = (part.to(ctx.device, copy=True) for part in torch.split(t.inputs, _AT_ONCE))  # which a unit may change in place
    target = torch.cat([unit.run(teacher, part, t.others, t.named).cpu() for part in parts])
    return _Record(t, s, target, target.shape[-1 if flow.layers[unit.layers[-1]].kind == "linear" else 1])


def _stand_ins(
    teacher: nn.Module, student: nn.Module, unit: Unit, flow: Flow, ctx: Ctx, recipe: Recipe
) -> dict[str, SoftWeight | LearnedRange]:
    """What learns in place of the quantizers of the unit, by their names: of its own layers, and of activations that pass it alone."""
    found: dict[str, SoftWeight | LearnedRange] = {}
    for name in unit.layers:
        layer, wanted = student.get_submodule(name), teacher.get_submodule(name).weight
        assert isinstance(wanted, Tensor)
        if is_quantized(layer):
            found[f"{name}{_WEIGHT}"] = SoftWeight(wanted, latent_weight(layer), weight_quantizer(layer), recipe.joint_scale)
    for point, quantizer in quantizers(student).items():
        name, _, side = point.rpartition(":")
        within = any(f"{name}.".startswith(f"{module}.") for module in unit.modules)
        if within and (name in unit.layers or len(flow.calls_of[name]) == 1):
            found[f"{name}.{side}_quantizer"] = LearnedRange(quantizer, recipe.drop, ctx.generator)
    return found


@final
class _Lesson:
    """The loss of a unit, and what it keeps from step to step: how many there were, and their time."""

    def __init__(self, unit: Unit, student: nn.Module, record: _Record, ctx: Ctx, recipe: Recipe, clock: Clock) -> None:
        self.unit, self.student, self.record, self.ctx, self.recipe, self.clock = unit, student, record, ctx, recipe, clock
        self.weights: list[SoftWeight] = []
        self.taken = 0

    def __call__(self) -> dict[str, Tensor]:
        """The terms of the loss on a new batch."""
        record, recipe, generator = self.record, self.recipe, self.ctx.generator
        chosen = torch.randperm(len(record.target), generator=generator, device=generator.device)[: recipe.batch].cpu()
        x, t, target = (each[chosen].to(self.ctx.device) for each in (record.student.inputs, record.teacher.inputs, record.target))
        y = self.unit.run(self.student, mixed(x, t, recipe.drop, generator), record.student.others, record.student.named)
        terms = {"error": (y - target).square().mean() * record.channels}
        beta = annealed(self.progress(), recipe.warm_up)
        if self.weights and beta is not None:
            terms["rounding"] = recipe.rounding * torch.stack([undecided(each.v, beta) for each in self.weights]).sum()
        return terms

    def progress(self) -> float:
        """The share of the training that is over, by steps or by time, whichever is ahead."""
        return min(1.0, max(self.taken / max(1, self.recipe.steps), self.clock.share()))

    def count(self) -> None:
        """A step was taken."""
        self.taken += 1

    def state_dict(self) -> dict[str, object]:
        """Steps and time."""
        return {"taken": self.taken, "seconds": self.clock.elapsed}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take back what :meth:`state_dict` gave."""
        taken, seconds = state["taken"], state["seconds"]
        assert isinstance(taken, int) and isinstance(seconds, float)
        self.taken = taken
        self.clock.resume(seconds)


def _learn(lesson: _Lesson, parts: Mapping[str, SoftWeight | LearnedRange], name: str) -> list[float]:
    """Train the ``parts`` in their places, then give the quantizers there what they have learned; returns the losses."""
    student, recipe = lesson.student, lesson.recipe
    weights = {path: each for path, each in parts.items() if isinstance(each, SoftWeight)}
    ranges = {path: each for path, each in parts.items() if isinstance(each, LearnedRange)}
    lesson.weights = list(weights.values())
    groups: list[tuple[list[nn.Parameter], float, Callable[[int], float]]] = [
        ([each.v for each in weights.values()], recipe.rate, lambda _: 1.0),
        ([each.scale for each in weights.values() if each.scale.requires_grad], recipe.scale_rate, lambda _: 1.0),
        ([each.scale for each in ranges.values()], recipe.range_rate, lambda _: (1 + math.cos(math.pi * lesson.progress())) / 2),
    ]
    groups = [each for each in groups if each[0]]
    optimizer = torch.optim.Adam([{"params": params, "lr": rate} for params, rate, _ in groups])
    optimizer.register_step_post_hook(lambda *_: lesson.count())
    schedule = LambdaLR(optimizer, [factor for _, _, factor in groups])
    with _in_place(student, parts):
        params = [each for group in groups for each in group[0]]
        losses = fit(params, lesson, recipe.steps, optimizer, lesson.ctx.part(plan_of(student)), name, schedule, lesson.clock)
    for path, weight in weights.items():
        layer = student.get_submodule(path.removesuffix(_WEIGHT))
        assign(layer, *weight.hard(), weight_quantizer(layer).zero)
    for path, each in ranges.items():
        quantizer = student.get_submodule(path)
        assert isinstance(quantizer, Quantizer)
        quantizer.set(each.value(), quantizer.zero)
    return losses


@contextmanager
def _in_place(student: nn.Module, parts: Mapping[str, nn.Module]) -> Iterator[None]:
    """While it lasts, ``parts`` are in the places they are named after."""
    before = {path: student.get_submodule(path) for path in parts}
    try:
        for path, part in parts.items():
            replace(student, path, part)
        yield
    finally:
        for path, module in before.items():
            replace(student, path, module)
