"""Channels of the student brought back to the teacher by regression, layer after layer, in a single forward pass of each.

At each batch norm t is what enters it in the teacher and s in the student, on the same pictures and with all earlier norms
corrected: per channel t ~ a s + b, with a = corr(t, s)^power sd(t) / sd(s). Power 1 is the regression: it takes the student's
noise for noise, but where little signal is left the channel fades. Power 0 matches the spread: it never fades, but lets noise
stand for signal. Which serves a network better differs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from datafree.closed.absorb import scale_layer, set_statistics, shift_output
from datafree.context import Ctx
from datafree.graph.flow import Flow, Layer
from datafree.graph.fold import BatchNorm, norm_vectors
from datafree.graph.taps import anchored, norm_input
from datafree.quant.insert import quantized_layers, weight_quantizer
from datafree.task import Task

SAMPLES = 4096  # values of a channel that enter a regression
SMALLEST, LARGEST = 0.2, 5.0  # of a
_BLOCK = 1 << 20  # elements
UNRELATED = 0.2  # below this correlation a only matches the spread


@dataclass(frozen=True)
class Seen:
    """What entered a norm of the teacher, or left a layer: sampled values (samples, channels), and the batch's own statistics."""

    places: Tensor
    values: Tensor
    mean: Tensor
    var: Tensor


