"""Distillation: the student's weights follow the gradient until it answers as its teacher, on the inputs of any source.

All of the student's parameters are trained: the float weights behind the quantized ones (through a straight-through gradient), biases,
and the affine parts of norms, whose statistics stay as they are. Activation ranges are set once before and then stay.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from datafree.context import Ctx
from datafree.errors import MethodError
from datafree.fit import Clock, FirstOf, duration, fit
from datafree.quant.insert import latent_weight, plan_of, quantized_layers, quantizers, weight_quantizer
from datafree.quant.observe import observe, observe_moving, observe_percentile
from datafree.quant.ranges import minmax
from datafree.synth.filters import low_pass
from datafree.synth.noise import augmented
from datafree.synth.source import Source, Terms, restore, state_of
from datafree.synth.terms import class_entropy
from datafree.task import Task
from datafree.tune.features import FeatureTerm, Maps, captured, difference, find_ends
from datafree.tune.holdout import HeldOut, set_aside
from datafree.tune.terms import adaptability, kl, l1, mse

Distance = Literal["kl", "mse", "l1", "adaptability"]
ActRange = Literal["moving", "percentile", "extremes", "stay"]
Gradient = Literal["masked", "identity"]
Falling = Literal["one-cycle", "cosine", "steps"]
Backend = Literal["inductor", "aot_eager"]

_RISE = 0.3  # of a one-cycle schedule
_FIRST = 1 / 25  # of the full rate, in its beginning


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a student is trained; the defaults suit some hundred steps.

    Args:
        batch: inputs of a step.
        rate: learning rate of SGD with Nesterov momentum 0.9; at 0 weights stay, and their gradient is not computed.
        norm_rate: that of biases and the affine parts of norms; None: ``rate``.
        falling: along a cosine, after a rise over the first third (``one-cycle``) or from the start, or tenfold at each of ``milestones``.
        milestones: shares of all steps.
        weight_decay: of all parameters.
        clip: the largest norm of the gradient; None: any.
        distance: of the logits, see ``tune.terms``.
        weight: of the distance.
        temperature: of kl and adaptability.
        classes: weight of the cross-entropy to the labels of the source; 0: labels are not needed.
        features: a distance of the maps in which units end, see ``tune.features``; a network without such maps is noted, and learns
            without.
        feature_weight: of it.
        each: steps that it takes for each update of the source.
        weight_range: ``follow``: the min-max range of the float weights, anew for each step; ``stay``: as it was.
        act_range: ``moving``: :func:`observe_moving`; ``percentile``: :func:`observe_percentile`; ``extremes``: the least and
            the largest value; ``stay``: as they were.
        range_batches: of the source, shown to the student before it learns, that tell the activation ranges.
        percentile: of the values that a range holds at either end.
        gradient: of a rounded value that had to be clipped: none (``masked``), or that of the identity all the same.
        average: the student ends with the mean of its weights over so large a share of the training, its last; 0: as the last step
            leaves them.
        flip: mirror each input or not, by chance.
        roll: shift a batch by up to so many pixels, what leaves on one side entering on the other.
        crop: show a random part of the batch, its sides of this share at least, at the full size; 1: all of it.
        mixup: share of the steps whose inputs and labels are mixtures of two (arXiv 1710.09412).
        mixed_classes: whether the cross-entropy counts for mixtures too; else they are for the distance alone.
        low_pass: cutoff of ``filters.low_pass``, in cycles an input, that inputs pass before all else; 0: none.
        perturb: the distances count a second time, for inputs moved by this much along the sign of their gradient, which reaches the
            inputs through both networks (HAST, CVPR 2023); 0: they do not.
        max_seconds: when to stop, the setting of ranges included, rates and average following the clock where it is ahead of the steps;
            None: never.
        hold_out: inputs of the source that are set aside: once the distance on them falls no more it is over (``tune.holdout``), and the
            student ends with the weights that were best on them, be they the average or not; 0: none.
        compile: backend of ``torch.compile`` for the steps of both networks; None, and where there are features: they run as they are.
    """

    batch: int = 64
    rate: float = 5e-3
    norm_rate: float | None = None
    falling: Falling = "one-cycle"
    milestones: tuple[float, ...] = (0.25, 0.5, 0.75)
    weight_decay: float = 1e-4
    clip: float | None = 5.0
    distance: Distance = "mse"
    weight: float = 1.0
    temperature: float = 1.0
    classes: float = 0.0
    features: FeatureTerm | None = None
    feature_weight: float = 1.0
    each: int = 1
    weight_range: Literal["follow", "stay"] = "follow"
    act_range: ActRange = "percentile"
    range_batches: int = 2
    percentile: float = 99.9
    gradient: Gradient = "masked"
    average: float = 0.2
    flip: bool = False
    roll: int = 0
    crop: float = 1.0
    mixup: float = 0.0
    mixed_classes: bool = True
    low_pass: float = 0.0
    perturb: float = 0.0
    max_seconds: float | None = None
    hold_out: int = 0
    compile: Backend | None = None


