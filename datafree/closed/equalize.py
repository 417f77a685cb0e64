"""Cross-layer equalization and absorption of high biases: the function stays, its weights become easier to quantize.

Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, arXiv 1906.04721, sections 4.1 and 4.3.
``f(s x) = s f(x)`` for s > 0 where f is ReLU, leaky ReLU or PReLU, so a factor for each channel can move from one layer into the next.

Reconstructed: only the first page of the paper could be read; the formulas are those of its public implementations.

Legend: r the largest |w| of a channel, s the factor that divides the outputs of one layer and multiplies the inputs of the
next, c what is taken off a channel's bias.
"""

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from datafree.closed.absorb import own_norms, shift_output
from datafree.closed.moments import mean_form
from datafree.graph.flow import Flow, Layer
from datafree.graph.fold import BatchNorm, along_outputs, by_outputs, fold_batch_norm, foldable, norm_vectors
from datafree.graph.tape import Node
from datafree.quant.precision import float64

RECTIFIED = frozenset(("relu", "leaky_relu", "prelu", "relu6"))
SWEEPS = 300  # to convergence, at most
_SETTLED = 1e-4  # natural logarithm of the largest factor of a sweep that changes nothing any more
_LARGEST = 1e8  # of a factor
_CAP = 6.0  # of ReLU6
_TAIL = 4.0  # standard deviations above the mean that a channel may reach under the cap
_SPREAD = 3.0  # standard deviations below the mean: 99.87 % of the values lie above
_POOLED = frozenset("avg_pool adaptive_avg_pool mean max_pool adaptive_max_pool pad".split())
_FLATTENED = frozenset("view reshape flatten squeeze".split())
_SAME = frozenset("dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout contiguous clone detach".split())


@dataclass(frozen=True)
class Edge:
    """Two layers between which a positive factor for each channel can move.

    Args:
        first: the layer whose output channels are divided.
        second: the only layer that sees them.
        activations: what stands between, other than pooling and rearranging; ``relu6`` lets factors pass only below its cap.
    """

    first: str
    second: str
    activations: tuple[str, ...]

    @property
    def capped(self) -> bool:
        """Whether a ReLU6 stands between."""
        return "relu6" in self.activations


def edges(flow: Flow) -> tuple[Edge, ...]:
    """All edges in execution order.

    Not between layers that are called twice, that a branch, sum, concat or another activation parts, whose batch norm is shared, or
    that are grouped but not depthwise.
    """
    own = frozenset(layer.name for layer in foldable(flow))
    found = (_edge(flow, layer, own) for layer in flow.layers.values())
    return tuple(edge for edge in found if edge is not None)


def fold_weights(teacher: nn.Module, flow: Flow) -> nn.Module:
    """A copy of ``teacher`` with every foldable batch norm folded into weights; the norms stay, and only shift.

    What a norm has left to say is the moments of its output: its bias is their mean, and its weight, equal to
    sqrt(running_var + eps), their standard deviation. So all that reads moments from norms goes on working, names and
    modules are the teacher's, and a bias costs what a folded norm costs. Layers without a norm of their own are left alone.
    """
    folded, model = fold_batch_norm(teacher, flow), copy.deepcopy(teacher)
    with torch.no_grad():
        for name, norm in own_norms(model, flow).items():
            source, module = folded.get_submodule(name), model.get_submodule(name)
            weight, bias, var = source.weight, source.bias, norm.running_var
            assert isinstance(weight, Tensor) and isinstance(bias, Tensor) and isinstance(var, Tensor)
            vectors = norm_vectors(norm)
            module.weight = _parameter(weight.clone())
            if isinstance(module.bias, Tensor):
                module.bias = _parameter(torch.zeros_like(module.bias))
            _only_shift(norm, vectors.beta, (vectors.gamma / vectors.sigma).square() * var, vectors.beta - bias)
    return model


