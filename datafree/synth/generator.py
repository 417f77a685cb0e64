"""Conditional generators: a network that draws inputs of classes, taught by a classifier it never sees the data of (GDFQ, 2003.03603).

Three forms, by how the class enters: as a factor on the noise (published for pictures of 32 pixels), as gain and bias of the norms (for
224), or not at all: then the inputs have no labels. Noise may also be added to the class (:class:`Added`). Any number of channels and of
spatial axes, any sides.

Legend: n inputs, K classes that one input shows, z noise.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import MultiStepLR

from datafree import parallel
from datafree.context import Ctx
from datafree.errors import NetworkError
from datafree.fit import Stop, fit, total
from datafree.graph.swap import frozen_copy
from datafree.graph.taps import outputs
from datafree.synth.labels import Blend, Policy, one_class
from datafree.synth.noise import count_classes
from datafree.synth.source import Batch, Terms
from datafree.synth.terms import Gap, Moments, class_entropy, gaps, norm_moments, statistics, stored_moments
from datafree.task import Task

Form = Literal["factor", "norms", "unconditional"]

_CONVS: tuple[type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS: tuple[type[nn.BatchNorm1d] | type[nn.BatchNorm2d] | type[nn.BatchNorm3d], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_LARGE = 64  # from this side on the class enters by the norms
_EPS = 0.8  # of the norms behind convolutions: meant as a momentum once, and in every figure since


@dataclass(frozen=True)
class Look:
    """Generated inputs, and what the teacher makes of them.

    Args:
        inputs: (n, *shape).
        labels: what they are meant to show, as ``Batch.labels``.
        answer: of the teacher, (n, classes).
        found: the gap of each of its norms over the batch.
        seen: the moments that enter these, from ``terms.norm_moments``.
        blend: what the inputs were made from.
        noise: the same, (n, latent), or (n, K, width) where it is added to the classes.
        features: what the module gives that the recipe names.
    """

    inputs: Tensor
    labels: Tensor
    answer: Tensor
    found: list[Gap]
    seen: Mapping[str, Sequence[Moments]] = field(default_factory=dict)
    blend: Blend | None = None
    noise: Tensor | None = None
    features: Tensor | None = None


Objective = Callable[[Look, nn.Module], Terms]


@dataclass(frozen=True)
class Convincing:
    """GDFQ's loss of a generator: the teacher sees the wanted classes, and its norms the statistics they have stored.

    Differs: statistics are means and variances, averaged over channels and layers, as in the published code; the paper sums squared
    distances of means and deviations. ``classes`` and ``statistics`` are the weights of the two.
    """

    classes: float = 1.0
    statistics: float = 0.1

    def __call__(self, look: Look, student: nn.Module) -> Terms:
        """The terms; no statistics where the teacher has no norms."""
        terms = {"cross-entropy": self.classes * class_entropy(look.answer, look.labels)}
        if look.found:
            terms["bn_statistics"] = self.statistics * statistics(look.found, "layer")
        return terms


@dataclass(frozen=True, eq=False)
class Added:
    """Qimera's way in: noise of its own is added to the embedding of every class, each sum standardised, and they are superposed.

    Args:
        width: entries of an embedding.
        start: the embeddings to begin with, (classes, width); None: standard normal numbers.
        mapped: a linear map to the latent numbers follows (disentanglement mapping). Published, but the code never has it.
        divided: gain and bias of the norms are divided by the number of classes superposed, as in the code.
    """

    width: int
    start: Tensor | None = None
    mapped: bool = True
    divided: bool = False


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A generator and how it learns; the defaults are GDFQ's.

    Args:
        batch: inputs of a step.
        rate: learning rate of Adam, betas 0.5 and 0.999.
        milestones: numbers of steps after which the rate falls tenfold.
        latent: numbers of noise.
        widths: channels of its convolutions. The published ones multiply three times as often as a ResNet-20, (64, 32) a quarter of that.
        form: how the class enters, if it does; None: as published for inputs of this size.
        added: how noise is added to the class, where it is neither multiplied with it nor left alone.
        placed: a linear map of the place that the policy draws is added to the latent numbers.
        policy: which classes are drawn, and places.
        features: name of the teacher's module whose output, that of the last call, the objective is to see; None: none.
        objective: its loss; it may run the student, and the gradient reaches the generator through it.
    """

    batch: int = 200
    rate: float = 1e-3
    milestones: tuple[int, ...] = ()
    latent: int = 100
    widths: tuple[int, int] = (128, 64)
    form: Form | None = None
    added: Added | None = None
    placed: bool = False
    policy: Policy = one_class
    features: str | None = None
    objective: Objective = Convincing()


