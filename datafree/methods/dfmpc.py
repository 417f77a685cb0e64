"""DF-MPC: low-bit layers repaired in closed form (Chen et al., arXiv 2307.00498; Pattern Recognition 143, 2023).

Legend: W the float weight of a low layer, Wh its low-bit one; gamma, beta, mu, sigma the batch norm behind it, muh, sigmah
its recalibrated statistics; c the coefficient of each output channel.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from datafree.bits.allocate import make_plan
from datafree.closed.absorb import own_norms, scale_layer, scale_norm, set_statistics, shift_output
from datafree.closed.compensate import Affine, plus_scale, solve, spread_scale, terms
from datafree.closed.correct import output_shift
from datafree.closed.moments import Moments
from datafree.closed.propagate import layer_inputs
from datafree.closed.recalibrate import recalibrate
from datafree.context import Ctx
from datafree.errors import NetworkError
from datafree.graph.chains import roles
from datafree.graph.flow import Flow, Layer, read
from datafree.graph.fold import BatchNorm, by_outputs, norm_vectors
from datafree.method import Method, method, option
from datafree.plan import QSpec, Target
from datafree.quant.insert import assign, codes_of, effective_weight, insert, latent_weight, quantizers, weight_quantizer
from datafree.quant.ranges import fit, optimal_ternary, twn
from datafree.synth.calibrate import calibrate
from datafree.synth.noise import Pictures, source_of
from datafree.task import Task

HOMOGENEOUS = frozenset(("relu", "leaky_relu", "prelu"))  # f(c x) = c f(x) for c >= 0


@method("dfmpc")
class DFMPC(Method):
    """Ternary or low-bit layers repaired channel by channel, in closed form, without data.

    ``plus`` (ours): the exact optimal ternary row, a scale that keeps the spread of each output, and an offset that leaves no
    shift of its mean, for every layer. ``faithful``: as published, the compensating coefficient folded into the batch norm.

    Differs: the paper does not say how the statistics behind a low layer are recalibrated without data; here they
    follow from the moments of its inputs. The coefficients are solved channel by channel (its Assumption 1) and kept
    non-negative. They are folded before the activation, where a residual sum or several consumers do no harm. Depthwise
    layers have a scale for each channel. A low layer whose activation is not homogeneous is repaired as in ``plus``. The first
    and last layer and shortcuts, on which the paper is silent, get the higher width. Weights need no inputs, the ranges of
    activations do: batch norms normalise by the batch while pictures (``ranges_on``) pass.
    """

    mode: Literal["plus", "faithful"] = option("plus", "plus: decoupled scale and offset; faithful: as published")
    scale: Literal["spread", "error"] = option("spread", "plus: the scale keeps each output's variance, or has the least squared error")
    lambda1: float = option(0.5, "faithful: weight of the offset in the loss", at_least=0)
    lambda2: float = option(0.0, "faithful: ridge on the coefficients", at_least=0)
    rho: float = option(0.6, "assumed correlation of neighbouring pixels in the inputs of a layer", at_least=0, at_most=1)
    act_range: Literal["mse", "minmax"] = option("mse", "range of the activations: least squared error, or min-max")
    ranges_on: Pictures = option(
        "mix", "what tells the ranges of activations: procedural pictures, white noise, or pictures optimised as ZeroQ's (distilled)"
    )

    def run(self, teacher: nn.Module, task: Task, target: Target, ctx: Ctx) -> nn.Module:
        """Make the student: plan, round, compensate, then range the activations."""
        flow = read(teacher, task, ctx)
        if self.mode == "faithful" and not any(layer.norm for layer in flow.layers.values()):
            raise NetworkError(
                'no layer of this network is followed by a batch norm, which DF-MPC as published needs: use mode="plus" or method "rtn"'
            )
        low = {name for name, role in roles(flow).items() if role == "low"}
        plan = make_plan(flow, teacher, target, lambda layer, bits: self._spec(layer, bits, layer.name in low), ctx)
        student = insert(teacher, plan)
        inputs = layer_inputs(flow, teacher)
        norms = own_norms(student, flow)
        shared: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for step, (name, layer_plan) in enumerate(plan.layers.items(), 1):
            layer, module = flow.layers[name], student.get_submodule(name)
            full = by_outputs(latent_weight(module).clone(), layer)
            self._round(module, layer_plan.weight)
            if self.mode == "plus" or name in low and layer.activation not in HOMOGENEOUS | {None}:
                self._repair(student, layer, full, inputs[name], norms.get(name))
            elif name in low and layer.norm is not None:
                shared.setdefault(layer.norm, []).append(self._recalibrate(student, layer, full, inputs[name], norms.get(name)))
            elif name in low:
                self._compensate_alone(student, layer, full)
            ctx.progress("compensate", step, len(plan.layers))
        for norm, parts in shared.items():  # a norm that serves several layers gets one c for all of them
            numerator, denominator = (torch.stack(sums).sum(0) for sums in zip(*parts, strict=True))
            served = student.get_submodule(norm)
            assert isinstance(served, BatchNorm)
            scale_norm(served, solve(numerator, denominator, self.lambda2))
        self._range(student, flow, teacher, task, ctx)
        return student

    def _range(self, student: nn.Module, flow: Flow, teacher: nn.Module, task: Task, ctx: Ctx) -> None:
        if quantizers(student):
            calibrate(student, flow, task, source_of(self.ranges_on, teacher, task, ctx), self.act_range)

    def _spec(self, layer: Layer, bits: int, low: bool) -> QSpec:
        if bits == 2 and not layer.depthwise and (low or self.mode == "plus"):
            return QSpec(2, axis=layer.out_axis, grid="ternary")
        if self.mode == "plus":
            return QSpec(bits, axis=layer.out_axis)
        return QSpec(bits, axis=layer.out_axis if low or layer.depthwise else None, grid="dorefa")

    def _round(self, module: nn.Module, spec: QSpec) -> None:
        weight = latent_weight(module)
        if spec.grid == "ternary":
            assign(module, *(optimal_ternary if self.mode == "plus" else twn)(weight, spec.axis))
        else:
            weight_quantizer(module).set(*fit(weight, spec, "mse" if self.mode == "plus" else "minmax"))

    def _repair(self, student: nn.Module, layer: Layer, full: Tensor, inputs: Moments, norm: BatchNorm | None) -> None:
        """Plus: a new scale for each output, and the offset that keeps its mean."""
        module = student.get_submodule(layer.name)
        quantizer = weight_quantizer(module)
        if layer.scale_per_output:
            codes = codes_of(module)
            centred = by_outputs(codes - quantizer.zero[0], layer)
            best = spread_scale if self.scale == "spread" else plus_scale
            assign(module, codes, best(centred, full, inputs.var, quantizer.scale, self.rho), quantizer.zero)
        if inputs.known:
            shift_output(student, layer, output_shift(by_outputs(effective_weight(module), layer), full, inputs.mean, layer.groups), norm)

    def _recalibrate(
        self, student: nn.Module, layer: Layer, full: Tensor, inputs: Moments, norm: BatchNorm | None
    ) -> tuple[Tensor, Tensor]:
        """Faithful: new statistics for the low layer; returns the numerator and denominator of its c."""
        assert layer.norm is not None
        module, before = student.get_submodule(layer.name), norm_vectors(student.get_submodule(layer.norm))
        bias = module.bias.detach() if isinstance(module.bias, Tensor) else torch.zeros_like(before.mu)
        low = by_outputs(effective_weight(module), layer)
        mu = before.mu - bias
        mu_hat, sigma_hat = recalibrate(low, full, mu, before.sigma, inputs, rho=self.rho)
        if norm is not None:
            set_statistics(norm, mu_hat + bias, sigma_hat)
        else:  # the norm serves others too, so the layer itself is brought to the old statistics
            ratio = before.sigma / sigma_hat
            scale_layer(student, layer, ratio)
            shift_output(student, layer, mu_hat * ratio - mu + bias * (ratio - 1), None)
        after_low, after_full = (Affine.of_norm(before.gamma, before.beta, m, s) for m, s in ((mu_hat, sigma_hat), (mu, before.sigma)))
        return terms(low, full, after_low, after_full, self.lambda1)

    def _compensate_alone(self, student: nn.Module, layer: Layer, full: Tensor) -> None:
        """Faithful, no batch norm: c goes into the layer's own scale and bias."""
        module = student.get_submodule(layer.name)
        bias = module.bias.detach() if isinstance(module.bias, Tensor) else full.new_zeros(full.shape[0])
        low, after = by_outputs(effective_weight(module), layer), Affine.of_bias(bias)
        scale_layer(student, layer, solve(*terms(low, full, after, after, self.lambda1), self.lambda2))
