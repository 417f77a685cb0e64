"""ACQ-style: a generator that is told where the network shall look (after Li et al., Pattern Recognition 2024, arXiv 2301.07266)."""

from dataclasses import dataclass, replace
from typing import final

from torch import nn

from datafree.context import Ctx
from datafree.graph.swap import frozen_copy
from datafree.graph.taps import anchored, outputs
from datafree.method import method, option
from datafree.plan import Target
from datafree.synth.attention import Placed, attention, disagreement, off_centre, sameness, spatial_module
from datafree.synth.generator import Convincing, Look
from datafree.synth.source import Terms
from datafree.task import Task
from datafree.tune.taught import Lesson, Taught, is_large, kmdfq_setting


@method("acq")
class Acq(Taught):
    """KMDFQ, whose generator also places what it draws: the network's attention is to be centred where it is told.

    Attention is the squared output of the last module that keeps spatial axes, summed over the channels, as shares. To KMDFQ's loss of
    the generator (``gdfq`` with ``variant="kmdfq"``) three terms are added, each left out where its weight is 0: the squared distance of
    the centre of attention from the place that was drawn; for pairs of inputs of one class and place, how little different noise changes
    the features; and how far attention shifts when batch norms take the statistics of the batch in place of the stored ones. The place
    enters the generator through a linear map that is added to its latent numbers, and only where the first term counts. With all
    three left out this is KMDFQ, bit for bit.

    Reconstructed: from the abstracts alone, which name the three parts; no code is published. The forms of the terms, their weights, the
    range of places and KMDFQ's setting around them are ours. The paper calls its second part adversarial; here it is a ratio of
    distances, and nothing is trained against the generator.

    A network whose last features have no spatial axes left (a transformer's are tokens) has no such attention, so nothing is added and
    a note says so. Without batch norms there is no third term.
    """

    centre: float = option(0.1, "weight of the distance of the centre of attention from its place", at_least=0)
    pairs: float = option(0.1, "weight of the sameness of inputs with different noise", at_least=0)
    consistency: float = option(0.1, "weight of the shift of attention between stored and batch statistics", at_least=0)
    statistics: float = option(1.0, "weight of the statistics in the generator's loss", at_least=0)

    def lesson(self, teacher: nn.Module, task: Task, target: Target, ctx: Ctx) -> Lesson:
        """A generator that places the attention, that warms up alone and then learns along with the student."""
        setting = self.setting(kmdfq_setting(is_large(task)), task)
        generation = replace(self.generation(setting), objective=Convincing(statistics=self.statistics))
        features = spatial_module(teacher, task, ctx)
        if features is None:
            ctx.note("the network's last features have no spatial axes: the terms of attention are left out, which leaves KMDFQ")
        elif self.centre or self.pairs or self.consistency:
            objective = _Attentive(Convincing(statistics=self.statistics), self, frozen_copy(teacher), task, features)
            policy = Placed(len(task.shape) - 1 if self.centre else 0, pairs=self.pairs > 0)
            generation = replace(generation, policy=policy, placed=self.centre > 0, features=features, objective=objective)
        recipe = replace(self.distillation(setting), distance="mse")
        return self.generated(teacher, task, setting, generation, ctx), setting.steps, recipe


@final
@dataclass(frozen=True)
class _Attentive:
    """The loss of the generator: what KMDFQ asks, and the terms of attention that weigh anything."""

    convincing: Convincing
    weights: Acq
    teacher: nn.Module
    task: Task
    module: str

    def __call__(self, look: Look, student: nn.Module) -> Terms:
        assert look.features is not None and look.blend is not None and look.noise is not None
        terms, seen = dict(self.convincing(look, student)), attention(look.features)
        if self.weights.centre and look.blend.place is not None:
            terms["attention_centre"] = self.weights.centre * off_centre(seen, look.blend.place)
        if self.weights.pairs:
            terms["pair_sameness"] = self.weights.pairs * sameness(look.features, look.noise)
        if self.weights.consistency and look.found:
            with anchored(self.teacher), outputs(self.teacher, self.module) as features:
                self.task.run(self.teacher, look.inputs)
            terms["mode_consistency"] = self.weights.consistency * disagreement(seen, attention(features[-1]))
        return terms