@final
class Generator(nn.Module):
    """From noise (see :meth:`noise`) and classes to inputs (n, *shape), each channel near mean 0 and variance 1 over the batch.

    Every norm takes the statistics of the batch: there are none to store. Parameters are drawn as torch does, but from ``generator``.
    """

    def __init__(self, shape: tuple[int, ...], classes: int, form: Form, recipe: Recipe, generator: torch.Generator) -> None:
        """Raises NetworkError for a ``shape`` without one to three spatial axes."""
        super().__init__()
        axes = len(shape) - 1
        if not 1 <= axes <= 3:
            raise NetworkError(f"a generator draws inputs with 1 to 3 spatial axes, not {shape}: take a method without one, such as anchor")
        wide, narrow = recipe.widths
        added = recipe.added
        self.latent, self.added = recipe.latent, added
        self.shape, self.start = shape, tuple(math.ceil(side / 4) for side in shape[1:])
        width = recipe.latent if added is None or added.mapped else added.width  # of what enters the first layer
        with torch.device("meta"):
            embedded = added.width if added else recipe.latent
            self.embedding = nn.Embedding(classes, embedded) if added or form == "factor" else None
            self.linear = nn.Linear(width, wide * math.prod(self.start))
            self.norms = nn.ModuleList(
                _ClassNorm(channels, eps, axes, classes if form == "norms" else None, added is not None and added.divided)
                for channels, eps in ((wide, 1e-5), (wide, _EPS), (narrow, _EPS))
            )
            channels = (wide, wide, narrow, shape[0])
            self.convs = nn.ModuleList(_CONVS[axes - 1](*pair, 3, padding=1) for pair in zip(channels, channels[1:], strict=False))
            self.last = _NORMS[axes - 1](shape[0], affine=False, track_running_stats=False)
            self.mapping = nn.Linear(added.width, width) if added and added.mapped else None
            self.place = nn.Linear(axes, width) if recipe.placed else None
        self.to_empty(device=generator.device)
        _draw(self, generator)

    def noise(self, blend: Blend, generator: torch.Generator) -> Tensor:
        """Standard normal numbers, (n, latent), or (n, K, width) where they are added to the classes."""
        n, slots = blend.classes.shape
        sizes = (n, self.latent) if self.added is None else (n, slots, self.added.width)
        return torch.randn(*sizes, generator=generator, device=generator.device)

    def forward(self, z: Tensor, blend: Blend) -> Tensor:
        x = self.linear(self._code(z, blend)).unflatten(1, (-1, *self.start))
        x = self.norms[0](x, blend)
        for conv, norm in zip(self.convs[:2], self.norms[1:], strict=True):
            x = F.leaky_relu(norm(conv(F.interpolate(x, scale_factor=2.0)), blend), 0.2)
        x = torch.tanh(self.convs[2](x))
        for axis, side in enumerate(self.shape[1:], 2):
            x = x.narrow(axis, 0, side)
        inputs: Tensor = self.last(x)
        return inputs

    def _code(self, z: Tensor, blend: Blend) -> Tensor:
        """What enters the first layer: (n, width)."""
        if self.embedding is not None:
            entries = self.embedding(blend.classes)
            z = z * blend.mean(entries) if self.added is None else blend.mean(F.layer_norm(entries + z, entries.shape[2:]))
        if self.mapping is not None:
            z = self.mapping(z)
        return z if self.place is None else z + self.place(blend.place)


class _ClassNorm(nn.Module):
    """Batch norm with one affine for all, or with gain and bias of each class."""

    def __init__(self, width: int, eps: float, axes: int, classes: int | None, divided: bool) -> None:
        super().__init__()
        self.norm = _NORMS[axes - 1](width, eps, affine=classes is None, track_running_stats=False)
        self.gain = None if classes is None else nn.Embedding(classes, width)
        self.bias = None if classes is None else nn.Embedding(classes, width)
        self.divided = divided

    def forward(self, x: Tensor, blend: Blend) -> Tensor:
        x = self.norm(x)
        if self.gain is None or self.bias is None:
            return x
        parts = blend.classes.shape[1] if self.divided else 1
        gain, bias = (
            blend.mean(table(blend.classes)).reshape(*x.shape[:2], *(1,) * (x.dim() - 2)) / parts for table in (self.gain, self.bias)
        )
        return gain * x + bias


