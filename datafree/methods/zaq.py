"""ZAQ: a generator looks for inputs on which student and network differ, and the student learns on them (Liu et al., CVPR 2021)."""

from dataclasses import dataclass, replace

from torch import nn

from datafree.context import Ctx
from datafree.graph.swap import frozen_copy
from datafree.method import method, option
from datafree.plan import Target
from datafree.quant.observe import unset_pass
from datafree.synth.generator import Look
from datafree.synth.source import Terms
from datafree.task import Task
from datafree.tune.features import captured, difference, find_ends, relations
from datafree.tune.taught import Lesson, Setting, Taught
from datafree.tune.terms import l1

_EACH = 5  # steps of the student for one of the generator


@dataclass(frozen=True)
class Apart:
    """ZAQ's loss of a generator: network and student are far apart, by their logits and by their maps, and the last map is lively.

    ``ends`` are the modules of ``teacher`` that make the maps, see ``tune.features``; without any, the logits are all there is. The
    weights of the maps' distance and of the mean absolute value of the last one are ``relation`` and ``activity``.
    """

    teacher: nn.Module
    task: Task
    ends: tuple[str, ...]
    relation: float
    activity: float

    def __call__(self, look: Look, student: nn.Module) -> Terms:
        """The terms; the network runs once more, for its maps."""
        with captured(self.teacher, self.ends) as maps:
            t = self.task.run(self.teacher, look.inputs)
        with unset_pass(student), captured(student, self.ends) as own_maps:
            terms = {"distance": -l1(t, self.task.run(student, look.inputs))}
        if self.ends:
            terms["relations"] = -self.relation * difference(relations, maps, own_maps)
            terms["activity"] = -self.activity * maps[self.ends[-1]][-1].float().abs().mean()
        return terms


@method("zaq")
class Zaq(Taught):
    """A game: the generator makes inputs on which the two differ most, the student learns to answer them as the network does.

    They differ by the mean absolute distance of their logits, and by that of the maps in which units end, after every position has
    taken a share of those it is like, and every channel of those it is unlike. The generator knows no classes and no statistics, only
    that the network's last map should be lively; it takes one step while the student takes five. It does not learn alone before,
    unless ``warm_up`` says so.

    The budget ``paper`` is the published setting, as coded for small inputs: 300 epochs of 60 steps of the generator.

    Differs: the student's batch norms keep the network's statistics, which move with the inputs in the code. Activation ranges are the
    extremes of 20 batches before the student learns, where the code's grow all along. A network without convolutional units has no
    maps, which is noted: the logits are all that the two differ by. Reports of others could not reproduce the published accuracy.
    """

    relation: float = option(1.0, "weight of the maps' distance, for both", at_least=0)
    activity: float = option(0.1, "weight of the last map's mean absolute value, for the generator", at_least=0)

    def lesson(self, teacher: nn.Module, task: Task, target: Target, ctx: Ctx) -> Lesson:
        """A generator that looks for what the two networks disagree on, in turns with the student."""
        setting = replace(self.setting(_PUBLISHED, task), warm_up=self.warm_up or 0)
        ends = find_ends(teacher, task, ctx)
        generation = self.generation(setting)
        generation = replace(
            generation,
            latent=256,
            form="unconditional",
            milestones=tuple(each // _EACH for each in generation.milestones),
            objective=Apart(frozen_copy(teacher), task, ends, self.relation, self.activity),
        )
        recipe = replace(
            self.distillation(setting),
            distance="l1",
            weight_decay=5e-4,
            features=relations,
            feature_weight=self.relation,
            each=_EACH,
        )
        return self.generated(teacher, task, setting, generation, ctx), setting.steps, recipe


_PUBLISHED = Setting(
    warm_up=0,
    steps=300 * 60 * _EACH,
    batch=256,
    rate=0.1,
    generator_rate=1e-3,
    generator="full",
    falling="steps",
    milestones=(1 / 3, 2 / 3),
    act_range="extremes",
    range_batches=20,
    gradient="identity",
    average=0.0,
    clip=0.0,
)
