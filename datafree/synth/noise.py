"""Optimised pixels: inputs that a network's batch norms find as they found the data it was trained on (ZeroQ, arXiv 2001.00281).

A batch of pixels starts as noise, or as procedural pictures, and follows the gradient of the terms in :mod:`datafree.synth.terms`. The
network itself is never changed.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau

from datafree.context import Ctx
from datafree.errors import NetworkError
from datafree.fit import FirstOf, Stop, duration, fit, in_turn
from datafree.graph.flow import flow
from datafree.graph.swap import frozen_copy
from datafree.synth.filters import Band, natural_band, texture_gap
from datafree.synth.prior import Family, patterns
from datafree.synth.source import NONE, Batch, Prior, Shown, Source, Terms
from datafree.synth.terms import (
    Gap,
    Moments,
    Share,
    Spread,
    by_depth,
    by_turns,
    certainty_gap,
    class_entropy,
    cosine_margin,
    entering,
    entropy,
    gaps,
    image_prior,
    margins_of,
    moments,
    norm_moments,
    statistics,
    stored_moments,
)
from datafree.task import Task

Pictures = Literal[Family, "distilled"]
Start = Literal["faint", "gaussian", Family]

_INPUT = "the input of the network"  # counts as a layer
_FAINT = 127.5 / 5418.75  # half the width of ZeroQ's uniform noise
_GAUSSIAN_INPUTS = 256  # that tell how far statistics stray by themselves


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How pixels are optimised; the defaults are those of ZeroQ's published code.

    Args:
        steps: of Adam.
        rate: its learning rate.
        falling: how the rate falls, to ``lowest_rate`` at last: tenfold where the loss stays for ``patience`` steps (``plateau``), or along
            half a cosine over all steps.
        patience: see ``falling``.
        lowest_rate: see ``falling``.
        batch: pictures optimised together.
        start: uniform noise of +-0.024 (``faint``), standard normal noise, or procedural pictures.
        per_image: match the statistics of each picture; else those of the batch.
        spread: match deviations or variances, beside means.
        share: every channel of the network counts alike, or every layer.
        slack: percentile of the gaps on Gaussian inputs, up to which a gap costs nothing (DSG); None: every gap costs.
        layers: ``flat``: all count alike; ``depth``: the first half less (TexQ); ``turns``: each picture counts one of them twice, in
            turns (DSG).
        classes: weight of the cross-entropy to classes drawn evenly; 0: none.
        focus: how much more pictures count in it that are hard to tell, see ``terms.class_entropy`` (HAST).
        certainty: the least probability of its class that a picture is meant to have: one of two, by chance, is given a number above it
            to reach, the other 1 (IntraQ); None: no such term. Pictures are of no class without this and ``classes``.
        margin: the least and largest cosine distance from the mean feature, what enters the last layer, of the earlier pictures of its
            class (IntraQ); None: no such term.
        entropy: weight of the entropy of the answers: decided ones of whatever class.
        prior: weight of ``terms.image_prior``.
        texture: weight of ``filters.texture_gap`` to procedural pictures (TexQ).
        flip: mirror each picture or not, by chance, before the network sees it.
        roll: shift the batch by up to so many pixels, what leaves on one side entering on the other.
        crop: let the network see a random part of the batch, its sides of this share at least, at the full size; 1: all of it.
        views: probability with which a step does so at all.
        stop: when it is good enough (``fit.Stalled``); None: all steps are taken.
        max_seconds: that a sample may take, the same for each of its batches; None: any.
    """

    steps: int = 500
    rate: float = 0.5
    falling: Literal["plateau", "cosine"] = "plateau"
    patience: int = 100
    lowest_rate: float = 1e-4
    batch: int = 64
    start: Start = "faint"
    per_image: bool = True
    spread: Spread = "deviation"
    share: Share = "channel"
    slack: float | None = None
    layers: Literal["flat", "depth", "turns"] = "flat"
    classes: float = 0.0
    focus: float = 0.0
    certainty: float | None = None
    margin: tuple[float, float] | None = None
    entropy: float = 0.0
    prior: float = 0.0
    texture: float = 0.0
    flip: bool = False
    roll: int = 0
    crop: float = 1.0
    views: float = 1.0
    stop: Stop | None = None
    max_seconds: float | None = None

    @property
    def labelled(self) -> bool:
        """Whether pictures are of classes."""
        return self.classes > 0 or self.certainty is not None


