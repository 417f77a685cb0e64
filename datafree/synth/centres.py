"""Class centres, what the deep batch norms of a network see of one picture of each class, and a generator that keeps near them (TexQ)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datafree.synth.generator import Convincing, Look
from datafree.synth.source import Batch, Terms
from datafree.synth.terms import Moments, first_deep, norm_moments
from datafree.task import Task

_PART = 64  # pictures that pass the network at a time
_MEAN, _VARIANCE = 0.5, 1.0  # standard deviations of what distorts a centre


@dataclass(frozen=True)
class Centres:
    """Of every class: moments of what enters each deep norm, by name, (classes, channels), and whether they count, (classes,)."""

    moments: Mapping[str, Moments]
    known: Tensor

    def distorted(self, generator: torch.Generator) -> "Centres":
        """Around each of these, normal with standard deviations of 0.5 for means and 1 for variances, as published for FDDA."""

        def noise(x: Tensor) -> Tensor:
            return torch.randn(x.shape, generator=generator, device=x.device)

        found = {name: (mean + _MEAN * noise(mean), var + _VARIANCE * noise(var)) for name, (mean, var) in self.moments.items()}
        return Centres(found, self.known)


@torch.no_grad()
def centres_of(teacher: nn.Module, task: Task, batch: Batch) -> Centres:
    """From one picture of each class, which counts where the teacher takes it for that.

    A deep norm that sees no positions has no statistics of one picture, and is left out.
    """
    labels = batch.labels
    assert labels is not None
    order = labels.argsort()
    parts: list[dict[str, Moments]] = []
    known = []
    with norm_moments(teacher) as seen:
        for part in torch.split(order, _PART):
            seen.clear()
            known.append(task.run(teacher, batch.inputs[part]).argmax(1) == labels[part])
            parts.append(each_input(seen, len(part)))
    names = [name for name in parts[0] if all(name in part for part in parts)]
    joined = {name: (torch.cat([part[name][0] for part in parts]), torch.cat([part[name][1] for part in parts])) for name in names}
    return Centres(joined, torch.cat(known))


def each_input(seen: Mapping[str, Sequence[Moments]], n: int) -> dict[str, Moments]:
    """Of n inputs, the moments that enter each deep norm, (n, channels): the mean over its calls."""
    found = {}
    for name, calls in list(seen.items())[first_deep(len(seen)) :]:
        mean, var = (torch.stack(parts).mean(0) for parts in zip(*calls, strict=True))
        if len(mean) == n:
            found[name] = mean, var
    return found


def centre_gap(seen: Mapping[str, Sequence[Moments]], labels: Tensor, centres: Centres) -> Tensor:
    """How far the inputs of each class, together, are from its centre: squared gaps of mean and variance, the mean over classes and norms.

    Args:
        seen: from ``terms.norm_moments``, of the inputs.
        labels: their classes, (n,); 0 is what inputs cost whose classes do not count.
        centres: of the classes.
    """
    counts = centres.known[labels]
    classes, member = torch.unique(labels[counts], return_inverse=True)
    gaps = []
    for name, (mean, var) in each_input(seen, len(labels)).items() if len(classes) else ():
        if name in centres.moments:
            of_mean, of_var = (each[classes] for each in centres.moments[name])
            mine = _by_class(mean[counts], member, len(classes))
            spread = _by_class(var[counts] + (mean[counts] - mine[member]).square(), member, len(classes))
            gaps.append((mine - of_mean).square().mean() + (spread - of_var).square().mean())
    return torch.stack(gaps).mean() if gaps else torch.zeros((), device=labels.device)


def _by_class(rows: Tensor, member: Tensor, classes: int) -> Tensor:
    """Means over the rows of each class, (n, channels) -> (classes, channels)."""
    belongs = F.one_hot(member, classes).to(rows.dtype)
    return belongs.T @ rows / belongs.sum(0)[:, None]


@dataclass(frozen=True)
class Centred:
    """TexQ's loss of a generator: GDFQ's, and every class near its centre, and near one that is distorted anew at every step.

    ``statistics``, ``centre`` and ``distorted`` are the weights of the statistics and of the two.
    """

    centres: Centres
    generator: torch.Generator
    statistics: float
    centre: float
    distorted: float

    def __call__(self, look: Look, student: nn.Module) -> Terms:
        """The terms; those of centres where there are any."""
        terms = dict(Convincing(statistics=self.statistics)(look, student))
        if self.centres.moments and self.centre:
            terms["centre"] = self.centre * centre_gap(look.seen, look.labels, self.centres)
        if self.centres.moments and self.distorted:
            terms["distorted centre"] = self.distorted * centre_gap(look.seen, look.labels, self.centres.distorted(self.generator))
        return terms
