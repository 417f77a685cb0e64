"""Qimera: inputs near the boundaries of classes, drawn from superposed embeddings (Choi et al., NeurIPS 2021, arXiv 2111.02625)."""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from datafree.context import Ctx
from datafree.graph.taps import calls
from datafree.method import method, option
from datafree.plan import Target
from datafree.synth.generator import Added, Convincing
from datafree.synth.labels import Superposed
from datafree.synth.noise import count_classes
from datafree.task import Task
from datafree.tune.taught import Lesson, Taught, gdfq_setting, is_large

_WIDTH = 100  # of an embedding where no layer of the network tells


@method("qimera")
class Qimera(Taught):
    """GDFQ, whose generator is also asked for several classes at once: inputs that the network is undecided about.

    Each class has an embedding as wide as the input of the network's last layer, to which noise is added; the sum is standardised. With
    probability ``superposed`` a batch shows ``slots`` classes an input: their standardised sums are weighted by shares that are drawn, and
    the shares are the label, of the generator as of the student. A learned linear map takes the result to the generator's first layer.
    On large pictures gain and bias of the generator's norms are weighted in the same way. Losses and schedule are those of ``gdfq``.

    Published shares of superposed batches and slots: 0.4 and 2 on 10 classes; 0.4 and 10 (4 bits) or 50 (5 bits) on 100; 500 (4 bits) or
    100 (5 bits) for ResNets on 1000 classes, with 0.4 for ResNet-18 and 0.7 for ResNet-50; 0.4 and 100 for MobileNetV2. Embeddings start
    at random, but for ResNet-20 on 100 classes and ResNet-50 as the classifier. All else of the budget ``paper`` is that of ``gdfq``.

    Differs: the published code never has the linear map (``mapping=False``), divides the weighted gains and biases by their number, too
    (``gains="mean"``), and standardises what is superposed over all inputs of a slot instead of each by itself. What ``gdfq`` says of
    itself holds here, too.

    Reconstructed: from the code; the paper's text was not read. That the linear map follows the superposition is inferred; applied to
    each part before, it would give the same.
    """

    superposed: float = option(0.4, "probability that a batch shows several classes an input", at_least=0, at_most=1)
    slots: int | None = option(None, "classes of such an input; None: by their number, 2 of 10, 10 of 100, 100 of 1000", at_least=1)
    embedding: Literal["random", "classifier"] = option("random", "what embeddings start as: normal numbers, or the last layer's weights")
    mapping: bool = option(True, "a linear map between the embeddings and the generator")
    gains: Literal["sum", "mean"] = option("sum", "of the norms, on large pictures: weighted, or divided by the slots as well")
    statistics: float = option(0.1, "weight of the statistics in the generator's loss", at_least=0)
    temperature: float = option(20.0, "of the KL divergence", at_least=0.1)

    def lesson(self, teacher: nn.Module, task: Task, target: Target, ctx: Ctx) -> Lesson:
        """A generator of superposed classes, that warms up alone and then learns along with the student."""
        classes = count_classes(teacher, task, ctx)
        setting = self.setting(gdfq_setting(classes, is_large(task)), task)
        rows = _classifier(teacher, task, ctx, classes)
        if rows is None:
            ctx.note(f"no layer of the network has an output for each class: embeddings have {_WIDTH} entries and start at random")
        generation = replace(
            self.generation(setting),
            objective=Convincing(statistics=self.statistics),
            policy=Superposed(self.superposed, self.slots or _published_slots(classes)),
            added=Added(
                width=_WIDTH if rows is None else rows.shape[1],
                start=rows if self.embedding == "classifier" else None,
                mapped=self.mapping,
                divided=self.gains == "mean",
            ),
        )
        recipe = replace(self.distillation(setting), distance="kl", temperature=self.temperature)
        return self.generated(teacher, task, setting, generation, ctx), setting.steps, recipe


def _published_slots(classes: int) -> int:
    return 2 if classes < 100 else 10 if classes < 1000 else 100


def _classifier(teacher: nn.Module, task: Task, ctx: Ctx, classes: int) -> Tensor | None:
    """Weights of the last layer that has an output for each class, (classes, width), those of a kernel averaged; None if there is none."""
    for _, module, _ in reversed(calls(teacher, task.noise(2, torch.Generator(ctx.device).manual_seed(0)))):
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and len(module.weight) == classes:
            return module.weight.detach().float().flatten(2).mean(2) if module.weight.dim() > 2 else module.weight.detach().float()
    return None
