"""AKT: another method whose student also learns from the maps inside the network (Hong et al., SAC 2025, arXiv 2412.19125)."""

from dataclasses import fields, replace
from functools import partial
from typing import Literal

from torch import nn

from datafree.context import Ctx
from datafree.errors import MethodError
from datafree.method import find_method, method, option
from datafree.methods.adadfq import Adadfq
from datafree.plan import Target
from datafree.task import Task
from datafree.tune.features import refined, weighted
from datafree.tune.taught import Lesson, Setting, Taught, Trained, is_large

Host = Literal["adadfq", "gdfq", "hast", "qimera", "texq", "acq", "intraq", "zaq"]

_BATCH = 200  # the published one, over which the published term is a sum


@method("akt")
class Akt(Taught):
    """A host method, to whose loss of the student that of refined features is added; everything else is the host's.

    Compared are the maps in which units end, before the residual sum: the softmax over the channels of their mean squares, and their
    mean squares over the positions, of unit length; either as the KL divergence of softmaxes at temperature 8, which is tiny. Without
    ``refined`` the host alone is left. The host's own fields are as it has them: its first variant, all as published. HAST and ZAQ, which
    compare maps themselves, go on doing so.

    Published are the hosts AdaDFQ, GDFQ and HAST. A host with a pool of pictures has no fields of a generator.

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

    def lesson(self, teacher: nn.Module, task: Task, target: Target, ctx: Ctx) -> Lesson:
        """The host's, with one more term in the student's loss."""
        prepare, steps, recipe = self._host().lesson(teacher, task, target, ctx)
        if self.refined:
            term = partial(refined, temperature=self.refined_temperature)
            if recipe.features is None:
                recipe = replace(recipe, features=term, feature_weight=self.refined_weight)
            else:
                own = weighted((recipe.feature_weight, recipe.features), (self.refined_weight, term))
                recipe = replace(recipe, features=own, feature_weight=1.0)
        return prepare, steps, recipe

    def _host(self) -> Trained:
        """With the fields that are given here. Raises MethodError where the host has no such field."""
        cls = _Longer if self.host == "adadfq" else find_method(self.host)
        assert issubclass(cls, Trained)
        known = {each.name for each in fields(cls)}
        given = {each.name: getattr(self, each.name) for each in fields(Taught)}
        for name in given.keys() - known:
            if given.pop(name) is not None:
                raise MethodError(f"akt: the host {self.host} has no generator, so no {name}: leave it out")
        return cls(**given)


class _Longer(Adadfq):
    """AdaDFQ as AKT publishes it: on small pictures another schedule."""

    def published(self, task: Task) -> Setting:
        setting = super().published(task)
        return setting if is_large(task) else replace(setting, batch=_BATCH, steps=200 * 200 - setting.warm_up, milestones=(0.5,))
