"""How much top-1 accuracy a student may have lost, without data: an estimate with an interval, never a measurement.

Legend: k is the KL divergence of the student's answers from the teacher's in nats, r the energy of the logits' noise over that of
the logits, both as geometric means over independent sources of pictures. The estimated drop in points is a power law that ends at
chance, D = min(a k^b r^c, 100 (1 - 1 / classes)); its interval is symmetric in log(1 + D). ``benchmarks/estimate.py`` fits a, b, c and the
interval to measured drops, and writes them to ``estimate.json``.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Literal

import torch
from torch import Tensor, nn

from datafree.errors import NetworkError
from datafree.measure.accuracy import answers
from datafree.measure.data import inputs_per_batch
from datafree.measure.fidelity import class_axis, divergence
from datafree.task import Task

FIT_FILE = "estimate.json"
_LEAST = 1e-12  # an indicator is never taken for less: it has a logarithm

Verdict = Literal["estimated", "too small", "unknown", "probably large"]
Steps = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Fit:
    """The map from indicators to the drop, and what it was fitted on.

    Args:
        scale: a.
        exponents: b and c by the names of their indicators, none negative: more noise is never less loss.
        half_width: of the interval, in log(1 + points).
        confidence: the share of left-out pairs that the interval was made to cover, in percent.
        ranges: smallest and largest value of each indicator, and of ``classes``, that it was fitted on.
        ceilings: by indicator, ascending pairs of an estimate in points and the largest value of the indicator up to this estimate.
        parameters: of the smallest and of the largest network that it was fitted on.
        networks: whose measured drops it was fitted on.
        pairs: how many pairs of a network and a setting.
        left_out_error: mean absolute error in points, each network estimated by a map fitted on the others, where the drop is under 10.
    """

    scale: float
    exponents: Mapping[str, float]
    half_width: float
    confidence: float
    ranges: Mapping[str, tuple[float, float]]
    ceilings: Mapping[str, Steps]
    parameters: tuple[int, int]
    networks: tuple[str, ...]
    pairs: int
    left_out_error: float

    @staticmethod
    def shipped() -> "Fit":
        """The map that comes with the package."""
        read = json.loads(files("datafree.measure").joinpath(FIT_FILE).read_text(encoding="utf-8"))["fit"]
        ranges = {name: (low, high) for name, (low, high) in read.pop("ranges").items()}
        ceilings = {name: tuple((drop, most) for drop, most in steps) for name, steps in read.pop("ceilings").items()}
        smallest, largest = read.pop("parameters")
        networks = tuple(read.pop("networks"))
        return Fit(**read, ranges=ranges, ceilings=ceilings, parameters=(smallest, largest), networks=networks)

    def drop(self, indicators: Mapping[str, float], classes: int) -> float:
        """The estimated drop in points; indicators that it has no exponent for are passed over."""
        power = sum(exponent * math.log(max(indicators[name], _LEAST)) for name, exponent in self.exponents.items())
        return min(self.scale * math.exp(power), _most(classes))

    def interval(self, drop: float, classes: int) -> tuple[float, float]:
        """Ends of the interval around an estimated drop, in points; the lower one may be a small gain."""
        low, high = (math.expm1(math.log1p(drop) + way * self.half_width) for way in (-1, 1))
        return low, min(high, _most(classes))

    def outside(self, indicators: Mapping[str, float], way: Literal["below", "above"]) -> dict[str, str]:
        """The indicators that lie below, or above, what the map was fitted on, each with the reason in words."""
        found = {}
        for name, (low, high) in self.ranges.items():
            value = indicators[name]
            if value < low if way == "below" else value > high:
                found[name] = f"{name} = {value:.4g} lies {way} {low:.4g} to {high:.4g}, what the map was fitted on"
        return found

    def contradiction(self, indicators: Mapping[str, float], high: float) -> str | None:
        """Which indicator speaks for a larger drop than ``high``, the upper end of the interval; None if none does.

        One does where no fitted pair with an estimate up to ``high`` had so large a value.
        """
        for name, steps in self.ceilings.items():
            most = max((value for drop, value in steps if drop <= high), default=math.inf)
            if indicators[name] > most:
                return (
                    f"{name} = {indicators[name]:.3g} contradicts the map, which says {high:.1f} points at most: "
                    f"networks of the fit with so small an estimate had {most:.3g} at most"
                )
        return None


@dataclass(frozen=True)
class Estimate:
    """An estimate of lost accuracy, made without data.

    Args:
        verdict: ``estimated``; ``too small`` for the map to tell, under ``high``; ``probably large``, but unknown; or ``unknown``.
        drop: estimated points of top-1 that were lost; None where there is no estimate.
        low: lower end of the interval; None where there is no estimate.
        high: upper end of the interval; also where the drop is too small to tell.
        unknown: why there is no estimate; None where there is one.
        confidence: percent of left-out pairs of a network and a setting that such intervals were made to cover.
        left_out_error: mean absolute error in points on networks left out of the fit, where the drop is under 10.
        fitted_on: the networks whose measured drops the map was fitted on.
        fitted_parameters: of the smallest and of the largest of them.
        fitted_classes: the smallest and the largest number of their classes.
        parameters: of this network.
        indicators: ``kl``, ``noise``, ``disagreement`` in percent (not in the map), ``classes``; empty where there are none.
        sources: which pictures were looked at, and how many of each.
    """

    verdict: Verdict
    drop: float | None
    low: float | None
    high: float | None
    unknown: str | None
    confidence: float
    left_out_error: float
    fitted_on: tuple[str, ...]
    fitted_parameters: tuple[int, int]
    fitted_classes: tuple[int, int]
    parameters: int
    indicators: Mapping[str, float]
    sources: Mapping[str, int]


def estimate_drop(teacher: nn.Module, student: nn.Module, task: Task, sources: Mapping[str, Tensor], fit: Fit | None = None) -> Estimate:
    """Estimate how many points of top-1 accuracy ``student`` has lost against ``teacher``; both stay as they are.

    Args:
        teacher: the float network.
        student: the quantized one.
        task: inputs and answer.
        sources: pictures by the name of their kind, each (n, *task.shape); none of them may be what the student was tuned on.
        fit: the map, that of the package unless given.

    It is unknown, with a reason, where the answers are no logits of classes, or of a number of classes that the map was not fitted on;
    and unknown but probably large where an indicator lies above what the map was fitted on or contradicts it.
    """
    fit = Fit.shipped() if fit is None else fit
    fewest, most = fit.ranges["classes"]
    none = Estimate(
        verdict="unknown",
        drop=None,
        low=None,
        high=None,
        unknown=None,
        confidence=fit.confidence,
        left_out_error=fit.left_out_error,
        fitted_on=fit.networks,
        fitted_parameters=fit.parameters,
        fitted_classes=(int(fewest), int(most)),
        parameters=sum(each.numel() for each in teacher.parameters()),
        indicators={},
        sources={name: len(inputs) for name, inputs in sources.items()},
    )
    try:
        found = indicators(teacher, student, task, sources)
    except NetworkError as error:
        return replace(none, unknown=str(error))
    return _judged(replace(none, indicators=found), fit)


def _judged(none: Estimate, fit: Fit) -> Estimate:
    """``none``, which holds the indicators, with what the map says to them."""
    found, classes = none.indicators, int(none.indicators["classes"])
    below, above = fit.outside(found, "below"), fit.outside(found, "above")
    if "classes" in {**below, **above}:
        return replace(none, unknown={**below, **above}["classes"])
    if above:
        return replace(none, verdict="probably large", unknown="; ".join(above.values()))
    drop = fit.drop({name: max(value, fit.ranges.get(name, (0.0, 0.0))[0]) for name, value in found.items()}, classes)
    low, high = fit.interval(drop, classes)
    if reason := fit.contradiction(found, high):
        return replace(none, verdict="probably large", unknown=reason)
    if below:
        return replace(none, verdict="too small", high=high)
    return replace(none, verdict="estimated", drop=drop, low=low, high=high)


def indicators(teacher: nn.Module, student: nn.Module, task: Task, sources: Mapping[str, Tensor]) -> dict[str, float]:
    """``kl``, ``noise``, ``disagreement`` and ``classes``, see :class:`Estimate`.

    Raises NetworkError where an answer is not (n, classes), is not finite, or the teacher's logits are all equal.
    """
    kl, noise, disagreement = [], [], []
    classes = 0
    for inputs in sources.values():
        first, second = (_logits(model, task, inputs, name) for model, name in ((teacher, "teacher"), (student, "student")))
        classes = first.shape[1]
        energy = float(first.square().sum())
        if not energy:
            raise NetworkError("the teacher's logits are all equal: there is no choice that could be lost")
        kl.append(float(divergence(first, second).mean()))
        noise.append(float((first - second).square().sum()) / energy)
        disagreement.append(100 * float((first.argmax(1) != second.argmax(1)).double().mean()))
    means = {"kl": _geometric(kl), "noise": _geometric(noise)}
    return {**means, "disagreement": sum(disagreement) / len(disagreement), "classes": float(classes)}


def _logits(model: nn.Module, task: Task, inputs: Tensor, name: str) -> Tensor:
    """Answers without their mean over the classes, which changes no choice: float64 (n, classes)."""
    found = torch.cat([answers(model, task, part, name) for part in torch.split(inputs, inputs_per_batch(task.shape))]).double()
    if found.ndim != 2 or class_axis(task, found.shape) is None:
        raise NetworkError(f"the {name} answers {tuple(found.shape)}: accuracy is lost by classifiers only, which answer (n, classes)")
    return found - found.mean(1, keepdim=True)


def _geometric(values: list[float]) -> float:
    return math.exp(sum(math.log(max(value, _LEAST)) for value in values) / len(values))


def _most(classes: int) -> float:
    """Points between full accuracy and chance."""
    return 100 * (1 - 1 / classes)