@torch.no_grad()
def _draw(model: Generator, generator: torch.Generator) -> None:
    """Initial values: those of torch's layers; gains 1 and biases 0; embeddings as the recipe has them."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            bound = module.weight[0].numel() ** -0.5
            for each in module.parameters():
                nn.init.uniform_(each, -bound, bound, generator)
        elif isinstance(module, _ClassNorm):
            if module.gain is not None and module.bias is not None:
                nn.init.ones_(module.gain.weight)
                nn.init.zeros_(module.bias.weight)
            module.norm.reset_parameters()
    if model.embedding is not None:
        if model.added is None or model.added.start is None:
            nn.init.normal_(model.embedding.weight, generator=generator)
        else:
            model.embedding.weight.copy_(model.added.start)


@final
class Conditional:
    """A source of generated inputs with labels, that learns one step at every update."""

    def __init__(self, teacher: nn.Module, task: Task, ctx: Ctx, recipe: Recipe | None = None) -> None:
        """Raises NetworkError where the network's answer is no row of logits, or its input has no spatial axes.

        A network without batch norms has no statistics to be met: a note says so, and the generator learns without them.
        """
        self.teacher, self.task, self.ctx = frozen_copy(teacher), task, ctx
        self.recipe = recipe or Recipe()
        self.classes, self.stored = count_classes(self.teacher, task, ctx), stored_moments(self.teacher)
        if not self.stored and self.recipe.form != "unconditional":  # which is not asked for statistics
            ctx.note("the network has no batch norms with statistics that a generator could meet: it learns without them")
        form = self.recipe.form or ("norms" if max(task.shape[1:], default=0) >= _LARGE else "factor")
        self.generator = Generator(task.shape, self.classes, form, self.recipe, ctx.generator)
        self.params = list(self.generator.parameters())
        self.optimizer = torch.optim.Adam(self.params, self.recipe.rate, (0.5, 0.999))
        self.schedule = MultiStepLR(self.optimizer, list(self.recipe.milestones))
        self._fresh: Batch | None = None

    @torch.no_grad()
    def sample(self, n: int) -> Batch:
        """``n`` inputs with labels: those of the last update, once, if they are enough, and with them the teacher's answer."""
        fresh, self._fresh = self._fresh, None
        if fresh is not None and fresh.answer is not None and n <= len(fresh.inputs):
            return Batch(fresh.inputs[:n], None if fresh.labels is None else fresh.labels[:n], fresh.answer[:n])
        inputs, blend, _ = self._generate(n)
        return Batch(inputs, self._known(blend.labels(self.classes)))

    def update(self, student: nn.Module) -> Terms:
        """One step of Adam. Raises MethodError, naming the term, before it takes one on a loss that is not finite."""
        look = self._look()
        terms = self.recipe.objective(look, student)
        loss = total(terms, "generator", self.schedule.last_epoch + 1)
        self.optimizer.zero_grad()
        loss.backward(inputs=self.params)  # type: ignore[no-untyped-call]
        parallel.average_gradients(self.params)
        self.optimizer.step()
        self.schedule.step()
        self._fresh = Batch(look.inputs.detach(), self._known(look.labels), look.answer.detach())
        return {name: term.detach() for name, term in terms.items()}

    def learn(self, steps: int, student: nn.Module, stop: Stop | None = None) -> list[float]:
        """So many steps at once, as ``fit`` takes them: with progress and checkpoints; returns the loss before each."""
        loss = lambda: self.recipe.objective(self._look(), student)  # noqa: E731
        return fit(self.params, loss, steps, self.optimizer, self.ctx, "generator", self.schedule, stop)

    def state_dict(self) -> dict[str, object]:
        """Parameters, and states of optimizer and schedule."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, dict[str, object]]) -> None:
        """Take back what :meth:`state_dict` gave."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, nn.Module | torch.optim.Optimizer | MultiStepLR]:
        return {"generator": self.generator, "optimizer": self.optimizer, "schedule": self.schedule}

    def _generate(self, n: int) -> tuple[Tensor, Blend, Tensor]:
        """Inputs, what they are meant to show, and the noise they were made from."""
        if n < 1:
            raise NetworkError(f"{n} inputs were asked for: at least 1 is needed")
        blend = self.recipe.policy(n, self.classes, self.ctx.generator)
        noise = self.generator.noise(blend, self.ctx.generator)
        return self.task.scaled(self.generator(noise, blend)), blend, noise

    def _known(self, labels: Tensor) -> Tensor | None:
        return None if self.recipe.form == "unconditional" else labels

    def _look(self) -> Look:
        inputs, blend, noise = self._generate(self.recipe.batch)
        with norm_moments(self.teacher) as seen, outputs(self.teacher, self.recipe.features) as features:
            answer = self.task.run(self.teacher, inputs)
        found = gaps(seen, self.stored, per_image=False, spread="variance")
        return Look(inputs, blend.labels(self.classes), answer, found, seen, blend, noise, features[-1] if features else None)
