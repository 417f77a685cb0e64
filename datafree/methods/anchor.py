"""Our own closed form: error-feedback rounding with statistics of procedural pictures, anchored to the batch norms.

Legend: H the covariance of a layer's input patches, m their mean, W the float weight, Q the quantized one.
"""

import copy
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from datafree.bits.allocate import make_plan
from datafree.bits.search import allowed, is_mixed, mixed_widths
from datafree.bits.sensitivity import distortions
from datafree.closed.absorb import own_norms, set_statistics, shift_output
from datafree.closed.gram import Gram, from_rows, grams, moment_gram, output_energy, output_mean, rows_of
from datafree.closed.propagate import layer_inputs
from datafree.closed.recalibrate import spread_ratio
from datafree.closed.refine import refine
from datafree.closed.regress import Seen, answers, distance, look, regress
from datafree.closed.rounding import error_feedback, in_parts, shrink
from datafree.closed.successive import followed, successive
from datafree.closed.trust import Trust, expected_gram
from datafree.context import Ctx
from datafree.graph.flow import Flow, Layer, read
from datafree.graph.fold import BatchNorm, norm_vectors
from datafree.graph.memory import inputs_within
from datafree.graph.taps import anchored, channels_last
from datafree.method import Method, method, option
from datafree.plan import QSpec, Target
from datafree.quant.grid import broadcast, dequantize, quantize
from datafree.quant.insert import assign, effective_weight, insert, latent_weight, quantized_layers, weight_quantizer
from datafree.quant.ranges import mse
from datafree.synth.calibrate import picture_trust, range_activations
from datafree.synth.noise import Pictures, source_of
from datafree.synth.prior import pictures
from datafree.task import Task

LARGE = 64  # pixels of a side: of larger pictures FEWER are drawn
PICTURES, FEWER = 256, 64  # fewer still where their activations would not fit into memory
REFINED_BITS = 4  # up to so many bits codes and scales are chosen together: above, it gains next to nothing


