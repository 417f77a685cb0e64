"""AdaDFQ: a generator and a student that play for how much one can learn from a picture (Qian et al., CVPR 2023, arXiv 2303.06869)."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from datafree.context import Ctx
from datafree.method import method, option
from datafree.plan import Target
from datafree.quant.observe import unset_pass
from datafree.synth.generator import Look
from datafree.synth.source import Terms
from datafree.synth.terms import class_entropy, entropies, statistics
from datafree.task import Task
from datafree.tune.taught import Lesson, Setting, Taught, gdfq_setting, is_large

Variant = Literal["adadfq", "adasg"]

_LEAST = 1e-6  # nats: what is less is the rounding of an entropy


@dataclass(frozen=True, kw_only=True)
class Adaptable:
    """AdaDFQ's loss of a generator: network and student disagree on its inputs neither too little nor too much.

    The disagreement is softmax(t - s), the agreement softmax(t + s), t and s the logits of network and student. The entropy of the
    former, normalised by :func:`undecided`, is kept between ``lower`` and ``upper``; the cross-entropies of both to the wanted class
    have the weights ``disagreement`` and ``agreement``, the distance of the batch norms' statistics that of ``statistics``. A student
    whose activations have no ranges yet computes with float ones.
    """

    task: Task
    lower: float
    upper: float
    disagreement: float
    agreement: float
    statistics: float

    def __call__(self, look: Look, student: nn.Module) -> Terms:
        """The terms; no statistics where the network has no norms."""
        with unset_pass(student):
            s = self.task.run(student, look.inputs).float()
        t = look.answer.float()
        found = undecided(t - s)
        terms = {
            "lower bound": F.relu(self.lower - found).mean(),
            "upper bound": F.relu(found - self.upper).mean(),
            "disagreement": self.disagreement * class_entropy(t - s, look.labels),
            "agreement": self.agreement * class_entropy(t + s, look.labels),
        }
        if look.found:
            terms["bn_statistics"] = self.statistics * statistics(look.found, "layer")
        return terms


def undecided(logits: Tensor) -> Tensor:
    """Entropies of the softmax from 0, the least of the batch, to 1, that of all classes alike: (n, classes) -> (n,)."""
    entropy = entropies(logits)
    least = entropy.min()
    return ((entropy - least) / (math.log(logits.shape[1]) - least).clamp(min=_LEAST)).clamp(max=1.0)


@method("adadfq")
class Adadfq(Taught):
    """As GDFQ, but the generator looks at the student as well: for pictures on which it can still learn from the network.

    The disagreement of the two on a picture is the softmax of the difference of their logits. Its entropy, normalised over the batch, is
    to stay between two bounds; the class wanted of a picture is asked of the disagreement and, less than of the network alone, of the
    sum of the logits; statistics weigh as much as the bounds. The student then lowers the disagreement, by that loss alone: ``-T^2``
    times the entropy of the softmax of the difference over T. AdaSG (AAAI 2023) is the same with other bounds and weights. Without its
    bounds: ``lower`` 0 and ``upper`` 1; without either cross-entropy: a weight of 0.

    The budget ``paper`` is the published setting, as coded: 400 epochs of 200 steps of 16 pictures. Bounds and weights that are None
    are those published for ResNet-20 on small inputs and for ResNet-18 on large ones, at 3, 4 or 5 bits, whichever is nearest to the
    (lowest) width of the weights; for MobileNetV2 and ResNet-50 others were published. What the shorter budgets change: see
    ``tune.taught``.

    Differs: while the generator learns alone, the student's activations have no ranges yet, which the code tracks meanwhile; here the
    student then quantizes its weights alone. No epoch is chosen by its accuracy on a test set. A network without batch norms has no
    statistics: its generator learns from the logits alone.
    """

    variant: Variant = option("adadfq", "the bounds and weights of AdaDFQ, or those of AdaSG")
    lower: float | None = option(None, "bound of the normalised entropy of the disagreement; None: as published", at_least=0, at_most=1)
    upper: float = option(0.8, "the same from above", at_least=0, at_most=1)
    disagreement: float | None = option(None, "weight of the class in what the two disagree on; None: as published", at_least=0)
    agreement: float = option(0.1, "weight of the class in what the two agree on", at_least=0)
    statistics: float = option(1.0, "weight of the statistics in the generator's loss", at_least=0)
    temperature: float | None = option(None, "of the student's loss; None: 20 on small inputs, 5 on large ones, as published", at_least=0.1)

    def lesson(self, teacher: nn.Module, task: Task, target: Target, ctx: Ctx) -> Lesson:
        """A generator that warms up alone, then learns along with the student."""
        setting, (lower, disagreement) = self.setting(self.published(task), task), self._bounds(is_large(task), min(target.widths))
        objective = Adaptable(
            task=task,
            lower=lower if self.lower is None else self.lower,
            upper=self.upper,
            disagreement=disagreement if self.disagreement is None else self.disagreement,
            agreement=self.agreement,
            statistics=self.statistics,
        )
        generation = replace(self.generation(setting), objective=objective)
        temperature = self.temperature or (5.0 if is_large(task) else 20.0)
        recipe = replace(self.distillation(setting), distance="adaptability", temperature=temperature)
        return self.generated(teacher, task, setting, generation, ctx), setting.steps, recipe

    def published(self, task: Task) -> Setting:
        """The published setting, as coded."""
        large = is_large(task)
        return replace(
            gdfq_setting(1, large),
            batch=16,
            rate=1e-5 if large else 1e-4,
            milestones=(0.875,) if large else (0.25, 0.5, 0.75),
            cross_entropy=0.0,
        )

    def _bounds(self, large: bool, bits: int) -> tuple[float, float]:
        """Lower bound, and weight of the disagreement."""
        if self.variant == "adasg":
            return 0.3, 0.1
        return 0.3 if large and bits >= 4 else 0.1, 0.3 if large and bits >= 5 else 0.2
