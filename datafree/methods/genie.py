"""GENIE: pictures from latents, and rounding learned block by block on them (Jeon et al., CVPR 2023, arXiv 2212.04780)."""

from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor, nn

from datafree.bits.allocate import make_plan, own_range
from datafree.context import Ctx
from datafree.fit import Clock
from datafree.graph.flow import Flow, read
from datafree.method import Method, method, option
from datafree.plan import Plan, Target
from datafree.quant.insert import insert, latent_weight, quantized_layers, quantizers, weight_quantizer
from datafree.quant.observe import observe
from datafree.quant.ranges import mse
from datafree.synth.latent import Recipe as Generation
from datafree.synth.latent import latent_source
from datafree.synth.noise import Recipe as Distillation
from datafree.synth.noise import source_of
from datafree.synth.source import Shown, Source
from datafree.task import Task
from datafree.tune.reconstruct import Recipe, reconstruct
from datafree.tune.taught import closed_student

Budget = Literal["smoke", "fast", "standard", "paper"]
Start = Literal["nearest", "anchor"]
Family = Literal["latent", "distilled", "leaves", "pink", "white", "mix"]

_BATCH = 64  # pictures that pass the network at a time while ranges are observed
_EXPONENT = 2.4  # of the rounding error that weight ranges minimise
_UNITS = 2.0  # times as long as a picture's step takes its step through all units


@dataclass(frozen=True)
class Setting:
    """What a budget fills in: the fields of :class:`Genie` of the same names."""

    pictures: int
    picture_steps: int
    picture_batch: int
    steps: int
    rate: float
    scale_rate: float
    range_rate: float
    rounding: float


def setting_of(budget: Budget) -> Setting:
    """The published setting for ``paper``; fewer steps, with higher rates and a smaller weight on deciding, for the others."""
    if budget == "smoke":
        return Setting(64, 50, 64, 50, rate=5e-2, scale_rate=1e-3, range_rate=2e-3, rounding=0.1)
    if budget == "fast":
        return Setting(256, 100, 64, 400, rate=1e-2, scale_rate=3e-4, range_rate=1e-3, rounding=0.1)
    if budget == "standard":
        return Setting(1024, 500, 128, 3000, rate=5e-3, scale_rate=2e-4, range_rate=3e-4, rounding=0.1)
    return Setting(1024, 4000, 128, 20000, rate=1e-3, scale_rate=1e-4, range_rate=4e-5, rounding=1.0)


