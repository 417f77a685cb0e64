"""Round to nearest: the baseline that every other method has to beat."""

from typing import Literal

from torch import nn

from datafree.bits.allocate import make_plan
from datafree.closed.absorb import own_norms, shift_output
from datafree.closed.correct import output_shift
from datafree.closed.propagate import layer_inputs
from datafree.context import Ctx
from datafree.graph.flow import Layer, read
from datafree.graph.fold import by_outputs
from datafree.method import Method, method, option
from datafree.plan import QSpec, Target
from datafree.quant.insert import effective_weight, insert, latent_weight, weight_quantizer
from datafree.quant.observe import observe_noise
from datafree.quant.ranges import fit
from datafree.task import Task


@method("rtn")
class RoundToNearest(Method):
    """Every weight to the nearest point of its grid, with ranges by min-max or least squared error.

    Activation ranges come from Gaussian noise sent through the network while its batch norms normalise by the batch.
    Optionally the shift of each layer's mean output is taken off (arXiv 1906.04721, section 4.2).
    """

    weight_range: Literal["mse", "minmax"] = option("mse", "range of the weights: least squared error, or min-max")
    act_range: Literal["mse", "minmax"] = option("mse", "range of the activations on noise: least squared error, or min-max")
    correct_bias: bool = option(True, "take off the shift of each output's mean, derived from batch-norm statistics")
    symmetric: bool = option(True, "symmetric grid for weights (zero point 0)")
    per_channel: bool = option(True, "one scale for each output channel of a weight; else one for the whole tensor")

    def run(self, teacher: nn.Module, task: Task, target: Target, ctx: Ctx) -> nn.Module:
        """Make the student: plan, round, correct, then range the activations."""
        flow = read(teacher, task, ctx)
        plan = make_plan(flow, teacher, target, self._spec, ctx)
        student = insert(teacher, plan)
        inputs = layer_inputs(flow, teacher) if self.correct_bias else {}
        norms = own_norms(student, flow)
        for step, name in enumerate(plan.layers, 1):
            layer, module = flow.layers[name], student.get_submodule(name)
            weight_quantizer(module).set(*fit(latent_weight(module), plan.layers[name].weight, self.weight_range))
            if self.correct_bias and inputs[name].known:
                quantized, full = (by_outputs(weight, layer) for weight in (effective_weight(module), latent_weight(module)))
                shift_output(student, layer, output_shift(quantized, full, inputs[name].mean, layer.groups), norms.get(name))
            ctx.progress("round", step, len(plan.layers))
        observe_noise(student, task, self.act_range, ctx)
        return student

    def _spec(self, layer: Layer, bits: int) -> QSpec:
        return QSpec(bits, self.symmetric, layer.out_axis if self.per_channel else None)