def distill(
    teacher: nn.Module, student: nn.Module, task: Task, source: Source, steps: int, ctx: Ctx, recipe: Recipe | None = None
) -> list[float]:
    """Train ``student`` in place on batches of ``source``, which is updated before them; returns the loss before each step.

    Args:
        teacher: the float network, in eval mode; it stays as it is.
        student: in eval mode, from ``quant.insert``; it keeps its plan.
        task: inputs and answer of both.
        source: of the inputs; one that is ``fit.Stateful`` is checkpointed with the student.
        steps: how many at most, see ``Recipe.max_seconds``; 0 sets the ranges alone.
        ctx: its folder, if it has one, holds the checkpoints; random draws take its generator.
        recipe: the default one unless given.

    Raises:
        MethodError: a loss or gradient is not finite, and the message names it; the student stays as the last good step left it. Or an
            activation has no range, or labels are missing, where the recipe takes them as given.
    """
    recipe = recipe or Recipe()
    lesson = _Lesson(teacher, student, task, source, steps, ctx, recipe)  # its clock runs from here
    _set_ranges(student, task, lesson.source, recipe)
    params, held = lesson.params, lesson.held
    optimizer = torch.optim.SGD(_groups(student, recipe), momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay)
    optimizer.register_step_pre_hook(lambda *_: _check_gradient(params, recipe.clip, lesson.taken + 1))
    optimizer.register_step_post_hook(lambda *_: lesson.count())
    schedule = LambdaLR(optimizer, lambda _: _factor(lesson.progress(), recipe))
    stop = FirstOf((lesson.clock,) if held is None else (lesson.clock, held))
    with _trainable(params), _gradient(student, recipe.gradient):
        try:
            losses = fit(params, lesson, steps, optimizer, ctx.part(plan_of(student)), "distill", schedule, stop)
            lesson.take_average()
            if held is not None:
                held.look(len(losses))
                held.give()
        finally:
            _follow(student, recipe)
    if len(losses) < steps:
        in_time = lesson.clock.left() > 0
        why = "as nothing was gained any more" if in_time else f"when its {duration(recipe.max_seconds or 0)} were over"
        ctx.note(f"distill: stopped after {len(losses)} of {steps} steps, {why}")
    if held is not None:
        ctx.note(f"distill: best on {recipe.hold_out} held-out inputs after {held.at} of {steps} steps")
    return losses


