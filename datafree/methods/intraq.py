"""IntraQ: a pool of pictures whose classes spread, and distillation on it (Zhong et al., CVPR 2022, arXiv 2111.09136)."""

from dataclasses import replace

from torch import nn

from datafree.context import Ctx
from datafree.method import method, option
from datafree.plan import Target
from datafree.synth.noise import count_classes
from datafree.task import Task
from datafree.tune.pooled import Pooled, pool_setting
from datafree.tune.taught import Lesson, is_large

_SPREAD = 100  # classes, from which on the published margins are those of CIFAR-100


@method("intraq")
class IntraQ(Pooled):
    """Pictures of a class differ as real ones do: in size, in how sure the network is of them, and in what it makes of them.

    Beside the statistics of the batch norms, a picture's loss is the distance of the probability of its class from what it is meant to
    be, 1 or less by chance; and its feature (what enters the last layer) keeps within a margin of the mean one of the earlier pictures
    of its class. Every other step, by chance, shows the network a mirrored part of the pictures. The student then learns from the pool:
    the cross-entropy and the KL divergence at temperature 20.

    Published margins and certainties depend on the data: those for 10 classes serve networks of fewer than 100, those for 100 classes
    all others, and large pictures have none (a certainty of 1, a margin of 0 to 2). The budget ``paper`` is the published setting.

    Reconstructed: from the published code; of the paper only the abstract could be read.

    Differs: activation ranges come from the pool; the code takes them from a GDFQ generator, trained for
    that alone. All pictures of one run are earlier pictures to those made after them. Parts of pictures are the same for a whole batch.
    The shorter budgets take Adam's rate from 0.2 along a cosine. A network without batch norms has pictures for its classes alone.
    """

    certainty: float | None = option(None, "least probability that a picture of a class is meant to have", at_least=0, at_most=1)
    nearest: float | None = option(None, "least cosine distance from the mean feature of the class", at_least=0, at_most=2)
    farthest: float | None = option(None, "largest cosine distance from the mean feature of the class", at_least=0, at_most=2)
    reinforce: float = option(0.5, "probability with which a step shows mirrored parts of the pictures", at_least=0, at_most=1)
    temperature: float = option(20.0, "of the KL divergence", at_least=0.1)

    def lesson(self, teacher: nn.Module, task: Task, target: Target, ctx: Ctx) -> Lesson:
        """A pool of pictures, unlike each other within a class."""
        large, many = is_large(task), count_classes(teacher, task, ctx) >= _SPREAD
        published = (1.0, 0.0, 2.0) if large else (0.6, 0.02, 1.0) if many else (0.95, 0.05, 0.8)
        given = (self.certainty, self.nearest, self.farthest)
        certainty, *margin = (each if each is not None else value for each, value in zip(given, published, strict=True))
        setting = self.setting(replace(pool_setting(large, 1e-6 if large else 1e-4), cross_entropy=1.0), task)
        painting = replace(
            self.painting(setting), certainty=certainty, margin=(margin[0], margin[1]), flip=True, crop=0.5, views=self.reinforce
        )
        recipe = replace(self.distillation(setting), distance="kl", temperature=self.temperature)
        return self.pooled(teacher, task, setting, painting, ctx), setting.steps, recipe
