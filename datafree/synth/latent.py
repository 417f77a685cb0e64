"""Inputs from latents and a generator that learn together, afresh for every batch, to meet a network's statistics (GENIE, CVPR 2023).

What a generator can draw is smoother than free pixels, and a generator of one batch does not have to draw any other.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from datafree.context import Ctx
from datafree.errors import NetworkError
from datafree.fit import Stop, duration, fit, in_turn
from datafree.graph.swap import frozen_copy
from datafree.synth.generator import Generator
from datafree.synth.generator import Recipe as Widths
from datafree.synth.labels import one_class
from datafree.synth.source import NONE, Batch, Prior, Source, Terms
from datafree.synth.terms import gaps, norm_moments, statistics, stored_moments
from datafree.task import Task

_PERIOD, _DECAY = 100, 0.95  # the generator's rate falls by so much every so many steps


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a batch is made; the defaults are GENIE's.

    Args:
        steps: of Adam, for each batch.
        batch: inputs made together.
        rate: learning rate of the latents, tenfold lower where the loss stays for ``patience`` steps.
        patience: see ``rate``.
        generator_rate: learning rate of the generator, a twentieth less every 100 steps.
        latent: numbers behind each input.
        widths: channels of the generator's convolutions.
        swing: every strided convolution sees its input moved at random by one position at most, so that none is overlooked.
        max_seconds: that a sample may take, shared evenly among its batches; None: any.
    """

    steps: int = 4000
    batch: int = 128
    rate: float = 0.1
    patience: int = 100
    generator_rate: float = 0.01
    latent: int = 256
    widths: tuple[int, int] = (128, 64)
    swing: bool = True
    max_seconds: float | None = None


def latent_source(teacher: nn.Module, task: Task, ctx: Ctx, recipe: Recipe | None = None) -> Source:
    """:class:`Latent`; procedural pictures, and a note, for a network without batch norms or an input without spatial axes."""
    if not stored_moments(teacher):
        ctx.note("the network has no batch norms with statistics that pictures could meet: procedural pictures take their place")
    elif not 2 <= len(task.shape) <= 4:
        ctx.note(f"a generator draws inputs with 1 to 3 spatial axes, not {task.shape}: procedural pictures take their place")
    else:
        return Latent(teacher, task, ctx, recipe)
    return Prior("mix", task, ctx.generator)


@final
class Latent:
    """A source whose every batch has latents and a generator of its own; ``losses`` holds the losses of each batch so far.

    The loss is the squared distance of the means and deviations that enter each batch norm from the stored ones, over the batch, each
    layer counting alike. That of the input from mean 0 and deviation 1 is in GENIE's loss too: here the norm behind the generator's
    last layer sees to it.
    """

    def __init__(self, teacher: nn.Module, task: Task, ctx: Ctx, recipe: Recipe | None = None) -> None:
        """Raises NetworkError where ``teacher`` has no batch norm with statistics."""
        self.teacher, self.task, self.ctx = frozen_copy(teacher), task, ctx
        self.recipe = recipe or Recipe()
        self.losses: list[list[float]] = []
        self._stored = stored_moments(self.teacher)
        if not self._stored:
            raise NetworkError("the network has no batch norm with statistics that a generator could meet: take a Prior instead")

    def sample(self, n: int) -> Batch:
        """``n`` new inputs. Raises NetworkError for less than one, and where the input has not 1 to 3 spatial axes."""
        if n < 1:
            raise NetworkError(f"{n} pictures were asked for: at least 1 is needed")
        sizes = [min(self.recipe.batch, n - first) for first in range(0, n, self.recipe.batch)]
        found, begun, limit = [], len(self.losses), self.recipe.max_seconds
        for number, (size, clock) in enumerate(zip(sizes, in_turn(limit, len(sizes)), strict=True), 1):
            name = f"pictures, batch {number} of {len(sizes)}"
            make = partial(self._make, size, name, clock)
            shared = self.ctx.pictures
            what = f"{name} of {n} {self.task} {self.recipe}"
            found.append(make() if shared is None else shared.once(what, self.teacher, self.ctx.generator, make))
        taken, steps = sum(map(len, self.losses[begun:])), self.recipe.steps * len(sizes)
        if limit is not None and taken < steps:
            self.ctx.note(f"pictures: stopped after {taken} of {steps} steps, when their {duration(limit)} were over")
        return Batch(torch.cat(found))

    def update(self, student: nn.Module) -> Terms:
        """Nothing: each batch is optimised to the end."""
        return NONE

    def _make(self, n: int, name: str, stop: Stop) -> Tensor:
        recipe, random = self.recipe, self.ctx.generator
        generator = Generator(self.task.shape, 1, "unconditional", Widths(latent=recipe.latent, widths=recipe.widths), random)
        blend = one_class(n, 1, random)
        latents = generator.noise(blend, random).requires_grad_()

        def loss() -> Terms:
            seen.clear()
            self.task.run(self.teacher, self.task.scaled(generator(latents, blend)))
            return {"bn_statistics": statistics(gaps(seen, self._stored, per_image=False), "layer")}

        params = [latents, *generator.parameters()]
        groups = [{"params": params[:1], "lr": recipe.rate}, {"params": params[1:], "lr": recipe.generator_rate}]
        optimizer = torch.optim.Adam(groups)
        optimizer.register_step_post_hook(_decay(latents))
        plateau = ReduceLROnPlateau(optimizer, patience=recipe.patience, min_lr=[0.0, recipe.generator_rate])  # of the latents alone
        with norm_moments(self.teacher) as seen, _swinging(self.teacher if recipe.swing else None, random):
            self.losses.append(fit(params, loss, recipe.steps, optimizer, self.ctx, name, plateau, stop))
        with torch.no_grad():
            made = self.task.scaled(generator(latents, blend))
        return made.detach()


@contextmanager
def _swinging(model: nn.Module | None, generator: torch.Generator) -> Iterator[None]:
    """While it lasts, every strided convolution of ``model``, if there is one, sees its input :func:`swung`."""
    strided = [
        module
        for module in (() if model is None else model.modules())
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and max(module.stride) > 1
    ]
    handles = [each.register_forward_pre_hook(lambda module, args: (swung(args[0], generator), *args[1:])) for each in strided]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def swung(x: Tensor, generator: torch.Generator) -> Tensor:
    """``x``, (n, channels, *sizes), reflected beyond its edges by one position, and cut to its size again at a random place."""
    axes = range(2, x.dim())
    pads = [1 if x.shape[axis] > 1 else 0 for axis in axes]
    wide = F.pad(x, [each for pad in reversed(pads) for each in (pad, pad)], mode="reflect")
    places = torch.randint(3, (len(pads),), generator=generator, device=generator.device).tolist()
    for axis, pad, place in zip(axes, pads, places, strict=True):
        wide = wide.narrow(axis, place * pad, x.shape[axis])
    return wide


def _decay(latents: Tensor) -> Callable[..., None]:
    """Lets the rate of the second group fall; told the number of steps by the optimizer, whose state outlives a kill."""

    def decay(optimizer: torch.optim.Optimizer, *_: object) -> None:
        if int(optimizer.state[latents]["step"]) % _PERIOD == 0:
            optimizer.param_groups[1]["lr"] *= _DECAY

    return decay
