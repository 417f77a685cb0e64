"""Per-channel corrections put where they cost nothing: into the batch norm behind a layer, or its scale and bias."""

import torch
from torch import Tensor, nn

from datafree.graph.flow import Flow, Layer
from datafree.graph.fold import BatchNorm, foldable, norm_vectors
from datafree.quant.insert import assign, codes_of, weight_quantizer


def own_norms(student: nn.Module, flow: Flow) -> dict[str, BatchNorm]:
    """The batch norms of ``student`` that serve one layer alone, by the name of that layer."""
    found = {layer.name: student.get_submodule(layer.norm) for layer in foldable(flow) if layer.norm}
    return {name: norm for name, norm in found.items() if isinstance(norm, BatchNorm)}


def shift_output(student: nn.Module, layer: Layer, shift: Tensor, norm: BatchNorm | None) -> None:
    """Take ``shift``, (out,), off what the layer puts out. ``norm``: the batch norm that is its own, if it has one."""
    with torch.no_grad():
        if norm is not None:
            norm.running_mean = norm_vectors(norm).mu + shift
        else:
            _set_bias(student.get_submodule(layer.name), -shift)


def set_statistics(norm: BatchNorm, mu: Tensor, sigma: Tensor) -> None:
    """Make the batch norm subtract ``mu`` and divide by ``sigma`` > 0, each (channels,).

    Where sigma^2 is under its eps, which the stored variance cannot express, the rest goes into gamma.
    """
    before = norm_vectors(norm)
    var = (sigma.square() - norm.eps).clamp(min=0)
    reached = torch.sqrt(var + norm.eps)
    norm.running_mean, norm.running_var = mu.clone(), var
    _set_affine(norm, before.gamma * reached / sigma, before.beta)


def scale_norm(norm: BatchNorm, factor: Tensor) -> None:
    """Multiply what the batch norm puts out by ``factor``, (channels,)."""
    vectors = norm_vectors(norm)
    _set_affine(norm, vectors.gamma * factor, vectors.beta * factor)


def scale_layer(student: nn.Module, layer: Layer, factor: Tensor) -> None:
    """Multiply what a layer with a scale for each output puts out by ``factor`` > 0, (out,): its scale and bias. The codes stay."""
    module = student.get_submodule(layer.name)
    quantizer = weight_quantizer(module)
    assign(module, codes_of(module), quantizer.scale * factor, quantizer.zero)
    if isinstance(module.bias, Tensor):
        with torch.no_grad():
            module.bias.mul_(factor)


def _set_bias(module: nn.Module, change: Tensor) -> None:
    bias = module.bias
    module.bias = nn.Parameter(change.clone() if bias is None else bias.detach() + change, requires_grad=False)  # type: ignore[operator]


def _set_affine(norm: BatchNorm, gamma: Tensor, beta: Tensor) -> None:
    norm.weight = nn.Parameter(gamma.clone(), requires_grad=False)
    norm.bias = nn.Parameter(beta.clone(), requires_grad=False)
    norm.affine = True
