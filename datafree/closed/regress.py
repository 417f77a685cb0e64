"""Channels of the student brought back to the teacher by regression, layer after layer, in a single forward pass.

At each batch norm t is what enters it in the teacher and s in the student, on the same pictures and with all earlier norms
corrected: per channel t ~ a s + b, with a = corr(t, s)^power sd(t) / sd(s). Power 1 is the regression: it takes the student's
noise for noise, but where little signal is left the channel fades. Power 0 matches the spread: it never fades, but lets noise
stand for signal. Which serves a network better differs.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datafree.closed.absorb import scale_layer, set_statistics, shift_output
from datafree.graph.flow import Flow, Layer
from datafree.graph.fold import BatchNorm, norm_vectors
from datafree.quant.insert import quantized_layers, weight_quantizer
from datafree.task import Task

SAMPLES = 4096  # values of a channel that enter a regression
SMALLEST, LARGEST = 0.2, 5.0  # of a
_BLOCK = 1 << 20  # elements
UNRELATED = 0.2  # below this correlation a only matches the spread


@dataclass(frozen=True)
class _Seen:
    """What entered a norm of the teacher: sampled values (samples, channels), and the batch's own statistics."""

    places: Tensor
    values: Tensor
    mean: Tensor
    var: Tensor


def regress_norms(
    teacher: nn.Module, student: nn.Module, flow: Flow, inputs: Tensor, generator: torch.Generator, power: float = 1.0
) -> None:
    """Correct the statistics of every batch norm of ``student`` that is called once, from ``inputs``, (n, *shape).

    The teacher must be anchored (``graph.taps.anchored``) by the caller; the student is in eval mode.
    """
    names = [
        name
        for name, module in student.named_modules()
        if isinstance(module, BatchNorm) and module.running_mean is not None and len(flow.calls_of.get(name, ())) == 1
    ]
    seen: dict[str, _Seen] = {}
    stored: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for name in names:

        def watch(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            seen[name] = _look(args[0], generator)

        handles.append(teacher.get_submodule(name).register_forward_pre_hook(watch))
    with torch.no_grad():
        teacher(inputs)
    for handle in handles:
        handle.remove()

    def correct(name: str, norm: BatchNorm, x: Tensor) -> None:
        before = seen.pop(name)
        a, b = regression(before.values, _at(x, before.places), power)
        original = norm_vectors(norm_of(teacher, name))
        stored[name] = ((original.mu - b) / a, original.sigma / a)
        norm.running_mean, norm.running_var = (before.mean - b) / a, ((before.var + norm.eps) / a.square() - norm.eps).clamp(min=0)

    handles = [
        norm_of(student, name).register_forward_pre_hook(lambda module, args, name=name: correct(name, module, args[0])) for name in names
    ]
    with torch.no_grad():
        student(inputs)
    for handle in handles:
        handle.remove()
    for name, (mu, sigma) in stored.items():
        set_statistics(norm_of(student, name), mu, sigma)


def regress_layers(
    teacher: nn.Module, student: nn.Module, flow: Flow, inputs: Tensor, generator: torch.Generator, power: float = 1.0
) -> None:
    """The same for networks without batch norms: the outputs of every quantized layer that is called once, by its scales and bias.

    Layers without a scale for each output are left alone.
    """
    seen: dict[str, _Seen] = {}
    layers = [
        flow.layers[name]
        for name, module in quantized_layers(student).items()
        if name in flow.layers
        and len(flow.layers[name].calls) == 1
        and flow.layers[name].scale_per_output
        and weight_quantizer(module).spec.axis is not None
    ]
    handles = []
    for layer in layers:

        def watch(module: nn.Module, args: tuple[Tensor, ...], result: Tensor, layer: Layer = layer) -> None:
            seen[layer.name] = _look(_channels_second(result, layer), generator)

        def correct(module: nn.Module, args: tuple[Tensor, ...], result: Tensor, layer: Layer = layer) -> Tensor:
            before = seen.pop(layer.name)
            a, b = regression(before.values, _at(_channels_second(result, layer), before.places), power)
            scale_layer(student, layer, a)
            shift_output(student, layer, -b, None)
            shape = (-1,) if layer.kind == "linear" else (-1, *(1,) * len(layer.kernel))
            return result * a.view(shape) + b.view(shape)

        handles.append(teacher.get_submodule(layer.name).register_forward_hook(watch))
        handles.append(student.get_submodule(layer.name).register_forward_hook(correct, prepend=True))  # before its quantizer
    with torch.no_grad():
        teacher(inputs)
        student(inputs)
    for handle in handles:
        handle.remove()


def regression(t: Tensor, s: Tensor, power: float = 1.0) -> tuple[Tensor, Tensor]:
    """a and b of t ~ a s + b for each channel, (channels,) each; t and s: (samples, channels)."""
    t_mean, s_mean = t.mean(0), s.mean(0)
    t_var, s_var = t.var(0, correction=0), s.var(0, correction=0)
    cov = ((t - t_mean) * (s - s_mean)).mean(0)
    spread = (t_var / s_var).sqrt()
    correlation = cov / (t_var * s_var).sqrt()
    a = torch.where(correlation > UNRELATED, spread * correlation**power, spread)
    a = torch.where(torch.isfinite(a) & (a > 0), a, 1).clamp(SMALLEST, LARGEST)
    return a, t_mean - a * s_mean


def divergence(teacher: nn.Module, student: nn.Module, task: Task, inputs: Tensor) -> float:
    """How far the student's answers are from the teacher's: mean KL in nats for logits (n, classes), else relative squared error."""
    with torch.no_grad():
        t, s = (torch.cat([task.run(model, part) for part in torch.split(inputs, 64)]) for model in (teacher, student))
    return distance(t, s)


def distance(t: Tensor, s: Tensor) -> float:
    """The divergence of the answers ``s`` from ``t``, see :func:`divergence`."""
    if t.dim() == 2 and t.shape[1] > 1:
        return float(F.kl_div(s.log_softmax(1), t.log_softmax(1), reduction="batchmean", log_target=True))
    return float((t - s).square().sum() / t.square().sum())


def norm_of(model: nn.Module, name: str) -> BatchNorm:
    """The batch norm called ``name``."""
    norm = model.get_submodule(name)
    assert isinstance(norm, BatchNorm)
    return norm


def _look(x: Tensor, generator: torch.Generator) -> _Seen:
    total = x.numel() // x.shape[1]
    places = (
        torch.randperm(total, generator=generator, device=x.device)[:SAMPLES] if total > SAMPLES else torch.arange(total, device=x.device)
    )
    return _Seen(places, _at(x, places), *_mean_and_variance(x))


def _mean_and_variance(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of each channel of x, (batch, channels, ...); a few at a time, which stay in the cache: ``torch.var`` takes five times as long."""
    x = x.reshape(*x.shape[:2], -1)
    mean, total = x.mean((0, 2)), torch.zeros(x.shape[1], device=x.device)
    for part in torch.split(x, max(1, _BLOCK // x[0].numel())):
        total += (part - mean[:, None]).square_().sum((0, 2))
    return mean, total / (x.numel() // x.shape[1])


def _channels_second(output: Tensor, layer: Layer) -> Tensor:
    return output.flatten(0, -2) if layer.kind == "linear" else output


def _at(x: Tensor, places: Tensor) -> Tensor:
    """(places, channels) of x, (batch, channels, ...), the places counted over batch and space."""
    batch, *space = torch.unravel_index(places, (x.shape[0], *x.shape[2:]))
    return x.movedim(1, -1)[(batch, *space)]
