"""What the methods share that train a student on inputs they make: budgets, the fields these fill in, and the order of events."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Literal

from torch import nn

from datafree.bits.allocate import make_plan, own_range
from datafree.context import Ctx
from datafree.fit import Clock, duration
from datafree.graph.flow import read
from datafree.method import Method, find_method, option
from datafree.plan import Target
from datafree.quant.insert import insert
from datafree.synth.generator import Conditional
from datafree.synth.generator import Recipe as Generation
from datafree.synth.source import Pool, Source
from datafree.task import Task
from datafree.tune.distill import ActRange, Backend, Falling, Gradient, distill
from datafree.tune.distill import Recipe as Distillation

Budget = Literal["smoke", "fast", "standard", "paper"]
Size = Literal["light", "full"]
Start = Literal["nearest", "anchor"]
Prepare = Callable[[nn.Module, float | None], Source]  # given the student, and how many seconds it may take
Lesson = tuple[Prepare, int, Distillation]  # where inputs come from, how many steps the student takes, and how

_LARGE = 64  # from this side on the published setting is that of ImageNet
_JOINT = 1.5  # times as long as a step of the generator alone takes one of both
_SHOWN = 64  # pictures, to whoever keeps them


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a budget fills in: the fields of the same names, where a method has them, and ``milestones``, shares of all steps."""

    steps: int
    batch: int
    rate: float
    warm_up: int = 0
    generator_rate: float = 2e-3
    generator: Size = "light"
    picture_steps: int = 0
    pictures: int = 0
    falling: Falling = "one-cycle"
    milestones: tuple[float, ...] = (0.25, 0.5, 0.75)
    act_range: ActRange = "percentile"
    range_batches: int = 4
    gradient: Gradient = "masked"
    average: float = 0.2
    clip: float = 5.0
    cross_entropy: float = 0.0
    weight: float = 1.0


def gdfq_setting(classes: int, large: bool) -> Setting:
    """GDFQ's, as coded, from which those of its descendants differ: 400 epochs of 200 steps, the KL averaged over the classes too."""
    warm_up = 200 * (50 if large else 4)
    return Setting(
        warm_up=warm_up,
        steps=80000 - warm_up,
        batch=16 if large else 200,
        rate=1e-6 if large else 1e-4,
        generator_rate=1e-3,
        generator="full",
        falling="steps",
        act_range="moving",
        range_batches=20,
        gradient="identity",
        average=0.0,
        clip=0.0,
        cross_entropy=1.0,
        weight=1 / classes,
    )


def kmdfq_setting(large: bool) -> Setting:
    """That of KMDFQ, GDFQ's journal version: another distance, of weight 1, and a longer warm-up on small pictures."""
    published = gdfq_setting(1, large)
    warm_up = published.warm_up if large else 4000
    return replace(published, warm_up=warm_up, steps=80000 - warm_up)


def closed_student(teacher: nn.Module, task: Task, target: Target, ctx: Ctx) -> nn.Module:
    """The student of ``anchor``, where training may begin; whoever keeps pictures is not shown its own."""
    return find_method("anchor")().run(teacher, task, target, replace(ctx, on_pictures=None))


def is_large(task: Task) -> bool:
    """Whether inputs are of the size of ImageNet's, for which papers have settings of their own."""
    return max(task.shape[1:], default=0) >= _LARGE


