"""Our own closed form: error-feedback rounding with statistics of procedural pictures, anchored to the batch norms.

Legend: H the covariance of a layer's input patches, m their mean, W the float weight, Q the quantized one.
"""

import copy
import math
from typing import Literal

from torch import Tensor, nn

from datafree.bits.allocate import make_plan
from datafree.closed.absorb import own_norms, set_statistics, shift_output
from datafree.closed.gram import Gram, from_rows, grams, output_energy, output_mean, rows_of
from datafree.closed.recalibrate import spread_ratio
from datafree.closed.regress import divergence, regress_norms
from datafree.closed.rounding import error_feedback, shrink
from datafree.context import Ctx
from datafree.graph.flow import Flow, Layer, read
from datafree.graph.fold import BatchNorm, norm_vectors
from datafree.graph.taps import anchored
from datafree.method import Method, method, option
from datafree.plan import Plan, QSpec, Target
from datafree.quant.grid import broadcast, quantize
from datafree.quant.insert import assign, effective_weight, insert, latent_weight, quantizers
from datafree.quant.observe import observe
from datafree.quant.ranges import mse
from datafree.synth.prior import Family, pictures
from datafree.task import Task


@method("anchor")
class Anchor(Method):
    """Weights rounded with error feedback, ranges and batch norms set on procedural pictures that are anchored to the network.

    Pictures of occluding shapes run through the network while every batch norm normalises by the batch: each channel then has
    the mean and variance that the network knows from its data, and the pictures supply the correlations. No training.
    """

    family: Family = option("mix", "the procedural pictures: dead leaves, pink noise, white noise, or leaves and pink")
    shrinkage: float = option(0.2, "how far the covariance is drawn to its diagonal", at_least=0.0, at_most=1.0)
    feedback: bool = option(True, "round with error feedback; else to nearest")
    match_mean: bool = option(True, "keep the mean of each layer's output")
    match_spread: bool = option(True, "keep the variance of each layer's output")
    recalibration: Literal["auto", "regression", "spread", "none"] = option(
        "auto", "bring the student's batch norms back to the teacher one by one: by regression, by matching the spread, or what agrees best"
    )

    def run(self, teacher: nn.Module, task: Task, target: Target, ctx: Ctx) -> nn.Module:
        """Make the student: plan, measure, round, range, recalibrate."""
        flow = read(teacher, task, ctx)
        plan = make_plan(flow, teacher, target, _spec, ctx)
        student = insert(teacher, plan)
        inputs = pictures(self.family, _count(task), task, ctx.generator)
        norms = own_norms(student, flow)
        with anchored(teacher):
            statistics = grams(teacher, flow, plan.layers, inputs, ctx.generator)
            for step, (name, layer_plan) in enumerate(plan.layers.items(), 1):
                layer, module, gram = flow.layers[name], student.get_submodule(name), statistics.pop(name)
                full = latent_weight(module).detach().clone()
                self._round(module, layer, layer_plan.weight, gram)
                self._correct(student, layer, full, gram, norms.get(name))
                ctx.progress("round", step, len(plan.layers))
            self._range(teacher, student, task, inputs)
        return self._recalibrate(teacher, student, flow, task, inputs, ctx)

    def _round(self, module: nn.Module, layer: Layer, spec: QSpec, gram: Gram) -> None:
        """A scale by the error that matters, then error feedback over the columns."""
        weight = latent_weight(module).detach()
        rows = rows_of(weight, layer)
        importance = gram.cov.diagonal(dim1=1, dim2=2)[:, None].expand(rows.shape)
        scale, zero = mse(weight, spec, from_rows(importance, layer))
        if self.feedback:
            per_row = rows_of(broadcast(scale, spec, weight).expand(weight.shape), layer)[..., 0]
            codes = from_rows(error_feedback(rows, shrink(gram.cov, self.shrinkage), per_row, spec), layer)
        else:
            codes = quantize(weight, scale, zero, spec)
        assign(module, codes, scale, zero)

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

    def _recalibrate(self, teacher: nn.Module, student: nn.Module, flow: Flow, task: Task, inputs: Tensor, ctx: Ctx) -> nn.Module:
        """The student with its batch norms corrected; ``auto`` keeps what is nearest to the teacher on fresh pictures."""
        powers = {"none": (), "spread": (0.0,), "regression": (1.0,), "auto": (0.0, 0.5, 1.0)}[self.recalibration]
        if not powers or not any(layer.norm for layer in flow.layers.values()):
            return student
        fresh = pictures(self.family if self.family in ("pink", "white") else "leaves", len(inputs) // 2, task, ctx.generator)
        best, least = student, math.inf
        for step, power in enumerate(powers, 1):
            candidate = copy.deepcopy(student)
            with anchored(teacher):
                regress_norms(teacher, candidate, flow, inputs, ctx.generator, power)
            distance = divergence(teacher, candidate, task, fresh) if len(powers) > 1 else 0.0
            if distance < least:
                best, least = candidate, distance
            ctx.progress("recalibrate", step, len(powers))
        return best

    def _range(self, teacher: nn.Module, student: nn.Module, task: Task, inputs: Tensor) -> None:
        """Clips of least squared error, from the float network on the pictures."""
        points = {point: quantizer.spec for point, quantizer in quantizers(student).items()}
        if points:
            probe = insert(teacher, Plan({}, points))
            with anchored(probe):
                observe(probe, [inputs], "mse", task.run)
            for point, quantizer in quantizers(probe).items():
                quantizers(student)[point].set(quantizer.scale, quantizer.zero)


def _spec(layer: Layer, bits: int) -> QSpec:
    return QSpec(bits, axis=layer.out_axis, grid="ternary" if bits == 2 else "uniform")


def _count(task: Task) -> int:
    """256 pictures of 32 px, 64 of 224 px."""
    return 256 if max(task.shape[1:]) <= 64 else 64
