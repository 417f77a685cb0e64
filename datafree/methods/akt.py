"""AKT: another method whose student also learns from the maps inside the network (Hong et al., SAC 2025, arXiv 2412.19125)."""

from dataclasses import fields, replace
from functools import partial
from typing import Any, Literal

from torch import nn

from datafree.context import Ctx
from datafree.method import method, option
from datafree.methods.adadfq import Adadfq, adadfq_setting
from datafree.methods.gdfq import Gdfq
from datafree.plan import Target
from datafree.task import Task
from datafree.tune.features import refined
from datafree.tune.taught import Taught, is_large

Host = Literal["adadfq", "gdfq"]

_BATCH = 200  # the published one, over which the published term is a sum


@method("akt")
class Akt(Taught):
    """A host method, to whose loss of the student that of refined features is added; everything else is the host's.

    Compared are the maps in which units end, before the residual sum: the softmax over the channels of their mean squares, and their
    mean squares over the positions, of unit length; either as the KL divergence of softmaxes at temperature 8, which is tiny. Without
    ``refined`` the host alone is left. The host's own fields are as it has them: its first variant, all as published.

    The budget ``paper`` is the published setting: the host's, and with AdaDFQ on small inputs 200 epochs of 200 steps of 200 pictures.

    Differs: the code sums the divergences over the batch and weighs them by 1000; here they are averaged, so that the size of a batch
    does not matter, and the weight is 1000 times the published batch of 200. The published code cannot be run: the network's maps are
    cleared before they are compared, so that they would cost nothing; here both see the same batch. A network without convolutional
    units has no maps, which is noted: the host alone teaches its student.

    Reconstructed: from the code and the tables; the paper's text could not be read. A summary of it mixes the two losses half and half.
    Only the first step of the falling rate is known, in the middle.
    """

    host: Host = option("adadfq", "the method that is added to")
    refined: bool = option(True, "learn from maps as well; else the host alone")
    refined_weight: float = option(1000.0 * _BATCH, "of the maps in the student's loss; published: 1000 times the batch", at_least=0)
    refined_temperature: float = option(8.0, "of the divergences of maps", at_least=0.1)

    def run(self, teacher: nn.Module, task: Task, target: Target, ctx: Ctx) -> nn.Module:
        """Make the student as the host does, with one more term in its loss."""
        given: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(Taught)}
        if self.host == "gdfq":
            prepare, steps, recipe = Gdfq(**given).lesson(teacher, task, ctx)
        else:
            published = adadfq_setting(task)
            if not is_large(task):
                published = replace(published, batch=_BATCH, steps=200 * 200 - published.warm_up, milestones=(0.5,))
            prepare, steps, recipe = Adadfq(**given).lesson(teacher, task, target, ctx, published)
        if self.refined:
            term = partial(refined, temperature=self.refined_temperature)
            recipe = replace(recipe, features=term, feature_weight=self.refined_weight)
        return self.teach(teacher, task, target, ctx, prepare, steps, recipe)
