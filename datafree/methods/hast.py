"""HAST: hard pictures, made harder still, and aligned features (Li et al., CVPR 2023, arXiv 2303.13826)."""

from dataclasses import replace

from torch import nn

from datafree.context import Ctx
from datafree.method import method, option
from datafree.plan import Target
from datafree.synth.noise import count_classes
from datafree.task import Task
from datafree.tune.features import attention
from datafree.tune.pooled import Pooled, pool_setting
from datafree.tune.taught import Lesson, is_large

_MANY = 100  # classes, from which on the published weights are those of CIFAR-100
_PERTURBED = 2.7  # times as long as a plain step takes one with perturbed inputs


@method("hast")
class Hast(Pooled):
    """The student learns from pictures that are hard to tell, and from the same ones a little harder.

    A pool of pictures is optimised for the statistics of the batch norms and for their classes, those the network is less sure of
    counting more. Each step then takes some of them, moves them by a small step along the sign of the gradient of the student's loss, and
    the loss counts for both. It is the KL divergence at temperature 20 and the distance of the energies of the channels in which units
    end, normalised over the channels; there is no cross-entropy.

    Published weights depend on the data: those for 10 classes serve networks of fewer than 100, those for 100 classes all others on
    small pictures, those of ImageNet large ones. The budget ``paper`` is the published setting; in the others the weight of the features
    is as many times that of the KL divergence as there.

    Differs: activation ranges come from the pool, where the code takes them from a GDFQ generator. Parts of pictures are the same for a
    whole batch. The learning rate falls after so many steps as in the code, not the paper. A network without batch norms has pictures for
    its classes alone, one without convolutional units no features; notes say so.
    """

    class_weight: float | None = option(None, "weight of the cross-entropy in the pictures' loss; None: as published", at_least=0)
    focus: float | None = option(None, "how much more hard pictures count in it; None: as published", at_least=0)
    perturb: float | None = option(None, "how far pictures are moved; 0: they stay; None: as published", at_least=0)
    features: float | None = option(None, "weight of the features in the student's loss; None: as published", at_least=0)
    temperature: float = option(20.0, "of the KL divergence", at_least=0.1)

    def lesson(self, teacher: nn.Module, task: Task, target: Target, ctx: Ctx) -> Lesson:
        """A pool of hard pictures, made harder in every step."""
        large, many = is_large(task), count_classes(teacher, task, ctx) >= _MANY
        published = pool_setting(large, 1e-6 if large else 1e-5)
        setting = self.setting(published, task)
        painting = self.painting(setting)
        painting = replace(
            painting,
            classes=_either(self.class_weight, 0.1 if large else 10.0),
            focus=_either(self.focus, 0.5 if large else 2.0),
            flip=large,
            crop=0.5 if large else 1.0,
            views=0.5,
        )
        weight = 4e3 if large else 2e3 if many else 1e3
        weight = _either(self.features, weight * setting.weight / published.weight)
        perturb = _either(self.perturb, 0.02 if many and not large else 0.01)
        recipe = replace(self.distillation(setting), distance="kl", temperature=self.temperature, perturb=perturb)
        recipe = replace(recipe, features=attention if weight else None, feature_weight=weight)
        pool = self.pooled(teacher, task, setting, painting, ctx, cost=_PERTURBED if perturb else 1.0)
        return pool, setting.steps, recipe


def _either(given: float | None, published: float) -> float:
    return published if given is None else given
