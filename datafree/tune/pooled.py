"""What the methods share that train a student on a pool of pictures, optimised beforehand and fixed from then on."""

from dataclasses import dataclass, replace

from torch import nn

from datafree.context import Ctx
from datafree.method import option
from datafree.synth.noise import Pixels
from datafree.synth.noise import Recipe as Painting
from datafree.synth.source import Pool, Source
from datafree.task import Task
from datafree.tune.distill import Recipe as Distillation
from datafree.tune.taught import Prepare, Setting, Trained

_PART = 0.5  # least share of the sides of a picture that is shown


def pool_setting(large: bool, rate: float) -> Setting:
    """As published for IntraQ and HAST: 151 epochs of 200 steps, the student's learning rate being ``rate``."""
    return Setting(
        steps=30200,
        batch=16 if large else 256,
        rate=rate,
        picture_steps=1000,
        pictures=5120,
        falling="steps",
        milestones=(100 / 151,) if large else (20 / 151, 40 / 151, 60 / 151),
        act_range="moving",
        range_batches=20,
        gradient="identity",
        average=0.0,
        clip=0.0,
        weight=20.0,
    )


@dataclass(frozen=True, kw_only=True)
class Pooled(Trained):
    """The fields of a method with a pool of pictures, of which each step takes some."""

    pictures: int | None = option(None, "pictures of the pool, and most that a step takes", at_least=2)
    picture_steps: int | None = option(None, "steps in which each batch of pictures is optimised", at_least=1)
    augment: bool = option(True, "show the student mirrored pictures and parts of them, as published")

    def painting(self, setting: Setting) -> Painting:
        """The recipe of the pictures in this setting: statistics of the batch alone, to which the method adds its terms."""
        recipe = Painting(steps=setting.picture_steps, start="gaussian", per_image=False, spread="variance", share="layer")
        if self.budget == "paper":
            return replace(recipe, batch=256, rate=0.5, patience=50)
        return replace(recipe, batch=64, rate=0.2, falling="cosine")

    def distillation(self, setting: Setting) -> Distillation:
        """As of any method, on parts of the pool, of which some pictures may be held out."""
        recipe = replace(super().distillation(setting), batch=min(setting.batch, max(1, setting.pictures - self.hold_out)))
        return replace(recipe, flip=True, crop=_PART) if self.augment else recipe

    def pooled(self, teacher: nn.Module, task: Task, setting: Setting, recipe: Painting, ctx: Ctx, cost: float = 1.0) -> Prepare:
        """The pool: what :meth:`teach` takes. ``cost``: of a step of the student, where one on as many pictures costs 1.

        It gets the share of the time that its steps are meant to take.
        """

        def prepare(student: nn.Module, seconds: float | None) -> Source:
            made, shown = setting.pictures * setting.picture_steps, cost * setting.steps * setting.batch
            share = None if seconds is None else seconds * made / (made + shown)
            return Pool(Pixels(teacher, task, ctx, replace(recipe, max_seconds=share)).sample(setting.pictures), ctx.generator)

        return prepare
