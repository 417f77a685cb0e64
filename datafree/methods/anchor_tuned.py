"""Our own closed form, then a short distillation on pictures that are anchored to the network (no published method)."""

from dataclasses import dataclass, fields, replace
from typing import Literal

from torch import nn

from datafree.context import Ctx
from datafree.fit import Clock
from datafree.graph.taps import anchored_alike
from datafree.method import Method, method, option
from datafree.plan import Target
from datafree.synth.generator import Conditional
from datafree.synth.generator import Recipe as Generation
from datafree.synth.noise import Pixels
from datafree.synth.noise import Recipe as Painting
from datafree.synth.source import Mixed, Pool, Prior, Source
from datafree.synth.terms import stored_moments
from datafree.task import Task
from datafree.tune.distill import Recipe, distill
from datafree.tune.taught import closed_student, is_large

Budget = Literal["smoke", "fast", "standard"]
Origin = Literal["procedural", "distilled", "both", "mixed"]

_FEWER = 16  # such a part of the pool there is where pictures are large
_SHIFT = 16  # such a part of the sides a picture is shifted at most


@dataclass(frozen=True)
class _Setting:
    """What a budget says: steps of the student; how many pictures are optimised, and by how many steps; steps of the generator alone.

    And by the size of the inputs: pictures of a step, those optimised together, the rates of weights and of norms, the largest norm of the
    gradient, the pictures.
    """

    steps: int
    pictures: int
    picture_steps: int
    warm_up: int
    batch: int = 64
    painted: int = 128
    rate: float = 3e-3
    norm_rate: float = 1e-2
    clip: float = 5.0
    source: Origin = "distilled"


@method("anchor-tuned")
class AnchorTuned(Method):
    """The student of ``anchor`` learns to answer like the network, on pictures optimised for its batch norms.

    The pictures begin as leaves and pink noise, and follow the gradient until a batch of them has the statistics that the norms have
    stored; of no class, since pictures of classes look like nothing that the network knows. Each step mirrors and shifts some of them. As
    in the closed form, they pass the network as if they were its data: what enters a batch norm is brought to the stored statistics, and
    the student's norms are helped just as much, so that whatever else it does stays to be learned. Weights follow the squared distance of
    the logits, biases and the affine parts of norms too, at a higher rate; the grids stay where the closed form has put them, and gradients
    pass through the rounding of all values but clipped ones. The pictures may be procedural instead, new in every step, half of each kind,
    or a third of each and of a generator's that learns along. Of large pictures, of which there are few, half are procedural, and weights
    stay.

    A network without batch norms has nothing that pictures could be anchored to: its student is that of ``anchor``, and a note says so.
    """

    shares_work = True

    budget: Budget = option("fast", "fills in what is None: for half a minute, some minutes or an hour on a small network")
    source: Origin | None = option(None, "the pictures: leaves and pink noise, optimised, both, or both and a generator's (mixed)")
    steps: int | None = option(None, "of the student", at_least=0)
    batch: int | None = option(None, "pictures of a step; None: 64, or 16 large ones", at_least=2)
    rate: float | None = option(None, "learning rate of weights (SGD, along one cycle)", at_least=0)
    norm_rate: float | None = option(None, "that of biases and the affine parts of norms", at_least=0)
    pictures: int | None = option(None, "how many pictures are optimised, where any are", at_least=1)
    picture_steps: int | None = option(None, "steps in which each batch of them is optimised", at_least=1)
    warm_up: int | None = option(None, "steps of the generator alone, where there is one", at_least=0)
    max_seconds: float | None = option(None, "when to stop, the closed form included", at_least=1)

    def run(self, teacher: nn.Module, task: Task, target: Target, ctx: Ctx) -> nn.Module:
        """Make the student in closed form, then train it."""
        clock = Clock(self.max_seconds)
        student = closed_student(teacher, task, target, ctx)
        if not stored_moments(teacher):
            ctx.note("the network has no batch norms that pictures could be anchored to: the student stays as the closed form has made it")
            return student
        setting = self._setting(is_large(task))
        source = self._source(teacher, student, task, setting, clock.rest(), ctx)
        roll = max(task.shape[1:], default=0) // _SHIFT
        recipe = Recipe(
            batch=setting.batch,
            rate=setting.rate,
            norm_rate=setting.norm_rate,
            clip=setting.clip,
            weight_range="stay",
            act_range="stay",
            flip=True,
            roll=roll,
            max_seconds=clock.rest(),
        )
        with anchored_alike(teacher, student):
            distill(teacher, student, task, source, setting.steps, ctx, recipe)
        if ctx.on_pictures is not None:
            ctx.on_pictures(source.sample(setting.batch).inputs)
        return student

    def _setting(self, large: bool) -> _Setting:
        """That of the budget, with the fields that are given in place of its own."""
        budgets = {"smoke": _Setting(20, 64, 20, 20), "fast": _Setting(300, 1024, 40, 150), "standard": _Setting(5000, 4096, 200, 1000)}
        setting = budgets[self.budget]
        if large:
            few = setting.pictures // _FEWER
            setting = replace(setting, pictures=few, batch=16, painted=32, rate=0.0, norm_rate=3e-2, clip=0.5, source="both")
        given = {each.name: getattr(self, each.name, None) for each in fields(_Setting)}
        return replace(setting, **{name: value for name, value in given.items() if value is not None})

    def _source(self, teacher: nn.Module, student: nn.Module, task: Task, setting: _Setting, seconds: float | None, ctx: Ctx) -> Source:
        """``seconds``: what is left, of which pictures get a half and the generator alone a tenth."""
        sources: list[Source] = []
        if setting.source != "distilled":
            sources.append(Prior("mix", task, ctx.generator))
        if setting.source != "procedural":
            painting = Painting(
                steps=setting.picture_steps,
                rate=0.1,
                falling="cosine",
                batch=setting.painted,
                start="mix",
                per_image=False,
                share="layer",
                max_seconds=None if seconds is None else seconds / 2,
            )
            sources.append(Pool(Pixels(teacher, task, ctx, painting).sample(max(setting.pictures, setting.batch)), ctx.generator))
        if setting.source == "mixed":
            generator = Conditional(teacher, task, ctx, Generation(batch=setting.batch, rate=2e-3, widths=(64, 32)))
            generator.learn(setting.warm_up, student, Clock(None if seconds is None else seconds / 10))
            sources.append(generator)
        return Mixed(tuple(sources), (1 / len(sources),) * len(sources), ctx.generator)