class Views(Protocol):
    """How inputs are shown to a network, see :class:`Recipe`."""

    @property
    def flip(self) -> bool:
        """Whether inputs are mirrored by chance."""
        ...

    @property
    def roll(self) -> int:
        """By how many pixels a batch is shifted at most."""
        ...

    @property
    def crop(self) -> float:
        """The least share of the sides that is seen."""
        ...


def source_of(family: Pictures, teacher: nn.Module, task: Task, ctx: Ctx, recipe: Recipe | None = None) -> Source:
    """The source of the pictures called ``family``: procedural ones, or ``distilled``, optimised for ``teacher`` as ``recipe`` says.

    A network without batch norms has no statistics to optimise for: it gets procedural pictures, and a note says so. Whoever keeps the
    pictures (``ctx.on_pictures``) is shown them.
    """
    source = _source_of(family, teacher, task, ctx, recipe)
    return source if ctx.on_pictures is None else Shown(source, ctx.on_pictures)


def _source_of(family: Pictures, teacher: nn.Module, task: Task, ctx: Ctx, recipe: Recipe | None) -> Source:
    if family != "distilled":
        return Prior(family, task, ctx.generator)
    if stored_moments(teacher):
        return Pixels(teacher, task, ctx, recipe)
    ctx.note("the network has no batch norms with statistics that pictures could be optimised for: procedural pictures take their place")
    return Prior("mix", task, ctx.generator)


@dataclass(frozen=True)
class _Wanted:
    """What the loss of n pictures goes by.

    Their classes, (n,); how probable each is meant to be, (n,); the sum of the earlier features of its class, (n, width); gaps that cost
    nothing; the band of texture.
    """

    labels: Tensor | None
    certainty: Tensor | None
    centres: Tensor | None
    margins: list[tuple[float, float]] | None
    band: Band | None