@method("anchor")
class Anchor(Method):
    """Weights rounded with error feedback, ranges and batch norms set on procedural pictures that are anchored to the network.

    Pictures of occluding shapes run through the network while every batch norm normalises by the batch: each channel then has
    the mean and variance that the network knows from its data, and the pictures supply the correlations. No training.
    Without any picture: ``statistics="moments"``, ``own_inputs=False``, ``act_range="moments"`` and ``recalibration="none"``.
    """

    family: Pictures = option("mix", "the pictures: dead leaves, pink or white noise, leaves and pink, or optimised as ZeroQ's (distilled)")
    statistics: Literal["pictures", "moments"] = option(
        "pictures", "what tells of layers' inputs before any layer is rounded: pictures, or batch norms"
    )
    shrinkage: float = option(0.2, "how far the covariance is drawn to its diagonal", at_least=0.0, at_most=1.0)
    robust: bool = option(True, "rely less on what pictures tell of a layer's inputs where kinds of pictures disagree on it")
    feedback: bool = option(True, "round with error feedback; else to nearest")
    refine: bool = option(True, "up to 4 bits, choose codes and scales together; else one pass of error feedback")
    own_inputs: bool = option(
        True, "round layer after layer, with each layer's inputs as the student has them; else all with the teacher's"
    )
    match_mean: bool = option(True, "keep the mean of each layer's output; rounding in turn always does")
    match_spread: bool = option(True, "keep the variance of each layer's output; rounding in turn regresses on it instead")
    act_range: Literal["pictures", "moments"] = option(
        "pictures", "activation ranges of least squared error: on pictures, or in closed form"
    )
    recalibration: Literal["auto", "regression", "spread", "none"] = option(
        "auto",
        "bring the student's channels back to the teacher, layer by layer: by regression, by their spread, or what agrees best",
    )

    def run(self, teacher: nn.Module, task: Task, target: Target, ctx: Ctx) -> nn.Module:
        """Make the student: measure, plan, round, range, recalibrate."""
        flow = read(teacher, task, ctx)
        drawn = "pictures" in (self.statistics, self.act_range) or self.own_inputs or self.recalibration != "none"
        count = inputs_within(flow, PICTURES if max(task.shape[1:], default=1) <= LARGE else FEWER)
        inputs = channels_last(teacher, source_of(self.family, teacher, task, ctx).sample(count).inputs) if drawn else None
        doubted = self.robust and (self.own_inputs or self.statistics == "pictures")
        trust = picture_trust(teacher, flow, task, count, ctx.generator) if doubted else dict.fromkeys(flow.layers, Trust())
        statistics = self._statistics(teacher, flow, target, inputs, trust, ctx)
        plan = make_plan(flow, teacher, target, _spec, ctx, self._widths(flow, teacher, target, statistics) if is_mixed(target) else None)
        student = insert(teacher, plan)
        norms = own_norms(student, flow)
        at_once = [name for name in plan.layers if not self._later(flow.layers[name])]
        for step, name in enumerate(at_once, 1):
            layer, module, gram = flow.layers[name], student.get_submodule(name), statistics.pop(name)
            full = latent_weight(module).detach().clone()
            assign(module, *self._round(full, layer, plan.layers[name].weight, gram))
            self._correct(student, layer, full, gram, norms.get(name))
            ctx.progress("round", step, len(at_once))
        range_activations(teacher, student, flow, task, inputs if self.act_range == "pictures" else None)
        if inputs is None:
            return student
        see = functools.partial(self._in_turn, trust) if self.own_inputs else look
        seen, shares = see(teacher, student, flow, inputs, ctx), {name: each.share for name, each in trust.items()}
        correct = functools.partial(regress, teacher, flow=flow, seen=seen, inputs=inputs, shares=shares)
        return self._recalibrate(teacher, student, correct, task, inputs, ctx)

    def _later(self, layer: Layer) -> bool:
        """Whether the layer is rounded only once those before it are."""
        return self.own_inputs and followed(layer)

    def _in_turn(
        self, trust: Mapping[str, Trust], teacher: nn.Module, student: nn.Module, flow: Flow, inputs: Tensor, ctx: Ctx
    ) -> Mapping[str, Seen]:
        """Layer after layer, with its inputs as the student has them and what they lost made good; batch norms follow by regression."""
        layers, steps = quantized_layers(student), itertools.count(1)

        def rewrite(name: str, wanted: Tensor, gram: Gram) -> None:
            layer, spec = flow.layers[name], weight_quantizer(layers[name]).spec
            assign(layers[name], *self._round(wanted, layer, spec, expected_gram(gram, layer, trust[name])))
            ctx.progress("round in turn", next(steps), len(layers))

        with successive(teacher, student, flow, layers, rewrite, ctx.generator):
            seen = look(teacher, student, flow, inputs, ctx)
            regress(teacher, student, flow, {name: each for name, each in seen.items() if name not in flow.layers}, inputs)
        return seen

    def _statistics(
        self, teacher: nn.Module, flow: Flow, target: Target, inputs: Tensor | None, trust: Mapping[str, Trust], ctx: Ctx
    ) -> dict[str, Gram]:
        """Of the inputs of every layer that is quantized, as they are expected on data."""
        names = [name for name, layer in flow.layers.items() if name not in target.keep and (is_mixed(target) or not self._later(layer))]
        if self.statistics == "moments" or inputs is None:
            known = layer_inputs(flow, teacher)
            if blind := [name for name in names if not known[name].known]:
                ctx.note(f"batch norms tell nothing of the inputs of these layers, whose channels count alike: {', '.join(blind)}")
            return {name: moment_gram(flow.layers[name], known[name]) for name in names}
        with anchored(teacher, flow.shared_norms):
            found = grams(teacher, flow, names, inputs, ctx.generator)
        return {name: expected_gram(gram, flow.layers[name], trust[name]) for name, gram in found.items()}

    def _widths(self, flow: Flow, teacher: nn.Module, target: Target, statistics: Mapping[str, Gram]) -> dict[str, int]:
        """The width of each layer under a budget, by what this very rounding would lose with it."""

        def rounded(layer: Layer, weight: Tensor, spec: QSpec) -> Tensor:
            codes, scale, zero = self._round(weight, layer, spec, statistics[layer.name])
            return dequantize(codes, scale, zero, spec)

        def energy(name: str, weight: Tensor) -> Tensor:
            return output_energy(weight, statistics[name], flow.layers[name])

        return mixed_widths(flow, teacher, target, distortions(flow, teacher, allowed(flow, target), energy, _spec, rounded), _spec)

    def _round(self, weight: Tensor, layer: Layer, spec: QSpec, gram: Gram) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scale and zero: a scale by the error that matters, then error feedback over the columns."""
        rows = rows_of(weight, layer)
        importance = gram.cov.diagonal(dim1=1, dim2=2).reshape(layer.groups, 1, -1).expand(rows.shape)
        scale, zero = mse(weight, spec, from_rows(importance, layer))
        if not self.feedback:
            return quantize(weight, scale, zero, spec), scale, zero
        per_row = rows_of(broadcast(scale, spec, weight).expand(weight.shape), layer)[..., 0]
        hessian = shrink(gram.cov, self.shrinkage)
        refined = self.refine and spec.bits <= REFINED_BITS and layer.kind != "conv_transpose"  # whose scales serve several rows
        found = [
            refine(some, hessian, steps, spec) if refined else (error_feedback(some, hessian, steps, spec), steps)
            for some, steps in in_parts(rows, per_row)
        ]
        codes, per_row = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
        return from_rows(codes, layer), per_row.flatten() if refined else scale, zero

    def _correct(self, student: nn.Module, layer: Layer, full: Tensor, gram: Gram, norm: BatchNorm | None) -> None:
        """Keep mean and variance of the output: in its own batch norm, or in the layer's bias and scale."""
        module = student.get_submodule(layer.name)
        low = effective_weight(module)
        if self.match_mean:
            shift_output(student, layer, output_mean(low - full, gram, layer), norm)
        if self.match_spread and norm is not None:
            before = norm_vectors(norm)
            ratio = spread_ratio(output_energy(low, gram, layer), output_energy(full, gram, layer))
            set_statistics(norm, before.mu, before.sigma * ratio)

    def _recalibrate(
        self, teacher: nn.Module, student: nn.Module, correct: Callable[..., None], task: Task, inputs: Tensor, ctx: Ctx
    ) -> nn.Module:
        """The student with its norms corrected, or its layers if there is none; ``auto`` keeps what is nearest on fresh pictures."""
        powers = {"none": (), "spread": (0.0,), "regression": (1.0,), "auto": (0.0, 0.5, 1.0)}[self.recalibration]
        fresh = pictures(self.family if self.family in ("pink", "white") else "leaves", len(inputs) // 2, task, ctx.generator)
        fresh = channels_last(teacher, fresh)
        wanted, best, least = answers(teacher, task, fresh), student, math.inf
        for step, power in enumerate(powers, 1):
            candidate = copy.deepcopy(student)
            correct(candidate, power=power)
            lost = distance(wanted, answers(candidate, task, fresh)) if len(powers) > 1 else 0.0
            if lost < least:
                best, least = candidate, lost
            ctx.progress("recalibrate", step, len(powers))
        return best


def _spec(layer: Layer, bits: int) -> QSpec:
    return QSpec(bits, axis=layer.out_axis, grid="ternary" if bits == 2 else "uniform")
