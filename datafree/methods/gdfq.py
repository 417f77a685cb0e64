"""GDFQ: a generator taught by the network, and distillation on what it draws (Xu et al., ECCV 2020, arXiv 2003.03603)."""

from dataclasses import replace
from typing import Literal

from torch import nn

from datafree.context import Ctx
from datafree.method import method, option
from datafree.plan import Target
from datafree.synth.generator import Convincing
from datafree.synth.noise import count_classes
from datafree.task import Task
from datafree.tune.taught import Lesson, Taught, gdfq_setting, is_large, kmdfq_setting

Variant = Literal["gdfq", "kmdfq"]


@method("gdfq")
class Gdfq(Taught):
    """A generator draws pictures of classes that the network believes in; student and generator learn in turn.

    The generator's loss is the cross-entropy of the network's answer to the wanted class, and the distance of the statistics that enter
    each batch norm from the stored ones. The student's is the cross-entropy and a distance of its logits from the network's: the KL
    divergence at temperature 20, or the mean squared error (KMDFQ, the journal version, TCSVT 2023, where statistics weigh 1 instead of
    0.1). First the generator learns alone, then both take a step on every batch. Weights are on asymmetric min-max grids of each output
    channel that follow them; activation ranges are set once, before the student learns.

    The budget ``paper`` is the published setting, as coded: 400 epochs of 200 steps, meant for a GPU. What the others shorten: see
    ``tune.taught``.

    Differs: the code averages the KL over the classes too, which the paper does not: as coded, its ``weight`` is 1 / classes. It has
    statistics of its own as well (``synth.generator.Convincing``). No epoch is chosen by its accuracy on a test set: the last weights
    count, or their average. The published moving range overshoots by its correction of the bias (``quant.observe``); since it forgets
    all but some twenty batches, the last ones before the student learns are all that it is taken from here. On large pictures ranges
    are published to freeze long before the generator is warm, here they wait for it. A network without batch norms has no statistics,
    so its generator learns from the classes alone.
    """

    variant: Variant = option("gdfq", "the losses: of the conference paper, or of the journal version")
    statistics: float | None = option(None, "weight of the statistics in the generator's loss; None: as published", at_least=0)
    temperature: float = option(20.0, "of the KL divergence", at_least=0.1)

    def lesson(self, teacher: nn.Module, task: Task, target: Target, ctx: Ctx) -> Lesson:
        """A generator that warms up alone, then learns along with the student."""
        journal = self.variant == "kmdfq"
        classes, large = count_classes(teacher, task, ctx), is_large(task)
        setting = self.setting(kmdfq_setting(large) if journal else gdfq_setting(classes, large), task)
        statistics = (1.0 if journal else 0.1) if self.statistics is None else self.statistics
        generation = replace(self.generation(setting), objective=Convincing(statistics=statistics))
        recipe = replace(self.distillation(setting), distance="mse" if journal else "kl", temperature=self.temperature)
        return self.generated(teacher, task, setting, generation, ctx), setting.steps, recipe