@torch.no_grad()
def equalize_layers(model: nn.Module, flow: Flow, relu6_to_relu: bool = False, to_convergence: bool = False) -> dict[Edge, Tensor]:
    """Give both sides of every edge of ``model`` (from :func:`fold_weights`, changed in place) the same range channel by channel.

    Pairs take s = sqrt(r1 / r2); conv, depthwise, conv take s12 = r1 / (r1 r2 r3)^(1/3) and s23 = (r1 r2 r3)^(1/3) / r3, as aimet does.
    A channel in which some r is 0 keeps its weights. Moments in the norms are scaled along. One sweep over the network, or several.

    Differs: ReLU6 stays in place. Channels that its cap touches keep their scale, the others must not grow into it, so the
    function stays. With ``relu6_to_relu``, as in the paper, all are equalized, and share a factor that lets no channel be
    capped below the 6 it had: most are then not capped at all, and networks that need the cap suffer.

    Returns the factors s of each edge, (channels,).
    """
    norms = own_norms(model, flow)
    found = [edge for edge in edges(flow) if relu6_to_relu or not edge.capped or edge.first in norms]
    total: dict[Edge, Tensor] = {}
    for _ in range(SWEEPS if to_convergence else 1):
        largest = 0.0
        for group in _groups(found, flow):
            for edge, factor in zip(group, _factors(model, flow, group), strict=True):
                before, norm = total.get(edge, torch.ones_like(factor)), norms.get(edge.first)
                if edge.capped and relu6_to_relu:
                    factor = factor / (before * factor).min()
                elif edge.capped and norm is not None:
                    factor = _under_cap(factor, before, norm)
                _rescale(model, flow, edge, factor, norm)
                total[edge] = before * factor
                largest = max(largest, float(factor.log().abs().max()))
        if largest < _SETTLED:
            break
    return total