@method("genie")
class Genie(Method):
    """Pictures made from latents, then block after block of the student brought to the network's outputs by its rounding and its scales.

    Each batch of pictures has latents and a small generator of its own, which learn together until the network's batch norms find the
    statistics they have stored; strided convolutions see their inputs moved at random meanwhile. On these pictures, residual block
    after residual block, or layer where there is none, learns which way each weight is rounded (AdaRound), the scales of the weights
    with it, and the steps of the activations, of which a random half stays in float (QDrop). Weight grids are asymmetric for each
    output channel, with the range of least error of exponent 2.4. ``drop`` of 0 without ``joint_scale`` is BRECQ, all but that it
    learns activation steps afterwards.

    The budget ``paper`` is the published setting, meant for a GPU. The others have fewer pictures and steps, higher rates, and the first
    two a generator half as wide.

    Differs: layers that the target's protocol quantizes get its bits, where the published setting has 8 for the first and last layer and
    the second one's input. Batch norms are not folded: they stay as they are, inside the block, and a single layer is reconstructed
    together with the norm and the activation behind it. Activation ranges start at the least squared error on the pictures, found in the
    float network. Layers that several parts of a network share are only rounded. A network without batch norms gets procedural pictures.
    ``start="anchor"`` and other pictures are ours.
    """

    budget: Budget = option("fast", "fills in what is None: for half a minute, some minutes or an hour on a small network, or as published")
    family: Family = option(
        "latent", "the pictures: from latents, optimised pixels (distilled), or procedural ones: dead leaves, pink or white noise, or a mix"
    )
    start: Start = option("nearest", "where rounding starts: at the float weights, or at anchor's codes, with its ranges and batch norms")
    pictures: int | None = option(None, "how many are made", at_least=1)
    picture_steps: int | None = option(None, "of Adam for each batch of pictures", at_least=1)
    picture_batch: int | None = option(None, "pictures optimised together", at_least=1)
    swing: bool = option(True, "strided convolutions see their inputs moved at random while pictures are made from latents")
    steps: int | None = option(None, "of Adam for each block", at_least=0)
    batch: int = option(32, "pictures of such a step", at_least=1)
    rate: float | None = option(None, "learning rate of the rounding", at_least=0)
    scale_rate: float | None = option(None, "learning rate of the weight scales", at_least=0)
    range_rate: float | None = option(None, "learning rate of the activation scales", at_least=0)
    rounding: float | None = option(None, "weight of the term that makes weights decide which way they are rounded", at_least=0)
    drop: float = option(0.5, "share of the activations that stay in float while a block learns", at_least=0, at_most=1)
    joint_scale: bool = option(True, "weight scales learn together with the rounding")
    max_seconds: float | None = option(None, "when to stop", at_least=1)

    def run(self, teacher: nn.Module, task: Task, target: Target, ctx: Ctx) -> nn.Module:
        """Make the student: pictures, plan, round, range, reconstruct."""
        clock, setting, flow = Clock(self.max_seconds), self._setting(), read(teacher, task, ctx)
        inputs = self._source(teacher, task, setting, ctx).sample(setting.pictures).inputs
        student = self._started(teacher, flow, task, target, inputs, ctx)
        recipe = Recipe(
            steps=setting.steps,
            batch=self.batch,
            rate=setting.rate,
            scale_rate=setting.scale_rate,
            range_rate=setting.range_rate,
            rounding=setting.rounding,
            drop=self.drop,
            joint_scale=self.joint_scale,
            max_seconds=clock.rest(),
        )
        reconstruct(teacher, student, flow, task, inputs, ctx, recipe)
        return student

    def _setting(self) -> Setting:
        setting = setting_of(self.budget)
        return replace(setting, **{each.name: value for each in fields(Setting) if (value := getattr(self, each.name)) is not None})

    def _source(self, teacher: nn.Module, task: Task, setting: Setting, ctx: Ctx) -> Source:
        """Of the pictures, which stop learning when their share of the time is over."""
        steps, batch, work = setting.picture_steps, setting.picture_batch, setting.pictures * setting.picture_steps
        share = work / (work + _UNITS * setting.steps * self.batch)
        seconds = None if self.max_seconds is None else share * self.max_seconds
        if self.family != "latent":
            return source_of(self.family, teacher, task, ctx, Distillation(steps=steps, batch=batch, max_seconds=seconds))
        widths = (64, 32) if self.budget in ("smoke", "fast") else (128, 64)
        recipe = Generation(steps=steps, batch=batch, widths=widths, swing=self.swing, max_seconds=seconds)
        source = latent_source(teacher, task, ctx, recipe)
        return source if ctx.on_pictures is None else Shown(source, ctx.on_pictures)

    def _started(self, teacher: nn.Module, flow: Flow, task: Task, target: Target, inputs: Tensor, ctx: Ctx) -> nn.Module:
        """The student before it learns."""
        if self.start == "anchor":
            return closed_student(teacher, task, target, ctx)
        student = insert(teacher, make_plan(flow, teacher, target, own_range, ctx))
        for layer in quantized_layers(student).values():
            quantizer = weight_quantizer(layer)
            quantizer.set(*mse(latent_weight(layer), quantizer.spec, exponent=_EXPONENT))
        if points := quantizers(student):
            probe = insert(teacher, Plan({}, {point: each.spec for point, each in points.items()}))
            observe(probe, torch.split(inputs, _BATCH), "mse", task.run)
            for point, quantizer in quantizers(probe).items():
                points[point].set(quantizer.scale, quantizer.zero)
        return student
