"""ZeroQ: distilled pictures, sensitivities and a Pareto frontier of bits (Cai et al., CVPR 2020, arXiv 2001.00281)."""

from typing import Literal

import torch
from torch import Tensor, nn

from datafree.bits.allocate import make_plan, own_range
from datafree.bits.pareto import frontier
from datafree.bits.search import budget, costs, is_mixed
from datafree.bits.sensitivity import answer_divergence
from datafree.context import Ctx
from datafree.fit import Stalled
from datafree.graph.flow import Flow, Layer, read
from datafree.method import Method, method, option
from datafree.plan import QSpec, Target
from datafree.quant.grid import fake_quantize
from datafree.quant.insert import insert
from datafree.quant.observe import observe, observe_percentile
from datafree.quant.ranges import minmax
from datafree.synth.noise import Recipe, Start, source_of
from datafree.task import Task

BATCH = 64  # pictures that pass the network at a time while ranges are observed


@method("zeroq")
class ZeroQ(Method):
    """Pictures optimised until every batch norm finds its stored statistics; they give ranges and tell which layers need bits.

    Weights are rounded to nearest on asymmetric min-max grids of each output channel, and nothing makes good what that costs. With more
    than two widths and a budget, the KL divergence of the answers with one layer quantized is that layer's sensitivity, and the best
    point of the Pareto frontier within the budget is taken. Variants of the pictures: DSG (CVPR 2021) gives statistics slack and
    every picture a layer of its own to care for; ``classes`` adds a cross-entropy to classes drawn evenly.

    Reconstructed: of the paper only the first page could be read. The pictures follow the published code, the rest a re-implementation;
    DSG follows its published code, but for its slack, whose file is missing there and which is taken from Gaussian noise anew. The third
    term of DSG's journal version, which inhibits spatial correlation by eigenvalue spectra (TPAMI), is not included.

    Differs: statistics are taken where they enter a batch norm, not behind the convolution of the same number. Which activations
    are quantized is up to the target's protocol: ``paper`` is the one of the published code, which quantizes behind ReLU only, so that
    the input of the network, sums and linear bottlenecks stay in float. A network without batch norms gets procedural pictures.
    """

    variant: Literal["plain", "dsg", "classes"] = option("plain", "the pictures: ZeroQ's, diverse ones (DSG), or ones of classes")
    pictures: int = option(64, "how many are made", at_least=1)
    steps: int = option(500, "of Adam for each batch of pictures", at_least=1)
    batch: int = option(64, "pictures optimised together", at_least=1)
    start: Start = option("faint", "where pictures start: uniform noise of +-0.024, normal noise, or procedural pictures")
    rate: float | None = option(None, "learning rate of Adam; None: 0.5, for DSG 0.9")
    falling: Literal["plateau", "cosine"] = option("plateau", "the rate falls tenfold where the loss stays, or along half a cosine")
    augment: bool = option(False, "mirror and shift the pictures while they are optimised")
    stop_early: bool = option(False, "stop a batch once 50 steps gain less than a hundredth of its loss")
    act_range: Literal["minmax", "percentile"] = option("minmax", "range of the activations on the pictures")
    percentile: float = option(99.99, "of the values that the range holds at either end", at_least=50, at_most=100)
    sensitivity_pictures: int = option(32, "how many of the pictures tell the sensitivities", at_least=1)
    remeasure: bool = option(False, "measure the joint divergence of the frontier's survivors every five layers; else divergences add up")

    def run(self, teacher: nn.Module, task: Task, target: Target, ctx: Ctx) -> nn.Module:
        """Make the student: distil, plan, round, range."""
        flow = read(teacher, task, ctx)
        inputs = source_of("distilled", teacher, task, ctx, self._recipe()).sample(self.pictures).inputs
        plan = make_plan(flow, teacher, target, own_range, ctx, self._widths(flow, teacher, task, target, inputs))
        student = insert(teacher, plan)  # weights are min-max ranged
        if self.act_range == "minmax":
            observe(student, torch.split(inputs, BATCH), "minmax", task.run)
        else:
            observe_percentile(student, torch.split(inputs, BATCH), self.percentile, task.run)
        return student

    def _recipe(self) -> Recipe:
        dsg = self.variant == "dsg"
        return Recipe(
            steps=self.steps,
            batch=self.batch,
            start=self.start,
            rate=self.rate or (0.9 if dsg else 0.5),
            falling=self.falling,
            patience=260 if dsg else 100,
            slack=90.0 if dsg else None,
            layers="turns" if dsg else "flat",
            classes={"plain": 0.0, "dsg": 2.0, "classes": 1.0}[self.variant],
            prior=0.01 if dsg else 0.0,
            flip=self.augment,
            roll=2 if self.augment else 0,
            stop=Stalled() if self.stop_early else None,
        )

    def _widths(self, flow: Flow, teacher: nn.Module, task: Task, target: Target, inputs: Tensor) -> dict[str, int] | None:
        """The best point of the frontier within the budget, where there is a choice."""
        if not is_mixed(target):
            return None
        lost = answer_divergence(flow, teacher, task, inputs[: self.sensitivity_pictures], own_range, _rounded)
        cost = costs(flow, teacher, target, own_range)
        omega = {name: {bits: lost({name: bits}) for bits in sizes} for name, sizes in cost.items()}
        return dict(frontier(omega, cost, budget(target), lost if self.remeasure else None)[-1].widths)


def _rounded(layer: Layer, weight: Tensor, spec: QSpec) -> Tensor:
    return fake_quantize(weight, *minmax(weight, spec), spec)