@final
class Pixels:
    """A source whose every sample is optimised anew, batch after batch; ``losses`` holds the losses of each batch so far."""

    def __init__(self, teacher: nn.Module, task: Task, ctx: Ctx, recipe: Recipe | None = None) -> None:
        """Raises NetworkError where ``teacher`` has no batch norm with statistics, and the pictures are of no classes.

        Pictures of classes have those to learn from, which a note says.
        """
        self.teacher, self.task, self.ctx = frozen_copy(teacher), task, ctx
        self.recipe = recipe or Recipe()
        self.losses: list[list[float]] = []
        self._stored = stored_moments(self.teacher)
        if not self._stored:
            if not self.recipe.labelled:
                raise NetworkError("the network has no batch norm with statistics that pixels could be optimised for: take a Prior instead")
            ctx.note("the network has no batch norms with statistics that pictures could meet: they are made for their classes alone")
        mean, deviation = (torch.tensor(each, device=ctx.device).expand(task.shape[0]) for each in task.input_moments)
        self._stored[_INPUT] = mean, deviation.square()
        self._last = None if self.recipe.margin is None else _last_layer(self.teacher, task, ctx)
        self._sums: Tensor | None = None  # of the features of each class so far, (classes, width)

    def sample(self, n: int) -> Batch:
        """``n`` new inputs, with their classes where the recipe asks for any."""
        if n < 1:
            raise NetworkError(f"{n} pictures were asked for: at least 1 is needed")
        generator, recipe = self.ctx.generator, self.recipe
        labels = None
        if recipe.labelled:
            labels = torch.randperm(n, generator=generator, device=generator.device) % count_classes(self.teacher, self.task, self.ctx)
        margins = self._margins()
        band = natural_band(self.task, generator) if recipe.texture else None
        parts = [range(first, min(first + recipe.batch, n)) for first in range(0, n, recipe.batch)]
        found, begun = [], len(self.losses)
        for number, (part, clock) in enumerate(zip(parts, in_turn(recipe.max_seconds, len(parts)), strict=True), 1):
            stop = clock if recipe.stop is None else FirstOf((recipe.stop, clock))
            wanted = self._wanted(None if labels is None else labels[part.start : part.stop], margins, band)
            name = f"pictures, batch {number} of {len(parts)}"
            make = partial(self._optimise, len(part), wanted, name, stop)
            shared = None if recipe.margin else self.ctx.pictures  # those with a margin depend on the batches before
            found.append(make() if shared is None else shared.once(f"{name} of {n} {self.task} {recipe}", self.teacher, generator, make))
        taken, steps = sum(map(len, self.losses[begun:])), recipe.steps * len(parts)
        if recipe.max_seconds is not None and taken < steps:
            self.ctx.note(f"pictures: stopped after {taken} of {steps} steps, when their {duration(recipe.max_seconds)} were over")
        return Batch(torch.cat(found), labels)

    def update(self, student: nn.Module) -> Terms:
        """Nothing: each sample is optimised to the end."""
        return NONE

    def _wanted(self, labels: Tensor | None, margins: list[tuple[float, float]] | None, band: Band | None) -> _Wanted:
        certainty, low = None, self.recipe.certainty
        if labels is not None and low is not None:
            generator = self.ctx.generator
            coin, share = torch.rand(2, len(labels), generator=generator, device=generator.device)
            certainty = torch.where(coin < 0.5, low + (1 - low) * share, 1.0)
        centres = None if labels is None or self._sums is None else self._sums[labels]
        return _Wanted(labels, certainty, centres, margins, band)

    def _optimise(self, n: int, wanted: _Wanted, name: str, stop: Stop) -> Tensor:
        recipe = self.recipe
        pixels = self._start(n).requires_grad_()  # standardised: the network gets them scaled by the task
        optimizer = torch.optim.Adam([pixels], lr=recipe.rate)
        falling = (
            CosineAnnealingLR(optimizer, recipe.steps, recipe.lowest_rate)
            if recipe.falling == "cosine"
            else ReduceLROnPlateau(optimizer, patience=recipe.patience, min_lr=recipe.lowest_rate)
        )
        with norm_moments(self.teacher) as seen, entering(self.teacher, self._last) as features:
            loss = partial(self._loss, pixels, wanted, seen, features)
            self.losses.append(fit([pixels], loss, recipe.steps, optimizer, self.ctx, name, falling, stop))
            if self._last is not None and wanted.labels is not None:
                self._remember(self.task.scaled(pixels.detach()), wanted.labels, features)
        return self.task.scaled(pixels.detach())

    @torch.no_grad()
    def _remember(self, inputs: Tensor, labels: Tensor, features: list[Tensor]) -> None:
        answer = self.task.run(self.teacher, inputs)
        sums = F.one_hot(labels, answer.shape[1]).float().T @ features[-1].float()
        self._sums = sums if self._sums is None else self._sums + sums

    def _loss(self, pixels: Tensor, wanted: _Wanted, seen: dict[str, list[Moments]], features: list[Tensor]) -> Terms:
        recipe, labels = self.recipe, wanted.labels
        x = self.task.scaled(self._view(pixels))
        features.clear()
        answer, found = self._look(x, seen)
        n, depth = len(x), len(found)
        weight = {"flat": None, "depth": by_depth(depth), "turns": by_turns(n, depth)}[recipe.layers]
        terms = {"statistics": statistics(found, recipe.share, wanted.margins, None if weight is None else weight.to(x.device))}
        if labels is not None and recipe.classes:
            terms["cross-entropy"] = recipe.classes * class_entropy(answer, labels, recipe.focus)
        if labels is not None and wanted.certainty is not None:
            terms["certainty"] = certainty_gap(answer, labels, wanted.certainty)
        if wanted.centres is not None and recipe.margin is not None:
            terms["margin"] = cosine_margin(features[-1], wanted.centres, *recipe.margin)
        if recipe.entropy:
            terms["entropy"] = recipe.entropy * entropy(answer)
        if recipe.prior:
            terms["prior"] = recipe.prior * image_prior(pixels)
        if wanted.band is not None:
            terms["texture"] = recipe.texture * texture_gap(pixels, wanted.band)
        return terms

    def _view(self, pixels: Tensor) -> Tensor:
        generator = self.ctx.generator
        if self.recipe.views < 1 and float(torch.rand((), generator=generator, device=generator.device)) >= self.recipe.views:
            return pixels
        return augmented(pixels, self.recipe, generator)

    def _look(self, x: Tensor, seen: dict[str, list[Moments]]) -> tuple[Tensor, list[Gap]]:
        """The network's answer, and the gap of every layer, the input first."""
        seen.clear()
        seen[_INPUT] = [moments(x)]
        answer = self.task.run(self.teacher, x)
        return answer, gaps(seen, self._stored, self.recipe.per_image, self.recipe.spread)

    def _start(self, n: int) -> Tensor:
        generator, shape = self.ctx.generator, (n, *self.task.shape)
        if self.recipe.start == "faint":
            return _FAINT * (2 * torch.rand(shape, generator=generator, device=generator.device) - 1)
        if self.recipe.start == "gaussian":
            return torch.randn(shape, generator=generator, device=generator.device)
        return patterns(self.recipe.start, n, self.task.shape, generator)

    @torch.no_grad()
    def _margins(self) -> list[tuple[float, float]] | None:
        if self.recipe.slack is None:
            return None
        with norm_moments(self.teacher) as seen:
            return margins_of(self._look(self.task.noise(_GAUSSIAN_INPUTS, self.ctx.generator), seen)[1], self.recipe.slack)