def look(teacher: nn.Module, student: nn.Module, flow: Flow, inputs: Tensor, ctx: Ctx) -> dict[str, Seen]:
    """What enters the anchored teacher's batch norms on ``inputs``, (n, *shape); without any norm, what leaves its layers.

    By name: norms and layers that are called once, layers only if quantized in ``student`` with a scale for each output.
    """
    seen: dict[str, Seen] = {}

    def enter(name: str, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        seen[name] = _look(norm_input(args, kwargs), ctx.generator)

    def leave(layer: Layer, result: Tensor) -> None:
        seen[layer.name] = _look(_channels_second(result, layer), ctx.generator)

    handles = []
    norms = [name for name, each in student.named_modules() if isinstance(each, BatchNorm) and each.running_mean is not None]
    called = [name for name in norms if len(flow.calls_of.get(name, ())) == 1]
    for name in called:
        watched = teacher.get_submodule(name)
        handles.append(watched.register_forward_pre_hook(partial(enter, name), with_kwargs=True))
    if not called:
        for name, module in quantized_layers(student).items():
            layer = flow.layers.get(name)
            if layer and len(layer.calls) == 1 and layer.scale_per_output and weight_quantizer(module).spec.axis is not None:
                watched = teacher.get_submodule(name)
                handles.append(watched.register_forward_hook(lambda module, args, result, layer=layer: leave(layer, result)))
    with anchored(teacher, flow.shared_norms):
        _pass(teacher, inputs, handles)
    return seen


def regress(
    teacher: nn.Module,
    student: nn.Module,
    flow: Flow,
    seen: Mapping[str, Seen],
    inputs: Tensor,
    power: float = 1.0,
    shares: Mapping[str, float] | None = None,
) -> None:
    """Correct the norms or layers ``seen`` of ``student``, in eval mode, while it runs on the very ``inputs``.

    Norms get other statistics, layers other scales and biases. ``shares``: how much of that a layer takes, from 0 to 1, all of it where
    nothing is said: its scale is multiplied by a to the power of its share.
    """
    stored: dict[str, tuple[Tensor, Tensor]] = {}

    def norm(name: str, module: BatchNorm, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        before = seen[name]
        a, b = regression(before.values, _at(norm_input(args, kwargs), before.places), power)
        original = norm_vectors(_norm_of(teacher, name))
        stored[name] = ((original.mu - b) / a, original.sigma / a)
        module.running_mean, module.running_var = (before.mean - b) / a, ((before.var + module.eps) / a.square() - module.eps).clamp(min=0)

    def rescale(layer: Layer, result: Tensor) -> Tensor:
        before = seen[layer.name]
        a, b = regression(before.values, _at(_channels_second(result, layer), before.places), power, (shares or {}).get(layer.name, 1.0))
        scale_layer(student, layer, a)
        shift_output(student, layer, -b, None)
        shape = (-1,) if layer.kind == "linear" else (-1, *(1,) * len(layer.kernel))
        return result * a.view(shape) + b.view(shape)

    handles = []
    for name in seen:
        module, layer = student.get_submodule(name), flow.layers.get(name)
        if layer is None:
            handles.append(module.register_forward_pre_hook(partial(norm, name), with_kwargs=True))
        else:  # before its quantizer
            handles.append(module.register_forward_hook(lambda module, args, result, layer=layer: rescale(layer, result), prepend=True))
    _pass(student, inputs, handles)
    for name, (mu, sigma) in stored.items():
        set_statistics(_norm_of(student, name), mu, sigma)


def regression(t: Tensor, s: Tensor, power: float = 1.0, share: float = 1.0) -> tuple[Tensor, Tensor]:
    """a and b of t ~ a s + b for each channel, (channels,) each; t and s: (samples, channels). a counts to the power of ``share``."""
    t_mean, s_mean = t.mean(0), s.mean(0)
    t_var, s_var = t.var(0, correction=0), s.var(0, correction=0)
    cov = ((t - t_mean) * (s - s_mean)).mean(0)
    spread = (t_var / s_var).sqrt()
    correlation = cov / (t_var * s_var).sqrt()
    a = torch.where(correlation > UNRELATED, spread * correlation**power, spread)
    a = torch.where(torch.isfinite(a) & (a > 0), a, 1).clamp(SMALLEST, LARGEST) ** share
    return a, t_mean - a * s_mean


def divergence(teacher: nn.Module, student: nn.Module, task: Task, inputs: Tensor) -> float:
    """How far the student's answers to ``inputs`` are from the teacher's, see :func:`distance`."""
    return distance(answers(teacher, task, inputs), answers(student, task, inputs))


@torch.no_grad()
def answers(model: nn.Module, task: Task, inputs: Tensor) -> Tensor:
    """The model's answers to ``inputs``, (n, *shape), 64 at a time."""
    return torch.cat([task.run(model, part) for part in torch.split(inputs, 64)])


def distance(t: Tensor, s: Tensor) -> float:
    """How far the answers ``s`` are from ``t``: mean KL in nats for logits (n, classes), else relative squared error."""
    if t.dim() == 2 and t.shape[1] > 1:
        return float(F.kl_div(s.log_softmax(1), t.log_softmax(1), reduction="batchmean", log_target=True))
    return float((t - s).square().sum() / t.square().sum())


def _norm_of(model: nn.Module, name: str) -> BatchNorm:
    """The batch norm called ``name``."""
    norm = model.get_submodule(name)
    assert isinstance(norm, BatchNorm)
    return norm


@torch.no_grad()
def _pass(model: nn.Module, inputs: Tensor, handles: Sequence[RemovableHandle]) -> None:
    """Run with hooks that are removed afterwards."""
    try:
        model(inputs.clone())
    finally:
        for handle in handles:
            handle.remove()


def _look(x: Tensor, generator: torch.Generator) -> Seen:
    total = x.numel() // x.shape[1]
    places = (
        torch.randperm(total, generator=generator, device=x.device)[:SAMPLES] if total > SAMPLES else torch.arange(total, device=x.device)
    )
    return Seen(places, _at(x, places), *_mean_and_variance(x))


def _mean_and_variance(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of each channel of x, (batch, channels, ...); a few at a time, which stay in the cache: ``torch.var`` takes five times as long."""
    rows = x.movedim(1, -1).flatten(0, -2)  # a view of what has its channels last
    mean, total = rows.mean(0), torch.zeros(x.shape[1], device=x.device)
    for part in torch.split(rows, max(1, _BLOCK // x.shape[1])):
        total += (part - mean).square_().sum(0)
    return mean, total / len(rows)


def _channels_second(output: Tensor, layer: Layer) -> Tensor:
    return output.flatten(0, -2) if layer.kind == "linear" else output


def _at(x: Tensor, places: Tensor) -> Tensor:
    """(places, channels) of x, (batch, channels, ...), the places counted over batch and space."""
    batch, *space = torch.unravel_index(places, (x.shape[0], *x.shape[2:]))
    return x.movedim(1, -1)[(batch, *space)]
