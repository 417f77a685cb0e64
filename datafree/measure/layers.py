"""Layer by layer: how far the student's activations are from the teacher's, and how values lie in the ranges that clip them.

No data is needed: inputs are whatever is given, noise or pictures. What is measured is fidelity, never accuracy.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from datafree.graph.flow import Flow
from datafree.plan import Plan
from datafree.quant.grid import broadcast
from datafree.quant.insert import insert, latent_weight, plan_of, quantized_layers, quantizers, weight_quantizer
from datafree.quant.precision import float64
from datafree.quant.quantizer import Quantizer
from datafree.task import Task

WORST = 6  # layers and activations that get a histogram
BINS = 48
_PART = 1 << 19  # numbers of the inputs that pass the networks at once: all activations of theirs are held
_SAMPLE = 1 << 16  # values of an activation that a histogram is made of, at most


@dataclass(frozen=True)
class Histogram:
    """Counts of values in equal bins.

    Args:
        low: lower edge of the first bin.
        high: upper edge of the last bin.
        counts: values in each bin.
        clip: smallest and largest value that the grid can hold; of the channel with the widest range, where each has its own.
        clipped: percent of the values beyond the range of their own channel.
    """

    low: float
    high: float
    counts: tuple[int, ...]
    clip: tuple[float, float]
    clipped: float


@dataclass(frozen=True)
class LayerNoise:
    """A quantized layer.

    Args:
        name: of the layer.
        weights: how many there are.
        bits: of each weight.
        grid: of the weights.
        error: ||student - teacher||^2 / ||teacher||^2 of what leaves the layer, or the batch norm behind it, in percent; everything
            before it is quantized too. None where the student has nothing to compare there.
        rounded: the same with weights rounded to nearest at the same bits and activations in the same ranges: before the method's steps.
        histogram: of the teacher's weights in the student's range, for the layers of the largest error.
    """

    name: str
    weights: int
    bits: int
    grid: str
    error: float | None
    rounded: float | None
    histogram: Histogram | None


@dataclass(frozen=True)
class ActivationNoise:
    """A quantized activation: its point, bits, ||Q(x) - x||^2 / ||x||^2 in percent, and values for the points of the largest error."""

    point: str
    bits: int
    error: float
    histogram: Histogram | None


@dataclass(frozen=True)
class LayerReport:
    """All layers and quantized activations in execution order, and what the inputs were."""

    inputs: str
    layers: tuple[LayerNoise, ...]
    activations: tuple[ActivationNoise, ...]


@torch.no_grad()
def layer_report(teacher: nn.Module, student: nn.Module, flow: Flow, task: Task, inputs: Tensor, source: str) -> LayerReport:
    """Compare both networks layer by layer on ``inputs``, (n, *task.shape), which ``source`` describes. Neither is changed."""
    plan, layers = plan_of(student), quantized_layers(student)
    where = {name: (flow.layers[name].norm or name) if name in flow.layers else name for name in layers}
    parts = torch.split(inputs, max(1, _PART // math.prod(task.shape)))
    errors = _errors(teacher, student, where, task, parts)
    plain = _rounded(teacher, student, plan)
    before = {} if plain is None else _errors(teacher, plain, where, task, parts)
    worst = _worst({name: error for name, error in errors.items() if error is not None})
    found = [
        LayerNoise(
            name=name,
            weights=latent_weight(layer).numel(),
            bits=plan.layers[name].weight.bits,
            grid=plan.layers[name].weight.grid,
            error=errors[name],
            rounded=before.get(name),
            histogram=_weight_histogram(teacher, name, layer) if name in worst else None,
        )
        for name, layer in layers.items()
    ]
    return LayerReport(source, tuple(found), _activations(student, task, parts))


def _rounded(teacher: nn.Module, student: nn.Module, plan: Plan) -> nn.Module | None:
    """The teacher with weights rounded to nearest by ``plan`` and the student's ranges; None where the student has other modules."""
    known = dict(teacher.named_modules())
    if not all(point.rpartition(":")[0] in known for point in (*(f"{name}:" for name in plan.layers), *quantizers(student))):
        return None
    plain = insert(teacher, plan)
    ranges = quantizers(student)
    for point, quantizer in quantizers(plain).items():
        quantizer.set(ranges[point].scale, ranges[point].zero)
    return plain