def _last_layer(teacher: nn.Module, task: Task, ctx: Ctx) -> str | None:
    """The layer that is called last of all: what enters it are the features of a picture."""
    layers = flow(teacher, task.noise(2, torch.Generator(ctx.device).manual_seed(0))).layers.values()
    return max(layers, key=lambda layer: layer.calls[-1]).name if layers else None


@torch.no_grad()
def count_classes(teacher: nn.Module, task: Task, ctx: Ctx) -> int:
    """How many classes the network's answer tells apart. Raises NetworkError where it is no row of logits for each input."""
    answer = task.run(teacher, torch.zeros(2, *task.shape, device=ctx.device))
    if answer.dim() != 2 or answer.shape[1] < 2:
        raise NetworkError(
            f"the network answers {tuple(answer.shape)}, but pictures of classes need (n, classes): leave the classes out, or take a "
            "method that knows none, such as anchor"
        )
    return answer.shape[1]


def augmented(pixels: Tensor, recipe: Views, generator: torch.Generator) -> Tensor:
    """What the network is shown of ``pixels``, (n, channels, *sizes): mirrored, shifted, cropped, at the same size."""
    x, device, axes = pixels.clone(), generator.device, tuple(range(2, pixels.dim()))
    if recipe.flip and axes:
        turned = torch.rand(len(x), generator=generator, device=device) < 0.5
        x = torch.where(turned.view(-1, *(1 for _ in x.shape[1:])), x.flip(-1), x)
    if recipe.roll and axes:
        shifts = torch.randint(-recipe.roll, recipe.roll + 1, (len(axes),), generator=generator, device=device)
        x = x.roll(tuple(shifts.tolist()), axes)
    if recipe.crop < 1 and axes:
        share = recipe.crop + (1 - recipe.crop) * float(torch.rand((), generator=generator, device=device))
        places = torch.rand(len(axes), generator=generator, device=device).tolist()
        full = x.shape[2:]
        for axis, place in zip(axes, places, strict=True):
            size = max(1, round(share * x.shape[axis]))
            x = x.narrow(axis, int(place * (x.shape[axis] - size + 1)), size)
        x = F.interpolate(x, full, mode={1: "linear", 2: "bilinear", 3: "trilinear"}[len(full)])
    return x
