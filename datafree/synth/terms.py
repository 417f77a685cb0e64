"""What inputs are optimised for: each term is a function that gives a scalar.

One normalisation for all: a term is a mean over the inputs, and over channels, layers or pixels where it has them, so that a weight
means the same for every size of batch, picture and network. Statistics are those of what *enters* a batch norm.

Legend: n inputs, L layers (batch norms with stored statistics, and the network's input where it counts as one).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from datafree.errors import NetworkError
from datafree.graph.taps import norm_input

Spread = Literal["deviation", "variance"]
Share = Literal["channel", "layer"]
Moments = tuple[Tensor, Tensor]  # mean and variance, (n, channels) or (1, channels)

_EPSILON = 1e-6  # joins a variance under the root


@dataclass(frozen=True)
class Gap:
    """How far one layer's statistics are from the stored ones: of each input (n, channels), or of the batch (1, channels)."""

    mean: Tensor
    spread: Tensor


def stored_moments(model: nn.Module) -> dict[str, Moments]:
    """Mean and variance, (channels,), that every batch norm has stored, by name; norms without statistics are left out."""
    return {
        name: (module.running_mean, module.running_var)
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None
    }


@contextmanager
def norm_moments(model: nn.Module) -> Iterator[dict[str, list[Moments]]]:
    """While it lasts, the moments of what enters every batch norm of :func:`stored_moments`, by name, a pair for each call.

    They pile up from pass to pass: ``clear`` the dictionary in between.
    """
    seen: dict[str, list[Moments]] = {}

    def watch(name: str) -> "torch.utils.hooks.RemovableHandle":
        def look(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            seen.setdefault(name, []).append(moments(norm_input(args, kwargs)))

        return model.get_submodule(name).register_forward_pre_hook(look, with_kwargs=True)

    handles = [watch(name) for name in stored_moments(model)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def entering(model: nn.Module, name: str | None) -> Iterator[list[Tensor]]:
    """While it lasts, what enters the layer ``name``, its positions averaged, (n, channels), at each call; without a name, nothing.

    They pile up from pass to pass: ``clear`` the list in between.
    """
    seen: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        (x,) = args
        if x.dim() > 2:
            x = x.flatten(1, -2).mean(1) if isinstance(module, nn.Linear) else x.flatten(2).mean(2)
        seen.append(x)

    handle = None if name is None else model.get_submodule(name).register_forward_pre_hook(look)
    try:
        yield seen
    finally:
        if handle is not None:
            handle.remove()


def moments(x: Tensor) -> Moments:
    """Mean and variance over the positions of each input, x: (n, channels, *sizes) -> (n, channels); over the batch where it has one."""
    if x[0, 0].numel() == 1:
        return over_batch((x.flatten(1).float(), torch.zeros((), device=x.device)))
    mean, var = _Moments.apply(x.flatten(2).float())  # type: ignore[no-untyped-call]
    return mean, var


class _Moments(torch.autograd.Function):
    """Mean and variance over the last axis: two passes, as E[x^2] - E[x]^2 cancels, and one backwards where autograd takes four."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Moments:  # type: ignore[no-untyped-def]
        mean = x.mean(2)
        var = torch.linalg.vector_norm(x - mean[..., None], dim=2).square() / x.shape[2]
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    def backward(ctx, slope_mean: Tensor, slope_var: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        x, mean = ctx.saved_tensors
        gain = 2 / x.shape[2] * slope_var
        return torch.addcmul((slope_mean / x.shape[2])[..., None], gain[..., None], x - mean[..., None])


def over_batch(each: Moments) -> Moments:
    """From the moments of each input, (n, channels), to those of the batch, (1, channels)."""
    mean, var = each
    return mean.mean(0, keepdim=True), var.mean(0, keepdim=True) + mean.var(0, correction=0, keepdim=True)


def gaps(seen: Mapping[str, Sequence[Moments]], stored: Mapping[str, Moments], per_image: bool, spread: Spread = "deviation") -> list[Gap]:
    """The gap of every layer in ``seen``; a layer that was called several times has, as its stored statistics, the mean over the calls."""
    found = []
    for name, calls in seen.items():
        each = calls if per_image else [over_batch(call) for call in calls]
        mean, var = (torch.stack(parts).mean(0) for parts in zip(*each, strict=True))
        target_mean, target_var = stored[name]
        if spread == "deviation":
            var, target_var = (var + _EPSILON).sqrt(), (target_var + _EPSILON).sqrt()
        found.append(Gap(mean - target_mean, var - target_var))
    return found


def statistics(
    found: Sequence[Gap], share: Share = "channel", margins: Sequence[tuple[float, float]] | None = None, weight: Tensor | None = None
) -> Tensor:
    """Mean of the squared gaps of mean and spread.

    Args:
        found: of each layer, from :func:`gaps`.
        share: every channel of the network counts alike (ZeroQ's sum over channels), or every layer does (GDFQ's mean).
        margins: of each layer, gaps of mean and of spread that cost nothing (DSG); see :func:`margins_of`.
        weight: of the layers, (L,) or (n, L): :func:`by_depth` or :func:`by_turns`.
    """
    rows = []
    for gap, (of_mean, of_spread) in zip(found, margins or [(0.0, 0.0)] * len(found), strict=True):
        far = F.relu(gap.mean.abs() - of_mean).square() + F.relu(gap.spread.abs() - of_spread).square()
        rows.append(far.sum(1) if share == "channel" else far.mean(1))
    n = max(len(row) for row in rows)
    table = torch.stack([row.expand(n) for row in rows], 1)  # (n, L)
    total = sum(gap.mean.shape[1] for gap in found) if share == "channel" else len(found)
    return (table if weight is None else table * weight).sum() / (len(table) * total)


def margins_of(found: Sequence[Gap], percentile: float) -> list[tuple[float, float]]:
    """Of each layer, how far its statistics stay from the stored ones in so many percent of the cases (DSG, on Gaussian inputs)."""
    share = percentile / 100
    return [(float(gap.mean.abs().quantile(share)), float(gap.spread.abs().quantile(share))) for gap in found]


def by_turns(n: int, layers: int, gain: float = 2.0) -> Tensor:
    """Input i counts layer ``i mod layers`` ``gain`` times as much as the others (DSG's layerwise enhancement): (n, layers), mean 1."""
    return _fair(1 + (gain - 1) * (torch.arange(n)[:, None] % layers == torch.arange(layers)).float())


def by_depth(layers: int, shallow: float = 0.2, deep: float = 1.1) -> Tensor:
    """Layers before :func:`first_deep` count less than the others (TexQ's layered statistics): (layers,), mean 1."""
    return _fair(torch.where(torch.arange(layers) < first_deep(layers), shallow, deep))


def first_deep(layers: int) -> int:
    """The number, counted from 0, of the first of so many layers that is a deep one (FDDA, ECCV 2022)."""
    return max(0, (layers + 1) // 2 - 2)


def _fair(weight: Tensor) -> Tensor:
    return weight / weight.mean(-1, keepdim=True)


def class_entropy(answer: Tensor, labels: Tensor, focus: float = 0.0) -> Tensor:
    """Cross-entropy in nats of the logits, (n, classes), to what the inputs are meant to show: classes (n,), or shares (n, classes).

    ``focus``: each input counts ``(1 - p)^focus`` times, where its cross-entropy is ``-log p`` (HAST, CVPR 2023): hard ones count more.
    """
    _check_logits(answer)
    if not focus:
        return F.cross_entropy(answer.float(), labels)
    lost = F.cross_entropy(answer.float(), labels, reduction="none")
    hardness = -torch.expm1(-lost)
    return (hardness.clamp(min=_EPSILON) ** focus * lost).mean()


def certainty_gap(answer: Tensor, labels: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared distance of the probability of each input's class, of logits (n, classes), from the wanted one, (n,) (IntraQ)."""
    _check_logits(answer)
    return (answer.float().softmax(1).gather(1, labels[:, None])[:, 0] - wanted).square().mean()


def cosine_margin(features: Tensor, centres: Tensor, nearest: float, farthest: float) -> Tensor:
    """How far the cosine distances of features and centres, (n, width), lie outside the margin: the mean (IntraQ, CVPR 2022).

    An input whose centre is 0, the one of no feature, costs nothing.
    """
    distance = 1 - F.cosine_similarity(features.float(), centres, dim=1)
    return ((F.relu(nearest - distance) + F.relu(distance - farthest)) * centres.any(1)).mean()


def entropy(answer: Tensor) -> Tensor:
    """How undecided the answers are: mean entropy in nats of the softmax of the logits, (n, classes)."""
    _check_logits(answer)
    return entropies(answer).mean()


def entropies(answer: Tensor) -> Tensor:
    """Entropy in nats of the softmax of each input's logits, (n, classes) -> (n,)."""
    logarithm = answer.float().log_softmax(1)
    return -(logarithm.exp() * logarithm).sum(1)


def total_variation(x: Tensor) -> Tensor:
    """Mean squared difference of neighbouring pixels, the mean over the spatial axes; 0 for inputs without any."""
    steps = [x.diff(dim=axis).square().mean() for axis in range(2, x.dim()) if x.shape[axis] > 1]
    return torch.stack(steps).mean() if steps else x.new_zeros(())


def image_prior(x: Tensor) -> Tensor:
    """Smooth and not too bright: :func:`total_variation` and the mean square of the pixels (DeepInversion, arXiv 1912.08795)."""
    return total_variation(x) + x.square().mean()


def _check_logits(answer: Tensor) -> None:
    if answer.dim() != 2 or answer.shape[1] < 2:
        raise NetworkError(f"the network answers {tuple(answer.shape)}, but pictures of classes need (n, classes): leave the classes out")
