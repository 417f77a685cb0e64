"""Round to nearest: the baseline that every other method has to beat."""

from typing import Literal

from torch import Tensor, nn

from datafree.bits.allocate import make_plan
from datafree.closed.absorb import own_norms, shift_output
from datafree.closed.clip import aciq_range
from datafree.closed.correct import output_shift
from datafree.closed.hqq import hqq
from datafree.closed.propagate import layer_inputs
from datafree.closed.ranges import closed_ranges
from datafree.context import Ctx
from datafree.errors import TargetError
from datafree.graph.flow import Flow, Layer, read
from datafree.graph.fold import by_outputs
from datafree.method import Method, method, option
from datafree.plan import QSpec, Target
from datafree.quant.insert import effective_weight, insert, latent_weight, quantizers, weight_quantizer
from datafree.quant.ranges import fit
from datafree.synth.calibrate import calibrate
from datafree.synth.source import Prior
from datafree.task import Task

EXACT_BITS = 8  # from here on a shift is smaller than the error of the moments that tell it


@method("rtn")
class RoundToNearest(Method):
    """Every weight to the nearest point of its grid, with a choice of ranges.

    Activation ranges come from procedural pictures sent through the network while its batch norms normalise by the batch, or from the
    statistics of batch norms without any input, which takes a network whose norms tell what passes every point (no attention).
    Optionally the shift of each layer's mean output is taken off (arXiv 1906.04721, section 4.2). ACIQ: arXiv 1810.05723. HQQ:
    github.com/mobiusml/hqq.

    Differs: ACIQ takes for each tensor the distribution, normal or Laplacian, that it is more like. For HQQ see ``closed.hqq``.
    """

    weight_range: Literal["mse", "minmax", "aciq"] = option(
        "mse", "range of the weights: least squared error (also known as OMSE), min-max, or the clip of ACIQ"
    )
    act_range: Literal["mse", "minmax", "aciq", "closed"] = option(
        "mse",
        "range of the activations: least squared error or min-max on pictures; from the statistics of norms alone the clip of ACIQ, or the "
        "range of least expected squared error (closed)",
    )
    rounding: Literal["nearest", "hqq"] = option(
        "nearest", "hqq: linear layers take range and zero point of HQQ, always on an asymmetric grid; others as with nearest"
    )
    correct_bias: bool = option(True, "below 8 bits, take off the shift of each output's mean, derived from batch-norm statistics")
    symmetric: bool = option(True, "symmetric grid for weights (zero point 0)")
    per_channel: bool = option(True, "one scale for each output channel of a weight; else one for the whole tensor")

    def run(self, teacher: nn.Module, task: Task, target: Target, ctx: Ctx) -> nn.Module:
        """Make the student: plan, round, correct, then range the activations."""
        flow = read(teacher, task, ctx)
        plan = make_plan(flow, teacher, target, self._spec, ctx)
        if self.rounding == "hqq" and not any(self._by_hqq(flow.layers[name]) for name in plan.layers):
            raise TargetError("rounding hqq is for linear layers, and none is quantized here: take rounding nearest")
        student = insert(teacher, plan)
        inputs = layer_inputs(flow, teacher) if self.correct_bias else {}
        norms = own_norms(student, flow)
        for step, name in enumerate(plan.layers, 1):
            layer, module = flow.layers[name], student.get_submodule(name)
            weight_quantizer(module).set(*self._fit(layer, latent_weight(module), plan.layers[name].weight))
            if self.correct_bias and inputs[name].known and plan.layers[name].weight.bits < EXACT_BITS:
                quantized, full = (by_outputs(weight, layer) for weight in (effective_weight(module), latent_weight(module)))
                shift_output(student, layer, output_shift(quantized, full, inputs[name].mean, layer.groups), norms.get(name))
            ctx.progress("round", step, len(plan.layers))
        self._range(student, teacher, flow, task, ctx)
        return student

    def _by_hqq(self, layer: Layer) -> bool:
        return self.rounding == "hqq" and layer.kind == "linear"

    def _spec(self, layer: Layer, bits: int) -> QSpec:
        return QSpec(bits, self.symmetric and not self._by_hqq(layer), layer.out_axis if self.per_channel else None)

    def _fit(self, layer: Layer, weight: Tensor, spec: QSpec) -> tuple[Tensor, Tensor]:
        if self._by_hqq(layer):
            return hqq(weight, spec)
        return aciq_range(weight, spec) if self.weight_range == "aciq" else fit(weight, spec, self.weight_range)

    def _range(self, student: nn.Module, teacher: nn.Module, flow: Flow, task: Task, ctx: Ctx) -> None:
        if self.act_range == "mse" or self.act_range == "minmax":
            calibrate(student, flow, task, Prior("mix", task, ctx.generator), self.act_range)
            return
        points = quantizers(student)
        specs = {point: quantizer.spec for point, quantizer in points.items()}
        for point, found in closed_ranges(flow, teacher, specs, task, self.act_range).items():
            points[point].set(*found)