@torch.no_grad()
def absorb_biases(model: nn.Module, flow: Flow, relu6_to_relu: bool = False) -> dict[Edge, Tensor]:
    """Move what is constant in channels of ``model`` (from :func:`fold_weights`, changed in place) into the next layer's bias.

    Behind a rectifier c = max(0, beta - 3 gamma), else beta: aimet's rule. Exact wherever the channel exceeds c; the zeros with which
    the next layer pads its input are neglected, as in the paper. Left alone are layers without a batch norm of their own, those in
    front of a transposed convolution or of a layer without norm and bias, and, unless ``relu6_to_relu``, channels that a ReLU6 caps.
    Returns c of each edge, (channels,).
    """
    norms = own_norms(model, flow)
    found = {}
    for edge in edges(flow):
        second = flow.layers[edge.second]
        biased = edge.second in norms or model.get_submodule(edge.second).bias is not None
        if edge.first not in norms or second.kind == "conv_transpose" or not biased:
            continue
        norm = norms[edge.first]
        moments = norm_vectors(norm)
        sd = _var(norm).sqrt()
        c = (moments.beta - _SPREAD * sd).clamp(min=0) if edge.activations else moments.beta
        if edge.capped and not relu6_to_relu:
            c = torch.where(_reach(norm) > _CAP, 0.0, c)
        _only_shift(norm, moments.beta - c, _var(norm), moments.mu)
        weight = by_outputs(_weight(model, edge.second), second)
        spread = c.repeat_interleave(_inputs(second) // c.numel())
        shift_output(model, second, -mean_form(weight, spread, second.groups), norms.get(edge.second))
        found[edge] = c
    return found


def _edge(flow: Flow, layer: Layer, own: frozenset[str]) -> Edge | None:
    if not _fits(layer):
        return None
    index = layer.calls[0]
    activations: list[str] = []
    batched = len(layer.kernel) + 2
    tokens = layer.kind == "linear" and len(flow.nodes[index].shape) > batched  # channels are on the last axis
    if not tokens and len(flow.nodes[index].shape) != batched:
        return None
    while len(flow.consumers[index]) == 1 and index not in flow.outputs:
        before, node = flow.nodes[index], flow.nodes[flow.consumers[index][0]]
        if node.index in flow.layer_at:
            second = flow.layers[flow.layer_at[node.index]]
            fitting = _fits(second) and _takes(second, before.shape, tokens) and node.inputs == (index,)
            return Edge(layer.name, second.name, tuple(activations)) if fitting and _inputs(second) % _outputs(layer) == 0 else None
        activation = _activation(node)
        if len(node.inputs) != 1 or not (activation in RECTIFIED or _passes(before, node, tokens) or _is_own(node, layer, own, index)):
            return None
        if activation in RECTIFIED:
            activations.append(activation)
        index = node.index
    return None


def _activation(node: Node) -> str:
    """The operation, under the name relu6 where it clips to 0 and 6: ``nn.ReLU6`` is a hard tanh."""
    bounds = [_argument(node, place, name) for place, name in ((1, "min_val"), (2, "max_val"))]
    return "relu6" if node.op == "hardtanh" and bounds == [0, _CAP] else node.op


def _fits(layer: Layer) -> bool:
    return len(layer.calls) == 1 and (layer.groups == 1 or layer.depthwise)


def _takes(second: Layer, shape: tuple[int, ...], tokens: bool) -> bool:
    """Whether the channels are where ``second`` looks for its inputs."""
    return second.kind == "linear" if tokens else len(shape) == len(second.kernel) + 2


def _is_own(node: Node, layer: Layer, own: frozenset[str], index: int) -> bool:
    return node.op == "batch_norm" and node.module == layer.norm and layer.name in own and index == layer.calls[0]


def _passes(before: Node, node: Node, tokens: bool) -> bool:
    """Whether every channel goes through ``node`` on its own and in its place, and twice the input gives twice the output."""
    kept = node.shape[:2] == before.shape[:2]
    if node.op in _SAME:
        return node.shape == before.shape
    if tokens or len(before.shape) < 2:
        return False
    if node.op in _POOLED:
        return kept and (node.op != "mean" or _over_positions(node, len(before.shape))) and (node.op != "pad" or _pads_zeros(node))
    flat = (before.shape[0], math.prod(before.shape[1:]))
    return node.op in _FLATTENED and (kept or node.shape == flat)


def _over_positions(node: Node, dims: int) -> bool:
    """Whether a mean leaves batch and channels alone."""
    axes = _argument(node, 1, "dim")
    listed = (axes,) if isinstance(axes, int) else axes
    return isinstance(listed, (tuple, list)) and all(isinstance(axis, int) and axis % dims >= 2 for axis in listed)


def _pads_zeros(node: Node) -> bool:
    return _argument(node, 2, "mode") not in (None, "constant") or _argument(node, 3, "value") in (None, 0)


def _argument(node: Node, place: int, name: str) -> object:
    if node.call is None:
        return None
    return node.call.args[place] if place < len(node.call.args) else node.call.kwargs.get(name)


def _groups(found: Iterable[Edge], flow: Flow) -> list[tuple[Edge, ...]]:
    """Edges to be solved together: two where the middle layer is depthwise with as many outputs as inputs, else one."""
    left = {edge.first: edge for edge in found}
    groups: list[tuple[Edge, ...]] = []
    for name in list(left):
        if name in left:
            edge = left.pop(name)
            middle = flow.layers[edge.second]
            triple = middle.depthwise and _outputs(middle) == _inputs(middle) and edge.second in left
            groups.append((edge, left.pop(edge.second)) if triple else (edge,))
    return groups


def _factors(model: nn.Module, flow: Flow, group: tuple[Edge, ...]) -> list[Tensor]:
    """s of each edge of the group: the first brings its layer's range r1 to the geometric mean m, the last takes m to its r."""
    first, last = group[0], group[-1]
    start, end = _output_ranges(model, flow.layers[first.first]), _input_ranges(model, flow.layers[last.second])
    ranges = [start, *(_output_ranges(model, flow.layers[edge.second]) for edge in group[:-1])]
    end = end.view(ranges[-1].numel(), -1).amax(1)
    product = torch.stack([*ranges, end]).log().mean(0)  # of logarithms, so that nothing underflows
    mean = product.exp()
    factors = [start / mean] if len(group) == 1 else [start / mean, mean / end]
    sound = torch.isfinite(product)
    return [torch.where(sound, each, 1.0).clamp(1 / _LARGEST, _LARGEST).to(_weight(model, first.first)) for each in factors]


def _under_cap(factor: Tensor, before: Tensor, norm: BatchNorm) -> Tensor:
    """``factor`` for channels behind a ReLU6 that have been divided by ``before`` already: what its cap touches stays."""
    reach = _reach(norm)
    touched = reach * before > _CAP
    if touched.any():  # those that move share a factor, too, so that they end up where those that must not move are
        factor = factor / factor[touched].median()
    return torch.where(touched, 1.0, torch.maximum(factor, reach / _CAP))


def _rescale(model: nn.Module, flow: Flow, edge: Edge, factor: Tensor, norm: BatchNorm | None) -> None:
    """Divide the outputs of the first layer and its norm by ``factor``, (channels,), and multiply the inputs of the second."""
    first, second = flow.layers[edge.first], flow.layers[edge.second]
    module, following = model.get_submodule(first.name), model.get_submodule(second.name)
    module.weight = _parameter(_weight(model, first.name) / along_outputs(factor, first))
    if isinstance(module.bias, Tensor):
        module.bias = _parameter(module.bias.detach() / factor)
    if norm is not None:
        moments = norm_vectors(norm)
        _only_shift(norm, moments.beta / factor, _var(norm) / factor.square(), moments.mu / factor)
    spread = factor.repeat_interleave(_inputs(second) // factor.numel())
    following.weight = _parameter(_weight(model, second.name) * _along_inputs(spread, second))


def _along_inputs(values: Tensor, layer: Layer) -> Tensor:
    """Per-input-channel ``values``, (in,), shaped to multiply the weight of a depthwise or ungrouped layer."""
    if layer.kind == "conv" and layer.depthwise:
        return along_outputs(values.repeat_interleave(_outputs(layer) // values.numel()), layer)
    axis = 0 if layer.kind == "conv_transpose" else 1
    return values.view(*(-1 if each == axis else 1 for each in range(len(layer.weight_shape))))


def _output_ranges(model: nn.Module, layer: Layer) -> Tensor:
    return float64(by_outputs(_weight(model, layer.name), layer)).abs().flatten(1).amax(1)


def _input_ranges(model: nn.Module, layer: Layer) -> Tensor:
    weight = float64(_weight(model, layer.name)).abs()
    if layer.kind == "conv" and layer.depthwise:
        return weight.view(layer.groups, -1).amax(1)
    return (weight if layer.kind == "conv_transpose" else weight.transpose(0, 1)).flatten(1).amax(1)


def _inputs(layer: Layer) -> int:
    return layer.weight_shape[0] if layer.kind == "conv_transpose" else layer.weight_shape[1] * layer.groups


def _outputs(layer: Layer) -> int:
    return layer.weight_shape[1] * layer.groups if layer.kind == "conv_transpose" else layer.weight_shape[0]


def _weight(model: nn.Module, name: str) -> Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _var(norm: BatchNorm) -> Tensor:
    """Variance of what a norm that only shifts puts out."""
    assert isinstance(norm.running_var, Tensor)
    return norm.running_var


def _reach(norm: BatchNorm) -> Tensor:
    """How far up the values of each channel go, but for one in thirty thousand."""
    return norm_vectors(norm).beta + _TAIL * _var(norm).sqrt()


def _only_shift(norm: BatchNorm, beta: Tensor, var: Tensor, mu: Tensor) -> None:
    """Make ``norm`` add beta - mu, and say that its output has mean beta and variance ``var``."""
    norm.running_mean, norm.running_var = mu.clone(), var.clone()
    norm.weight, norm.bias = _parameter(torch.sqrt(var + norm.eps)), _parameter(beta.clone())
    norm.affine = True


def _parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