@dataclass(frozen=True, kw_only=True)
class Trained(Method):
    """The fields of a method whose student learns from the network's answers to inputs that a source makes.

    The budget ``paper`` is the published setting, meant for a GPU. The others shorten it: higher rates on one cycle, a clipped and
    masked gradient, ranges at a percentile, averaged weights, no cross-entropy (a generator that is hardly warm misleads the student by
    it) but more weight on the distance, and the first two a lighter generator.
    """

    shares_work = True

    budget: Budget = option("fast", "fills in what is None: for half a minute, some minutes or an hour on a small network, or as published")
    start: Start = option("nearest", "the student that learns: rounded to nearest, or that of anchor, whose ranges stay")
    steps: int | None = option(None, "steps of the student", at_least=0)
    batch: int | None = option(None, "pictures of a step", at_least=2)
    rate: float | None = option(None, "learning rate of the student", at_least=0)
    cross_entropy: float | None = option(None, "weight of the cross-entropy in the student's loss", at_least=0)
    weight: float | None = option(None, "weight of the distance from the network's logits in the student's loss", at_least=0)
    falling: Falling | None = option(None, "the student's rate: one cycle, a cosine, or tenfold at milestones, as a generator's then")
    act_range: ActRange | None = option(None, "activation ranges: a moving min-max, a percentile, the extremes, or as they were")
    percentile: float = option(99.9, "of the values that the range holds at either end", at_least=50, at_most=100)
    range_batches: int | None = option(None, "batches that tell the activation ranges", at_least=1)
    gradient: Gradient | None = option(None, "of values that were clipped: none, or that of the identity as published")
    average: float | None = option(None, "share of the steps, the last ones, over which the student is averaged", at_least=0, at_most=1)
    clip: float | None = option(None, "largest norm of the student's gradient; 0: any, as published", at_least=0)
    max_seconds: float | None = option(None, "when to stop, rates and average keeping pace", at_least=1)
    hold_out: int = option(0, "pictures that are only looked at: the student ends as it was best on them, and once it stays so", at_least=0)
    compile: bool = option(False, "compile both networks: minutes at first, then faster steps; on a GPU only")

    @abstractmethod
    def lesson(self, teacher: nn.Module, task: Task, target: Target, ctx: Ctx) -> Lesson:
        """What the method is: its source, and how the student learns from it."""

    def run(self, teacher: nn.Module, task: Task, target: Target, ctx: Ctx) -> nn.Module:
        """Make the student, then train it as the lesson says."""
        return self.teach(teacher, task, target, ctx, *self.lesson(teacher, task, target, ctx))

    def setting(self, published: Setting, task: Task) -> Setting:
        """That of the budget, ``published`` for ``paper``, with the fields that are given in place of its own."""
        setting = published if self.budget == "paper" else _shortened(self.budget, is_large(task))
        if self.start == "anchor":
            setting = replace(setting, act_range="stay")
        return replace(setting, **{each.name: value for each in fields(Setting) if (value := getattr(self, each.name, None)) is not None})

    def distillation(self, setting: Setting) -> Distillation:
        """The recipe of the student's training in this setting; the distance and what belongs to it are left to the method."""
        return Distillation(
            batch=setting.batch,
            rate=setting.rate,
            falling=setting.falling,
            milestones=setting.milestones,
            clip=setting.clip or None,
            weight=setting.weight,
            classes=setting.cross_entropy,
            weight_range="stay" if self.start == "anchor" else "follow",
            act_range=setting.act_range,
            range_batches=setting.range_batches,
            percentile=self.percentile,
            gradient=setting.gradient,
            average=setting.average,
            hold_out=self.hold_out,
        )

    def teach(
        self, teacher: nn.Module, task: Task, target: Target, ctx: Ctx, prepare: Prepare, steps: int, recipe: Distillation
    ) -> nn.Module:
        """Make the student, then the source, then train the one on the other, all within ``max_seconds``."""
        clock = Clock(self.max_seconds)
        if self.start == "anchor":
            student = closed_student(teacher, task, target, ctx)
        else:
            student = insert(teacher, make_plan(read(teacher, task, ctx), teacher, target, own_range, ctx))  # weights are min-max ranged
        source = prepare(student, clock.rest())
        backend: Backend | None = "inductor" if self.compile and ctx.device.type == "cuda" else None
        if self.compile and backend is None:
            ctx.note("nothing is compiled on a CPU, where it does not pay")
        distill(teacher, student, task, source, steps, ctx, replace(recipe, max_seconds=clock.rest(), compile=backend))
        if ctx.on_pictures is not None:
            inputs = source.batch.inputs if isinstance(source, Pool) else source.sample(_SHOWN).inputs
            ctx.on_pictures(inputs[:_SHOWN])
        return student


@dataclass(frozen=True, kw_only=True)
class Taught(Trained):
    """The fields of a method with a generator, which learns alone at first and then along with the student."""

    warm_up: int | None = option(None, "steps of the generator alone", at_least=0)
    generator_rate: float | None = option(None, "learning rate of the generator", at_least=0)
    generator: Size | None = option(None, "channels of the generator: 64 and 32, or 128 and 64 as published")

    def generation(self, setting: Setting) -> Generation:
        """The recipe of a generator in this setting, one class an input and GDFQ's loss unless they are replaced."""
        every = setting.warm_up + setting.steps
        return Generation(
            batch=setting.batch,
            rate=setting.generator_rate,
            milestones=tuple(round(each * every) for each in setting.milestones) if setting.falling == "steps" else (),
            widths=(128, 64) if setting.generator == "full" else (64, 32),
        )

    def distillation(self, setting: Setting) -> Distillation:
        """As of any method, but milestones are shares of all steps, and those of the generator alone are over by then."""
        ahead = setting.warm_up / max(1, setting.warm_up + setting.steps)
        left = tuple((each - ahead) / (1 - ahead) for each in setting.milestones if ahead < 1)
        return replace(super().distillation(setting), milestones=left)

    def generated(self, teacher: nn.Module, task: Task, setting: Setting, recipe: Generation, ctx: Ctx) -> Prepare:
        """A generator, warmed up: what :meth:`teach` takes. It gets the share of the time that its steps alone are meant to take."""

        def prepare(student: nn.Module, seconds: float | None) -> Source:
            source, steps = Conditional(teacher, task, ctx, recipe), setting.warm_up
            if seconds is None:
                source.learn(steps, student)
                return source
            share = seconds * steps / max(1, steps + _JOINT * setting.steps)
            taken = len(source.learn(steps, student, Clock(share)))
            if taken < steps:
                ctx.note(f"generator: stopped after {taken} of {steps} steps, when its {duration(share)} were over")
            return source

        return prepare


def _shortened(budget: Budget, large: bool) -> Setting:
    """``large``: pictures of the size of ImageNet's, of which a step takes fewer."""
    if budget == "smoke":
        return Setting(steps=40, batch=8 if large else 32, rate=1e-3, warm_up=40, picture_steps=50, pictures=64)
    few = 16 if large else 64
    if budget == "fast":
        return Setting(steps=400, batch=few, rate=1e-3, warm_up=200, picture_steps=150, pictures=256)
    return Setting(steps=5000, batch=few, rate=1e-3, warm_up=1000, generator_rate=1e-3, generator="full", picture_steps=500, pictures=1024)