def _errors(teacher: nn.Module, other: nn.Module, where: Mapping[str, str], task: Task, parts: Sequence[Tensor]) -> dict[str, float | None]:
    """The relative squared error of each layer's output in percent; ``where`` names the module that gives it."""
    noise, signal = dict.fromkeys(where, 0.0), dict.fromkeys(where, 0.0)
    for inputs in parts:
        with _outputs(teacher, where.values()) as first:
            task.run(teacher, inputs)
        with _outputs(other, where.values()) as second:
            task.run(other, inputs)
        for name, module in where.items():
            for one, two in zip(first[module], second[module], strict=False):
                if one.shape == two.shape:
                    noise[name] += float((float64(one) - float64(two)).square().sum())
                    signal[name] += float(float64(one).square().sum())
    return {name: 100 * noise[name] / signal[name] if signal[name] > 0 else None for name in where}


@contextmanager
def _outputs(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, list[Tensor]]]:
    """The tensors that leave the modules ``names``, one for each call; none where ``model`` has no such module."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(module: nn.Module, args: tuple[object, ...], result: object, *, calls: list[Tensor]) -> None:
        if isinstance(result, Tensor):
            calls.append(result)

    modules = dict(model.named_modules())
    hooks = [modules[name].register_forward_hook(partial(keep, calls=calls)) for name, calls in seen.items() if name in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _activations(student: nn.Module, task: Task, parts: Sequence[Tensor]) -> tuple[ActivationNoise, ...]:
    points = quantizers(student)
    noise, signal = dict.fromkeys(points, 0.0), dict.fromkeys(points, 0.0)
    samples: dict[str, list[Tensor]] = {point: [] for point in points}

    def hook(point: str, module: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> None:
        x = args[0]
        noise[point] += float((float64(result) - float64(x)).square().sum())
        signal[point] += float(float64(x).square().sum())
        if not samples[point]:
            samples[point].append(x.detach())

    hooks = [quantizer.register_forward_hook(partial(hook, point)) for point, quantizer in points.items()]
    try:
        for inputs in parts:
            task.run(student, inputs)
    finally:
        for each in hooks:
            each.remove()
    errors = {point: 100 * noise[point] / signal[point] for point in points if signal[point] > 0}
    worst = _worst(errors)
    return tuple(
        ActivationNoise(
            point, points[point].spec.bits, error, _histogram(samples[point][0], *_limits(points[point])) if point in worst else None
        )
        for point, error in errors.items()
    )


def _worst(errors: Mapping[str, float]) -> set[str]:
    return set(sorted(errors, key=lambda name: -errors[name])[:WORST])


def _weight_histogram(teacher: nn.Module, name: str, layer: nn.Module) -> Histogram | None:
    """Of the teacher's weights; None where the teacher has no such layer."""
    weight = getattr(dict(teacher.named_modules()).get(name), "weight", None)
    if not isinstance(weight, Tensor):
        return None
    quantizer = weight_quantizer(layer)
    return _histogram(weight, *(broadcast(limit, quantizer.spec, weight) for limit in _limits(quantizer)))


def _limits(quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    """Smallest and largest value on the grid, in the shape of the scale."""
    low, high = (torch.full_like(quantizer.scale, level) for level in quantizer.spec.levels)
    return (low - quantizer.zero) * quantizer.scale, (high - quantizer.zero) * quantizer.scale


def _histogram(values: Tensor, low: Tensor, high: Tensor) -> Histogram:
    half = (high - low) * 1e-6  # values at the edge are not beyond it
    clipped = 100 * float(float64((values < low - half) | (values > high + half)).mean())
    sample = values.flatten()[:: max(1, values.numel() // _SAMPLE)].float().cpu()
    widest = int((high - low).flatten().argmax())
    clip = float(low.flatten()[widest]), float(high.flatten()[widest])
    least, most = min(float(sample.min()), clip[0]), max(float(sample.max()), clip[1])
    counts = torch.histc(sample, BINS, least, most).int().tolist()
    return Histogram(least, most, tuple(counts), clip, clipped)
