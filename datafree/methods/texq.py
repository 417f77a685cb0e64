"""TexQ-style: a generator that keeps near one calibrated picture of each class (after Chen et al., TexQ, NeurIPS 2023)."""

from dataclasses import replace

from torch import nn

from datafree.context import Ctx
from datafree.fit import Clock
from datafree.method import method, option
from datafree.plan import Target
from datafree.synth.centres import Centred, centres_of
from datafree.synth.generator import Recipe as Generation
from datafree.synth.noise import Pixels, count_classes
from datafree.synth.noise import Recipe as Painting
from datafree.synth.source import Source
from datafree.task import Task
from datafree.tune.taught import Lesson, Prepare, Setting, Taught, gdfq_setting, is_large

_ALONE, _JOINT = 2.0, 3.0  # times as long as one on pixels takes a step of the generator, and one of it and the student


@method("texq")
class Texq(Taught):
    """As GDFQ, but the generator also keeps each class near a centre: what the deep batch norms see of one picture of the class.

    That picture is optimised first, for its class and for the statistics of the batch norms, of which shallow ones count less, since
    they bind texture too tightly; and its texture, the energies behind LAWS' masks, is to lie where that of procedural pictures does.
    A class counts where the network takes its picture for it. The generator's loss is then the cross-entropy, the statistics, the
    distance of each class in the batch from its centre, and from a centre that is distorted anew at every step, which keeps classes
    wide. The student learns from the cross-entropy and the KL divergence at temperature 20; on mixtures of two pictures from the latter
    alone.

    ``texture``, ``distorted``, ``centre`` and ``mixup`` of 0 and ``layered`` False switch these off, one by one.

    Reconstructed: only the abstract of the paper could be read, and its code was never published. Centres, their distortion and its
    weight are FDDA's (ECCV 2022), other weights and steps those of a third party's rebuilding; which texture is aimed at, and its weight,
    are ours, the schedule GDFQ's. The budget ``paper`` stands for these.

    Differs: statistics of a class are those of its members in a batch of all classes; FDDA takes batches of a single class. Mixtures are
    left to the budget ``paper``: in short trainings they did harm. A network without batch norms has no centres, and a note says so.
    """

    picture_steps: int | None = option(None, "steps in which the picture of each class is optimised", at_least=1)
    texture: float = option(0.1, "weight of the texture in the loss of these pictures", at_least=0)
    layered: bool = option(True, "shallow batch norms count less in it than deep ones")
    statistics: float = option(0.4, "weight of the statistics in the generator's loss", at_least=0)
    centre: float = option(0.02, "weight of the centres in it", at_least=0)
    distorted: float = option(0.9, "weight of the distorted centres in it", at_least=0)
    temperature: float = option(20.0, "of the KL divergence", at_least=0.1)
    mixup: float | None = option(None, "share of the student's steps on mixtures; None: half of the paper's, else 0", at_least=0, at_most=1)

    def lesson(self, teacher: nn.Module, task: Task, target: Target, ctx: Ctx) -> Lesson:
        """A picture of each class, optimised; the centres they tell; a generator that aims at these."""
        classes = count_classes(teacher, task, ctx)
        setting = self.setting(replace(gdfq_setting(classes, is_large(task)), weight=20.0, picture_steps=1500), task)
        mixup = self.mixup if self.mixup is not None else 0.5 if self.budget == "paper" else 0.0
        recipe = replace(self.distillation(setting), distance="kl", temperature=self.temperature, mixup=mixup, mixed_classes=False)
        return self._prepared(teacher, task, classes, setting, ctx), setting.steps, recipe

    def _prepared(self, teacher: nn.Module, task: Task, classes: int, setting: Setting, ctx: Ctx) -> Prepare:
        """Pictures, centres, generator; each gets the share of the time that its steps are meant to take."""

        def prepare(student: nn.Module, seconds: float | None) -> Source:
            clock, made = Clock(seconds), classes * setting.picture_steps
            after = setting.batch * (_ALONE * setting.warm_up + _JOINT * setting.steps)
            share = None if seconds is None else seconds * made / (made + after)
            centres = centres_of(teacher, task, Pixels(teacher, task, ctx, self._painting(setting, share)).sample(classes))
            if not centres.known.all():
                ctx.note(f"centres: the network recognises the pictures of {int(centres.known.sum())} of {classes} classes")
            objective = Centred(centres, ctx.generator, self.statistics, self.centre, self.distorted)
            generation: Generation = replace(self.generation(setting), objective=objective)
            return self.generated(teacher, task, setting, generation, ctx)(student, clock.rest())

        return prepare

    def _painting(self, setting: Setting, seconds: float | None) -> Painting:
        """The recipe of the pictures of classes."""
        recipe = Painting(
            steps=setting.picture_steps,
            rate=0.5,
            patience=50,
            lowest_rate=0.05,
            start="gaussian",
            spread="variance",
            share="layer",
            layers="depth" if self.layered else "flat",
            classes=5.0,
            texture=self.texture,
            max_seconds=seconds,
        )
        return recipe if self.budget == "paper" else replace(recipe, rate=0.2, falling="cosine", lowest_rate=1e-4)
