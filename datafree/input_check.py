"""Does the network expect what its task says? The first batch norm remembers how large its inputs were."""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from datafree.closed.moments import Moments
from datafree.graph.flow import Flow
from datafree.graph.fold import norm_vectors
from datafree.graph.memory import inputs_within
from datafree.graph.taps import batch_moments, norm_input
from datafree.synth.prior import pictures
from datafree.task import Task

_PICTURES = 8
_FACTOR = 3.0  # by which the spread of most channels must differ before it is worth a warning
_USUAL = (
    ("pixels 0..255: mean 0, std 1/255", (0.0,), (1 / 255,)),
    ("pixels 0..1: mean 0, std 1", (0.0,), (1.0,)),
    ("mean 0.5, std 0.5", (0.5,), (0.5,)),
    ("ImageNet's mean 0.485, 0.456, 0.406 and std 0.229, 0.224, 0.225", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
)


def input_warning(model: nn.Module, flow: Flow, task: Task) -> str | None:
    """A warning where the first batch norm has stored statistics unlike those that the task's inputs give; None where they agree.

    Looked at are layers that take the network's input directly and have a batch norm behind them. What is compared is the median over
    the channels of measured over stored standard deviation, on procedural pictures.
    """
    first = next(
        (layer for layer in flow.layers.values() if layer.norm and flow.nodes[flow.origin(flow.data(layer.name)[0])].op == "input"), None
    )
    if first is None or first.norm is None:
        return None
    count = inputs_within(flow, _PICTURES)
    ratio = _ratio(model, first.norm, task, count)
    if 1 / _FACTOR < ratio < _FACTOR:
        return None
    better = [(abs(math.log(max(_ratio(model, first.norm, other, count), 1e-9))), told) for told, other in _alternatives(task)]
    distance, told = min(better, default=(math.inf, ""))
    hint = f"; the network would fit {told}" if distance < math.log(_FACTOR) / 2 else ""
    return (
        f"the task contradicts the network: with mean {_listed(task.mean)} and std {_listed(task.std)}, what enters {first.norm} spreads "
        f"{ratio:.2g} times as far as the statistics that training left there{hint}. Check Task.mean and Task.std (--mean, --std)"
    )


def _alternatives(task: Task) -> list[tuple[str, Task]]:
    fits = [(told, mean, std) for told, mean, std in _USUAL if len(mean) in (1, task.shape[0])]
    return [(told, replace(task, mean=mean, std=std)) for told, mean, std in fits]


@torch.no_grad()
def _ratio(model: nn.Module, norm: str, task: Task, count: int) -> float:
    """The median over the channels of the spread that enters the norm, over the stored one."""
    seen: list[Moments] = []

    def look(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        seen.append(Moments(*batch_moments(norm_input(args, kwargs))))

    handle = model.get_submodule(norm).register_forward_pre_hook(look, with_kwargs=True)
    try:
        task.run(model, pictures("leaves", count, task, torch.Generator(next(model.parameters()).device).manual_seed(0)))
    finally:
        handle.remove()
    stored = norm_vectors(model.get_submodule(norm)).sigma
    alive = stored > 1e-3 * stored.max()
    return float((seen[0].var.sqrt()[alive] / stored[alive]).median())


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)
