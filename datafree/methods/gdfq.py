"""GDFQ: a generator taught by the network, and distillation on what it draws (Xu et al., ECCV 2020, arXiv 2003.03603)."""

import time
from dataclasses import dataclass, fields, replace
from typing import Literal

from torch import nn

from datafree.bits.allocate import make_plan
from datafree.context import Ctx
from datafree.fit import duration, time_up
from datafree.graph.flow import Layer, read
from datafree.method import Method, method, option
from datafree.plan import QSpec, Target
from datafree.quant.insert import insert
from datafree.synth.generator import Conditional, Convincing
from datafree.synth.generator import Recipe as Generation
from datafree.synth.noise import count_classes
from datafree.task import Task
from datafree.tune.distill import Falling, Gradient, distill
from datafree.tune.distill import Recipe as Distillation

Budget = Literal["smoke", "fast", "standard", "paper"]
Ranges = Literal["moving", "percentile"]
Size = Literal["light", "full"]
Variant = Literal["gdfq", "kmdfq"]

_LARGE = 64  # from this side on the published setting is that of ImageNet
_JOINT = 1.5  # times as long as a step of the generator alone takes one of both
_SHOWN = 64  # pictures, to whoever keeps them


@dataclass(frozen=True)
class _Setting:
    """The fields of the method that a budget fills in."""

    warm_up: int
    steps: int
    batch: int
    rate: float
    generator_rate: float = 2e-3
    generator: Size = "light"
    falling: Falling = "one-cycle"
    act_range: Ranges = "percentile"
    gradient: Gradient = "masked"
    average: float = 0.2
    clip: float = 5.0
    cross_entropy: float = 0.0
    weight: float = 1.0
    range_batches: int = 4


