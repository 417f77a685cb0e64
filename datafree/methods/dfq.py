"""DFQ: equalize, absorb, round, correct (Nagel et al., ICCV 2019, arXiv 1906.04721).

Legend: beta, gamma mean and standard deviation of a channel behind its batch norm; s, c see ``closed.equalize``.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from datafree.bits.allocate import make_plan
from datafree.bits.search import allowed, is_mixed, mixed_widths
from datafree.bits.sensitivity import distortions
from datafree.closed.absorb import own_norms, shift_output
from datafree.closed.correct import output_shift
from datafree.closed.equalize import absorb_biases, equalize_layers, fold_weights
from datafree.closed.moments import Moments
from datafree.closed.propagate import layer_inputs, node_moments
from datafree.context import Ctx
from datafree.graph.flow import ACTIVATIONS, POOLS, Flow, Layer, read
from datafree.graph.fold import by_outputs
from datafree.graph.tape import Name, Node, Ref, repeat
from datafree.method import Method, method, option
from datafree.plan import QSpec, Target
from datafree.quant.insert import effective_weight, insert, latent_weight, quantizers
from datafree.quant.observe import observe_noise
from datafree.quant.ranges import from_range
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
    ``closed.equalize``). Where no batch norm tells the moments, ranges come from noise.
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
        widths = sorted({bits for each in allowed(flow, target).values() for bits in each})
        lost = distortions(flow, model, inputs, widths, weight_spec=self._spec)
        return mixed_widths(flow, model, target, lost, self._spec)

    def _range(self, student: nn.Module, flow: Flow, model: nn.Module, task: Task, ctx: Ctx) -> None:
        """Every activation range: in closed form where moments are known, from noise where not."""
        points = quantizers(student)
        nodes = {point: _nodes(flow, point) for point in points}
        roots = {root for found in nodes.values() for index in found for root in _roots(flow, index)}
        moments = node_moments(flow, model, roots)
        bounds = {point: [_bounds(flow, model, moments, task, index, self.sigmas) for index in found] for point, found in nodes.items()}
        blind = [point for point, found in bounds.items() if not found or None in found]
        if blind:
            ctx.note(f"activation ranges from noise, as batch norms do not tell them: {', '.join(blind)}")
            observe_noise(student, task, "minmax", ctx)
        for point, found in bounds.items():
            if point not in blind:
                known = torch.tensor([each for each in found if each is not None], device=ctx.device)
                points[point].set(*from_range(known[:, 0].amin(), known[:, 1].amax(), points[point].spec))


def _nodes(flow: Flow, point: str) -> list[int]:
    """The nodes that pass a point, one a call; empty where the tape does not tell."""
    name, _, side = point.rpartition(":")
    found = [call.input if side == "input" else call.output for call in flow.calls_of.get(name, ())]
    known = [index for index in found if index is not None]
    return known if len(known) == len(found) else []


def _passes(node: Node) -> bool:
    """Whether the range of ``node`` follows from those of its inputs."""
    return node.op == "cat" or len(node.inputs) == 1 and node.call is not None and node.op in ACTIVATIONS | POOLS


def _roots(flow: Flow, index: int) -> set[int]:
    """The nodes whose moments tell the range of ``index``: norms, sums and layers, before activations and pooling."""
    node = flow.nodes[flow.origin(index)]
    if _passes(node):
        return {root for each in node.inputs for root in _roots(flow, each)}
    return {node.index} if node.shape and node.op != "input" else set()


def _bounds(
    flow: Flow, model: nn.Module, moments: Mapping[int, Moments], task: Task, index: int, sigmas: float
) -> tuple[float, float] | None:
    """Smallest and largest value of a node; None where nothing tells."""
    node = flow.nodes[flow.origin(index)]
    if node.op == "input":
        return _pixels(task)
    if _passes(node):
        found = [_bounds(flow, model, moments, task, each, sigmas) for each in node.inputs]
        known = [each for each in found if each is not None]
        if len(known) < len(found):
            return None
        bounds = min(low for low, _ in known), max(high for _, high in known)
        return _activated(model, node, flow.nodes[node.inputs[0]], bounds) if node.op in ACTIVATIONS else bounds
    if node.index not in moments or not moments[node.index].known:
        return None
    mean, reach = moments[node.index].mean, sigmas * moments[node.index].var.sqrt()
    return float((mean - reach).min()), float((mean + reach).max())


def _pixels(task: Task) -> tuple[float, float] | None:
    """What the task makes of pixels in [0, 1]; None where it does not normalise and may not be about pixels at all."""
    if task.mean == (0.0,) and task.std == (1.0,):
        return None
    ends = [(pixel - mean) / std for pixel in (0.0, 1.0) for mean, std in zip(_each(task.mean, task), _each(task.std, task), strict=True)]
    return min(ends), max(ends)


def _each(values: tuple[float, ...], task: Task) -> tuple[float, ...]:
    return values * task.shape[0] if len(values) == 1 else values


@torch.no_grad()
def _activated(model: nn.Module, node: Node, before: Node, bounds: tuple[float, float]) -> tuple[float, float]:
    """The range behind an activation function, from a grid over the one before it; per-channel parameters are those of axis 1."""
    assert node.call is not None
    like = next(each for each in model.parameters() if each.is_floating_point())
    channels = before.shape[1:2] + (1,) * (len(before.shape) - 2)
    values = torch.linspace(*bounds, _GRID, dtype=like.dtype, device=like.device).view(-1, *(1,) * len(channels)).expand(-1, *channels)

    def resolve(symbol: object) -> object:
        if isinstance(symbol, Name):
            path, _, name = symbol.name.rpartition(".")
            return getattr(model.get_submodule(path), name)
        return values.clone() if isinstance(symbol, Ref) else symbol

    result = repeat(node.call, resolve)
    assert isinstance(result, Tensor)
    return float(result.min()), float(result.max())