@final
class _Lesson:
    """The loss of a step, and all that it keeps: what the source has learned, the mean of the weights, the time."""

    def __init__(self, teacher: nn.Module, student: nn.Module, task: Task, source: Source, steps: int, ctx: Ctx, recipe: Recipe) -> None:
        self.clock = Clock(recipe.max_seconds)
        self.teacher, self.student, self.task, self.source = teacher, student, task, source
        self.steps, self.recipe, self.generator = steps, recipe, ctx.generator
        self.ends = () if recipe.features is None else _ends(teacher, task, ctx)
        self.compiled: dict[nn.Module, nn.Module] = {}
        if recipe.compile is not None and not self.ends:
            self.compiled = {each: cast(nn.Module, torch.compile(each, backend=recipe.compile)) for each in (teacher, student)}
        self.params = [each for group in _groups(student, recipe) for each in group["params"]]
        self.mean = [torch.zeros_like(each) for each in self.params]
        self.averaged = self.taken = 0
        self.held: HeldOut | None = None
        if recipe.hold_out:
            inputs, self.source = set_aside(source, recipe.hold_out)
            self.held = HeldOut(self.params, partial(self.distance, inputs), steps)

    def __call__(self) -> Terms:
        """The terms of the student's loss on a new batch; the source is updated first, when it is its turn."""
        recipe = self.recipe
        _follow(self.student, recipe, check=False)
        if self.taken % recipe.each == 0:
            self.source.update(self.student)
        x, labels, (t, maps) = self._shown()
        said = self._answer(self.student, x)
        terms = self._apart((t.detach(), {name: [each.detach() for each in calls] for name, calls in maps.items()}), said)
        if recipe.perturb:
            apart = torch.stack([*self._apart((t, maps), said).values()]).sum()
            (slope,) = torch.autograd.grad(apart, x, retain_graph=True)
            terms |= {f"{name} of perturbed inputs": term for name, term in self._perturbed(x, slope).items()}
        if recipe.classes and labels is not None:
            terms["cross-entropy"] = recipe.classes * class_entropy(said[0], labels)
        return terms

    def _perturbed(self, x: Tensor, slope: Tensor) -> dict[str, Tensor]:
        moved = x.detach() + self.recipe.perturb * slope.sign()
        with torch.no_grad():
            told = self._answer(self.teacher, moved)
        return self._apart(told, self._answer(self.student, moved))

    def _apart(self, told: tuple[Tensor, Maps], said: tuple[Tensor, Maps]) -> dict[str, Tensor]:
        """How far what the student makes of inputs is from what the teacher does."""
        recipe, (t, maps), (s, own_maps) = self.recipe, told, said
        terms = {str(recipe.distance): recipe.weight * self._distance(t, s)}
        if recipe.features is not None and self.ends:
            terms["features"] = recipe.feature_weight * difference(recipe.features, maps, own_maps)
        return terms

    def _answer(self, model: nn.Module, x: Tensor) -> tuple[Tensor, Maps]:
        """Logits, and the maps that are asked for."""
        with captured(model, self.ends) as maps:
            return self.task.run(self.compiled.get(model, model), x), maps

    @torch.no_grad()
    def _shown(self) -> tuple[Tensor, Tensor | None, tuple[Tensor, Maps]]:
        """Inputs, the labels that count, and what the teacher makes of them; with a gradient where inputs are to be perturbed."""
        recipe, batch = self.recipe, self.source.sample(self.recipe.batch)
        if recipe.classes and batch.labels is None:
            raise MethodError("the source does not know what its inputs show: take a weight of 0 for the classes")
        x, labels = augmented(low_pass(batch.inputs, recipe.low_pass), recipe, self.generator), batch.labels
        device = self.generator.device
        mixes = recipe.mixup > 0 and float(torch.rand((), generator=self.generator, device=device)) < recipe.mixup
        if mixes:
            order = torch.randperm(len(x), generator=self.generator, device=device)
            share = torch.rand((), generator=self.generator, device=device)
            x = torch.lerp(x[order], x, share)
        changed = mixes or recipe.flip or recipe.roll or recipe.crop < 1 or recipe.low_pass
        known = None if changed or self.ends or recipe.perturb else batch.answer
        with torch.set_grad_enabled(recipe.perturb > 0):
            t, maps = self._answer(self.teacher, x.requires_grad_(recipe.perturb > 0)) if known is None else (known, {})
        if mixes and labels is not None:
            shares = F.one_hot(labels, t.shape[1]).float() if labels.dim() == 1 else labels
            labels = torch.lerp(shares[order], shares, share) if recipe.mixed_classes else None
        return x, labels, (t, maps)

    def _distance(self, t: Tensor, s: Tensor) -> Tensor:
        match self.recipe.distance:
            case "kl":
                return kl(t, s, self.recipe.temperature)
            case "adaptability":
                return adaptability(t, s, self.recipe.temperature)
            case "mse":
                return mse(t, s)
            case "l1":
                return l1(t, s)

    @torch.no_grad()
    def distance(self, inputs: Tensor) -> float:
        """That of the student's present answers to the teacher's."""
        _follow(self.student, self.recipe)
        batches = [inputs[at : at + self.recipe.batch] for at in range(0, len(inputs), self.recipe.batch)]
        t, s = (torch.cat([self.task.run(each, x) for x in batches]) for each in (self.teacher, self.student))
        return float(self._distance(t, s))

    def progress(self) -> float:
        """The share of the training that is over, 0 to 1."""
        return min(1.0, max(self.taken / max(1, self.steps), self.clock.share()))

    @torch.no_grad()
    def count(self) -> None:
        """Take note of a step that was taken."""
        self.taken += 1
        if self.recipe.average and self.progress() >= 1 - self.recipe.average:
            self.averaged += 1
            for mean, param in zip(self.mean, self.params, strict=True):
                mean.lerp_(param, 1 / self.averaged)

    @torch.no_grad()
    def take_average(self) -> None:
        """Give the student the mean of its weights, if there is one yet."""
        for mean, param in zip(self.mean, self.params, strict=True) if self.averaged else ():
            param.copy_(mean)

    def state_dict(self) -> dict[str, object]:
        """What the next step depends on beside the parameters."""
        held = {} if self.held is None else self.held.state_dict()
        counts = {"averaged": self.averaged, "taken": self.taken, "seconds": self.clock.elapsed}
        return {"source": state_of(self.source), "held": held, "mean": self.mean, **counts}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take back what :meth:`state_dict` gave."""
        source, held, mean, averaged, taken, seconds = (state[key] for key in ("source", "held", "mean", "averaged", "taken", "seconds"))
        assert isinstance(source, dict) and isinstance(mean, list)
        assert isinstance(averaged, int) and isinstance(taken, int) and isinstance(seconds, float)
        restore(self.source, source)
        if self.held is not None:
            assert isinstance(held, dict)
            self.held.load_state_dict(held)
        self.mean, self.averaged, self.taken = mean, averaged, taken
        self.clock.resume(seconds)


def _ends(teacher: nn.Module, task: Task, ctx: Ctx) -> tuple[str, ...]:
    found = find_ends(teacher, task, ctx)
    if not found:
        ctx.note("the network has no convolutional units whose maps could be compared: the student learns from its answers alone")
    return found


def _set_ranges(student: nn.Module, task: Task, source: Source, recipe: Recipe) -> None:
    points = quantizers(student)
    batches = (low_pass(source.sample(recipe.batch).inputs, recipe.low_pass) for _ in range(recipe.range_batches))
    if points and recipe.act_range == "moving":
        observe_moving(student, batches, task.run)
    elif points and recipe.act_range == "percentile":
        observe_percentile(student, batches, recipe.percentile, task.run)
    elif points and recipe.act_range == "extremes":
        observe(student, batches, "minmax", task.run)
    elif unset := [point for point, quantizer in points.items() if not quantizer.ready]:
        raise MethodError(f"the ranges of {', '.join(unset[:5])} cannot stay as they are, unset: take moving ones or a percentile")


@torch.no_grad()
def _follow(student: nn.Module, recipe: Recipe, check: bool = True) -> None:
    """Set the ranges of the weights anew; without ``check`` a GPU is not waited for, and the loss tells of weights that are not finite."""
    for layer in quantized_layers(student).values() if recipe.weight_range == "follow" else ():
        quantizer = weight_quantizer(layer)
        quantizer.set(*minmax(latent_weight(layer), quantizer.spec, check), check=check)


def _groups(student: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """What learns, each with its rate: weights, and what has one dimension (biases and the affine parts of norms)."""
    params = [each for each in student.parameters() if each.is_floating_point()]
    weights, others = ([each for each in params if (each.dim() > 1) == several] for several in (True, False))
    rates = recipe.rate, recipe.rate if recipe.norm_rate is None else recipe.norm_rate
    groups = [{"params": each, "lr": rate} for each, rate in zip((weights, others), rates, strict=True) if each]
    return [each for each in groups if each["lr"]] or groups


def _check_gradient(params: list[nn.Parameter], clip: float | None, step: int) -> None:
    """Clip the gradient. Raises MethodError where it is not finite."""
    norm = float(nn.utils.clip_grad_norm_(params, math.inf if clip is None else clip))
    if not math.isfinite(norm):
        raise MethodError(f"distill: the gradient of the student is {norm} at step {step}: lower the learning rate")


def _factor(progress: float, recipe: Recipe) -> float:
    """What the rate is multiplied with when so large a share of the training is over."""
    if recipe.falling == "steps":
        return float(0.1 ** sum(progress >= each for each in recipe.milestones))
    rise = _RISE if recipe.falling == "one-cycle" else 0.0
    if progress < rise:
        return _FIRST + (1 - _FIRST) * (1 - math.cos(math.pi * progress / rise)) / 2
    return (1 + math.cos(math.pi * (progress - rise) / (1 - rise))) / 2


@contextmanager
def _trainable(params: list[nn.Parameter]) -> Iterator[None]:
    before = [each.requires_grad for each in params]
    try:
        for each in params:
            each.requires_grad_()
        yield
    finally:
        for each, needed in zip(params, before, strict=True):
            each.requires_grad_(needed)
            each.grad = None


@contextmanager
def _gradient(student: nn.Module, kind: Gradient) -> Iterator[None]:
    """While it lasts, the quantizers of weights and activations hand gradients back in this way; their values stay the same."""
    all_of_them = (*quantizers(student).values(), *map(weight_quantizer, quantized_layers(student).values()))
    handles = [each.register_forward_hook(_straight_through) for each in all_of_them if kind == "identity"]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _straight_through(module: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> Tensor:
    (x,) = args
    return result.detach() + (x - x.detach())
