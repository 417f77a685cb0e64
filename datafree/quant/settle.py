"""Biases on the grid of a runtime's int32 accumulator, so that the student computes what its integers will.

A runtime adds the bias before it rounds: as an integer, in steps of the input's scale times the weight's, batch norm folded. A bias
between two steps moves one code in some hundred at 4 bits, and those grow from layer to layer.
"""

import torch
from torch import Tensor, nn

from datafree.graph.flow import MOVES, Flow, Layer
from datafree.graph.fold import by_outputs, foldable, norm_vectors
from datafree.quant.insert import effective_weight, is_quantized, quantizers, weight_quantizer
from datafree.quant.precision import float64
from datafree.quant.quantizer import Quantizer

_LARGEST = 2**31 - 1


def input_quantizers(flow: Flow, student: nn.Module) -> dict[str, Quantizer]:
    """The quantizer that each layer's input has gone through last, by layer; absent where the input is float or differs between calls."""
    at_node: dict[int, Quantizer] = {}
    found: dict[str, Quantizer] = {}
    for point, quantizer in quantizers(student).items():
        name, _, side = point.rpartition(":")
        if name in flow.layers and side == "input":
            found[name] = quantizer
            continue
        for call in flow.calls_of.get(name, ()):
            node = call.input if side == "input" else call.output
            if node is not None:
                at_node[node] = quantizer
    for name in flow.layers:
        behind = [_behind(flow, index, at_node) for index in flow.data(name)]
        if name not in found and behind[0] is not None and all(each is behind[0] for each in behind):
            found[name] = behind[0]
    return found


def _behind(flow: Flow, index: int, at_node: dict[int, Quantizer]) -> Quantizer | None:
    while index not in at_node:
        if flow.nodes[index].op not in MOVES or len(flow.nodes[index].inputs) != 1:
            return None
        index = flow.nodes[index].inputs[0]
    return at_node[index]


@torch.no_grad()
def settle(student: nn.Module, flow: Flow) -> None:
    """Round the biases of layers whose input and weight are quantized, in place: of the layer, or of the norm that is its own."""
    inputs = input_quantizers(flow, student)
    own = {layer.name for layer in foldable(flow)}
    for name, layer in flow.layers.items():
        module = student.get_submodule(name)
        if name not in inputs or not is_quantized(module) or inputs[name].spec.axis is not None:
            continue
        step = inputs[name].scale * _scales(module, layer)
        dead = (by_outputs(effective_weight(module), layer) == 0).flatten(1).all(dim=1)
        if name in own:
            _settle_norm(module, student.get_submodule(str(layer.norm)), step, dead)
        elif layer.norm is None and isinstance(module.bias, Tensor):
            module.bias += _rounding(module.bias, _alive(step, dead))


def _scales(module: nn.Module, layer: Layer) -> Tensor:
    """The weight's scale for each output channel, (out,), or () for all."""
    scale = weight_quantizer(module).scale
    return scale.repeat(layer.groups) if scale.dim() and layer.kind == "conv_transpose" else scale


def _alive(step: Tensor, dead: Tensor) -> Tensor:
    """Channels of zeros take the largest step of the others, as in the file: theirs says nothing."""
    step = step.expand(dead.shape)
    return torch.where(dead, step[~dead].max() if not dead.all() else 0.0, step)


def _settle_norm(module: nn.Module, norm: nn.Module, step: Tensor, dead: Tensor) -> None:
    if not isinstance(norm.bias, Tensor):
        return
    vectors = norm_vectors(norm)
    factor = vectors.gamma / vectors.sigma
    bias = module.bias if isinstance(module.bias, Tensor) else 0.0
    norm.bias += _rounding(vectors.beta + factor * (bias - vectors.mu), _alive(step * factor.abs(), dead | (factor == 0)))


def _rounding(bias: Tensor, step: Tensor) -> Tensor:
    """What takes ``bias`` to the next multiple of ``step``; 0 where a step is 0, or so small that int32 does not hold the bias."""
    exact, unit = float64(bias), float64(step)
    steps = exact / unit
    held = torch.isfinite(steps) & (steps.abs() < _LARGEST)
    return torch.where(held, steps.round() * unit - exact, 0.0).to(bias)