@method("gdfq")
class Gdfq(Method):
    """A generator draws pictures of classes that the network believes in; student and generator learn in turn.

    The generator's loss is the cross-entropy of the network's answer to the wanted class, and the distance of the statistics that enter
    each batch norm from the stored ones. The student's is the cross-entropy and a distance of its logits from the network's: the KL
    divergence at temperature 20, or the mean squared error (KMDFQ, the journal version, TCSVT 2023, where statistics weigh 1 instead of
    0.1). First the generator learns alone, then both take a step on every batch. Weights are on asymmetric min-max grids of each output
    channel that follow them; activation ranges are set once, before the student learns.

    The budget ``paper`` is the published setting, as coded: 400 epochs of 200 steps, meant for a GPU. The others shorten it: higher
    rates on one cycle, a clipped and masked gradient, ranges at a percentile, averaged weights, no cross-entropy (a generator that is
    hardly warm misleads the student by it) but more weight on the distance, and the first two a lighter generator.

    Differs: the code averages the KL over the classes too, which the paper does not: as coded, its ``weight`` is 1 / classes. It has
    statistics of its own as well (``synth.generator.Convincing``). No epoch is chosen by its accuracy on a test set: the last weights
    count, or their average. The published moving range overshoots by its correction of the bias (``quant.observe``); since it forgets
    all but some twenty batches, the last ones before the student learns are all that it is taken from here. On large pictures ranges
    are published to freeze long before the generator is warm, here they wait for it. A network without batch norms has no statistics,
    so its generator learns from the classes alone.
    """

    variant: Variant = option("gdfq", "the losses: of the conference paper, or of the journal version")
    budget: Budget = option("fast", "fills in what is None: for half a minute, some minutes or an hour on a small network, or as published")
    warm_up: int | None = option(None, "steps of the generator alone", at_least=0)
    steps: int | None = option(None, "steps of both", at_least=0)
    batch: int | None = option(None, "pictures of a step", at_least=2)
    rate: float | None = option(None, "learning rate of the student", at_least=0)
    generator_rate: float | None = option(None, "learning rate of the generator", at_least=0)
    generator: Size | None = option(None, "channels of the generator: 64 and 32, or 128 and 64 as published")
    statistics: float | None = option(None, "weight of the statistics in the generator's loss; None: as published", at_least=0)
    cross_entropy: float | None = option(None, "weight of the cross-entropy in the student's loss, 1 as published", at_least=0)
    weight: float | None = option(None, "weight of the distance in the student's loss, 1 / classes as coded for KL, 1 for MSE", at_least=0)
    temperature: float = option(20.0, "of the KL divergence", at_least=0.1)
    falling: Falling | None = option(None, "the student's rate: one cycle, a cosine, or both rates tenfold at each quarter of the steps")
    act_range: Ranges | None = option(None, "activation ranges: moving min-max as published, or a percentile")
    percentile: float = option(99.9, "of the values that the range holds at either end", at_least=50, at_most=100)
    range_batches: int | None = option(None, "batches that tell the activation ranges", at_least=1)
    gradient: Gradient | None = option(None, "of values that were clipped: none, or that of the identity as published")
    average: float | None = option(None, "share of the steps, the last ones, over which the student is averaged", at_least=0, at_most=1)
    clip: float | None = option(None, "largest norm of the student's gradient; 0: any, as published", at_least=0)
    max_seconds: float | None = option(None, "when to stop, rates and average keeping pace", at_least=1)

    def run(self, teacher: nn.Module, task: Task, target: Target, ctx: Ctx) -> nn.Module:
        """Make the student: plan, warm the generator up, train both."""
        start, flow = time.monotonic(), read(teacher, task, ctx)
        setting = self._setting(max(task.shape[1:], default=0) >= _LARGE, count_classes(teacher, task, ctx))
        student = insert(teacher, make_plan(flow, teacher, target, _spec, ctx))  # weights are min-max ranged
        source = Conditional(teacher, task, ctx, self._generation(setting))
        self._warm_up(source, student, setting.warm_up, setting.steps, ctx)
        left = None if self.max_seconds is None else max(0.0, self.max_seconds - (time.monotonic() - start))
        distill(teacher, student, task, source, setting.steps, ctx, self._distillation(setting, left))
        if ctx.on_pictures is not None:
            ctx.on_pictures(source.sample(_SHOWN).inputs)
        return student

    def _setting(self, large: bool, classes: int) -> _Setting:
        """That of the budget, with the fields that are given in place of its own."""
        given = {each.name: getattr(self, each.name) for each in fields(_Setting) if getattr(self, each.name) is not None}
        setting = _shortened(self.budget, large) if self.budget != "paper" else _published(self.variant, large, classes)
        return replace(setting, **given)

    def _warm_up(self, source: Conditional, student: nn.Module, steps: int, further: int, ctx: Ctx) -> None:
        if self.max_seconds is None:
            source.learn(steps, student)
            return
        seconds = self.max_seconds * steps / max(1, steps + _JOINT * further)
        taken = len(source.learn(steps, student, time_up(seconds)))
        if taken < steps:
            ctx.note(f"generator: stopped after {taken} of {steps} steps, when its {duration(seconds)} were over")

    def _generation(self, setting: _Setting) -> Generation:
        published = 1.0 if self.variant == "kmdfq" else 0.1
        every = (setting.warm_up + setting.steps) // 4
        return Generation(
            batch=setting.batch,
            rate=setting.generator_rate,
            milestones=(every, 2 * every, 3 * every) if setting.falling == "steps" else (),
            widths=(128, 64) if setting.generator == "full" else (64, 32),
            objective=Convincing(statistics=published if self.statistics is None else self.statistics),
        )

    def _distillation(self, setting: _Setting, seconds: float | None) -> Distillation:
        ahead = setting.warm_up / max(1, setting.warm_up + setting.steps)  # the share that is over before the student learns
        return Distillation(
            batch=setting.batch,
            rate=setting.rate,
            falling=setting.falling,
            milestones=tuple((each - ahead) / (1 - ahead) for each in (0.25, 0.5, 0.75) if ahead < 1),
            clip=setting.clip or None,
            distance="mse" if self.variant == "kmdfq" else "kl",
            weight=setting.weight,
            temperature=self.temperature,
            classes=setting.cross_entropy,
            act_range=setting.act_range,
            range_batches=setting.range_batches,
            percentile=self.percentile,
            gradient=setting.gradient,
            average=setting.average,
            max_seconds=seconds,
        )


def _shortened(budget: Budget, large: bool) -> _Setting:
    """``large``: pictures of the size of ImageNet's, of which a step takes fewer."""
    if budget == "smoke":
        return _Setting(warm_up=40, steps=40, batch=8 if large else 32, rate=1e-3)
    if budget == "fast":
        return _Setting(warm_up=200, steps=400, batch=16 if large else 64, rate=1e-3)
    return _Setting(warm_up=1000, steps=5000, batch=16 if large else 64, rate=1e-3, generator_rate=1e-3, generator="full")


def _published(variant: Variant, large: bool, classes: int) -> _Setting:
    journal = variant == "kmdfq"
    warm_up = 200 * (50 if large else 20 if journal else 4)
    return _Setting(
        warm_up=warm_up,
        steps=80000 - warm_up,
        batch=16 if large else 200,
        rate=1e-6 if large else 1e-4,
        generator_rate=1e-3,
        generator="full",
        falling="steps",
        act_range="moving",
        gradient="identity",
        average=0.0,
        clip=0.0,
        cross_entropy=1.0,
        weight=1.0 if journal else 1 / classes,
        range_batches=20,
    )


def _spec(layer: Layer, bits: int) -> QSpec:
    return QSpec(bits, symmetric=False, axis=layer.out_axis)
