"""DFQ: equalize, absorb, round, correct (Nagel et al., ICCV 2019, arXiv 1906.04721).

Legend: beta, gamma mean and standard deviation of a channel behind its batch norm; s, c see ``closed.equalize``.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from datafree.bits.allocate import make_plan
from datafree.bits.search import allowed, is_mixed, mixed_widths
from datafree.bits.sensitivity import distortions, moments_energy
from datafree.closed.absorb import own_norms, shift_output
from datafree.closed.correct import output_shift
from datafree.closed.equalize import absorb_biases, equalize_layers, fold_weights
from datafree.closed.moments import Moments
from datafree.closed.propagate import layer_inputs
from datafree.closed.ranges import activate, follow, point_nodes, source_moments, sources
from datafree.context import Ctx
from datafree.graph.flow import ACTIVATIONS, Flow, Layer, read
from datafree.graph.fold import by_outputs
from datafree.graph.tape import Node
from datafree.method import Method, method, option
from datafree.plan import QSpec, Target
from datafree.quant.insert import effective_weight, insert, latent_weight, quantizers
from datafree.quant.ranges import from_range
from datafree.synth.calibrate import calibrate
from datafree.synth.source import Prior
from datafree.task import Task

_GRID = 129  # places at which an activation function is looked at between the ends of its input


@method("dfq")
class DFQ(Method):
    """Ranges of weights evened out from layer to layer, high biases moved on, shifts of the mean corrected: all closed form.

    Made for 8 bits and one scale a tensor. Activation ranges are beta -+ 6 gamma, the widest over channels; at 4 bits and
    fewer these are far too wide, as the paper is silent on such widths. Several widths with ``max_bytes`` are mixed by the
    expected noise of each layer.

    Reconstructed: only the first page of the paper could be read; the rest follows quic/aimet and jakc4103/DFQ.
    Differs: batch norms keep their place and only shift. ReLU6 stays where it is, and by default the function too (see
    ``closed.equalize``). Where no batch norm tells the moments, ranges come from procedural pictures.
    """

    equalize: bool = option(True, "even out the ranges of weights across layers")
    to_convergence: bool = option(False, "equalize until nothing changes any more; else once over the network, as aimet does")
    relu6_to_relu: bool = option(False, "treat ReLU6 as ReLU, as in the paper; else channels that its cap touches stay as they are")
    absorb: bool = option(True, "move biases above three standard deviations into the next layer")
    correct_bias: bool = option(True, "take off the shift of each output's mean, derived from batch-norm statistics")
    per_channel: bool = option(False, "one scale for each output channel of a weight; else one for the tensor, as in the paper")
    symmetric: bool = option(False, "symmetric grid for weights (zero point 0); else asymmetric, as in the paper")
    sigmas: float = option(6.0, "standard deviations that activation ranges reach on both sides of the mean")

    def run(self, teacher: nn.Module, task: Task, target: Target, ctx: Ctx) -> nn.Module:
        """Make the student: fold, equalize, absorb, round, correct, then range the activations."""
        flow = read(teacher, task, ctx)
        model = fold_weights(teacher, flow)
        if self.equalize and not equalize_layers(model, flow, self.relu6_to_relu, self.to_convergence):
            ctx.note("nothing to equalize: no two layers follow one another with only ReLU, leaky ReLU, PReLU or ReLU6 between")
        if self.absorb and not absorb_biases(model, flow, self.relu6_to_relu):
            ctx.note("no bias to absorb: that takes a layer with a batch norm of its own and one that follows it alone")
        inputs = layer_inputs(flow, model)
        if self.correct_bias:
            self._make_room(flow, model, inputs, target)
        plan = make_plan(flow, model, target, self._spec, ctx, self._widths(flow, model, target, inputs))
        student = insert(model, plan)  # with min-max ranges of the weights, the paper's
        norms = own_norms(student, flow)
        for step, name in enumerate(plan.layers, 1):
            if self.correct_bias and inputs[name].known:
                layer, module = flow.layers[name], student.get_submodule(name)
                quantized, full = (by_outputs(weight, layer) for weight in (effective_weight(module), latent_weight(module)))
                shift_output(student, layer, output_shift(quantized, full, inputs[name].mean, layer.groups), norms.get(name))
            ctx.progress("round", step, len(plan.layers))
        self._range(student, flow, model, task, ctx)
        return student

    def _make_room(self, flow: Flow, model: nn.Module, inputs: Mapping[str, Moments], target: Target) -> None:
        """Give a bias of 0 to layers whose mean is to be corrected and that have no place for it, so that a budget counts it."""
        norms = own_norms(model, flow)
        for name, layer in flow.layers.items():
            module = model.get_submodule(name)
            if name not in norms and name not in target.keep and module.bias is None and inputs[name].known:
                rows = by_outputs(module.weight, layer)
                shift_output(model, layer, rows.new_zeros(rows.shape[0]), None)

    def _spec(self, layer: Layer, bits: int) -> QSpec:
        return QSpec(bits, self.symmetric, layer.out_axis if self.per_channel else None)

    def _widths(self, flow: Flow, model: nn.Module, target: Target, inputs: Mapping[str, Moments]) -> dict[str, int] | None:
        if not is_mixed(target):
            return None
        lost = distortions(flow, model, allowed(flow, target), moments_energy(flow, inputs), self._spec)
        return mixed_widths(flow, model, target, lost, self._spec)

    def _range(self, student: nn.Module, flow: Flow, model: nn.Module, task: Task, ctx: Ctx) -> None:
        """Every activation range: in closed form where moments are known, from pictures where not."""
        points = quantizers(student)
        nodes = {point: point_nodes(flow, point) for point in points}
        moments = source_moments(flow, model, (index for found in nodes.values() for index in found))
        ends = _Ends(flow, model, moments, task.limits, self.sigmas)
        blind = [point for point, found in nodes.items() if not found or not all(map(ends.known, found))]
        if blind:
            ctx.note(f"activation ranges from procedural pictures, as batch norms do not tell them: {', '.join(blind)}")
            calibrate(student, flow, task, Prior("mix", task, ctx.generator), "minmax")
        for point in set(points).difference(blind):
            low, high = _widest([follow(flow, index, ends.source, ends.join) for index in nodes[point]])
            points[point].set(*from_range(torch.tensor(low, device=ctx.device), torch.tensor(high, device=ctx.device), points[point].spec))


Ends = tuple[float, float]


@dataclass(frozen=True)
class _Ends:
    """Smallest and largest value of nodes."""

    flow: Flow
    model: nn.Module
    moments: Mapping[int, Moments]
    pixels: Ends
    sigmas: float

    def known(self, index: int) -> bool:
        found = sources(self.flow, index)
        return all(each in self.moments or self.flow.nodes[each].op == "input" for each in found)

    def source(self, node: Node) -> Ends:
        if node.op == "input":
            return self.pixels
        mean, reach = self.moments[node.index].mean, self.sigmas * self.moments[node.index].var.sqrt()
        return float((mean - reach).min()), float((mean + reach).max())

    def join(self, node: Node, found: list[Ends]) -> Ends:
        return self._activated(node, _widest(found)) if node.op in ACTIVATIONS else _widest(found)

    def _activated(self, node: Node, before: Ends) -> Ends:
        """From a grid over what comes before; each parameter of an activation function meets all of it."""
        like = next(each for each in self.model.parameters() if each.is_floating_point())
        values = torch.linspace(*before, _GRID, dtype=like.dtype, device=like.device)[:, None]
        after = activate(self.model, node, values.expand(-1, *(self.flow.nodes[node.inputs[0]].shape[1:2] or (1,))))
        return float(after.min()), float(after.max())


def _widest(found: list[Ends]) -> Ends:
    return min(low for low, _ in found), max(high for _, high in found)
