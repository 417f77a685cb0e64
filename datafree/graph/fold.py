"""Batch norm folded into the layer before it: y = gamma (W x + b - mu) / sigma + beta is one affine map."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from datafree.errors import NetworkError
from datafree.graph.flow import Flow, Layer
from datafree.graph.swap import replace

BatchNorm = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class Norm:
    """The four vectors of a batch norm, (channels,) each; ``sigma`` is sqrt(running_var + eps)."""

    gamma: Tensor
    beta: Tensor
    mu: Tensor
    sigma: Tensor


def norm_vectors(norm: nn.Module) -> Norm:
    """Read a batch norm. A missing affine part is gamma = 1, beta = 0. Raises NetworkError without stored statistics."""
    mean, var = norm.running_mean, norm.running_var
    if not isinstance(mean, Tensor) or not isinstance(var, Tensor):
        raise NetworkError(f"{norm} has no stored statistics (track_running_stats=False): nothing is known about its data")
    gamma = norm.weight.detach() if isinstance(norm.weight, Tensor) else torch.ones_like(mean)
    beta = norm.bias.detach() if isinstance(norm.bias, Tensor) else torch.zeros_like(mean)
    return Norm(gamma, beta, mean, torch.sqrt(var + float(norm.eps)))  # type: ignore[arg-type]


def foldable(flow: Flow) -> tuple[Layer, ...]:
    """Layers whose batch norm belongs to them alone."""
    served: dict[str, int] = {}
    for node in flow.nodes:
        if node.op == "batch_norm":
            served[node.module] = served.get(node.module, 0) + 1
    return tuple(layer for layer in flow.layers.values() if layer.norm and served[layer.norm] == len(layer.calls))


def fold_batch_norm(model: nn.Module, flow: Flow) -> nn.Module:
    """A copy of ``model`` in which every foldable batch norm has become an identity; in eval mode it computes the same function.

    Layers gain a bias where they had none. A batch norm that serves several layers, or follows none, stays.
    """
    folded = copy.deepcopy(model)
    with torch.no_grad():
        for layer in foldable(flow):
            assert layer.norm is not None
            module, norm = folded.get_submodule(layer.name), folded.get_submodule(layer.norm)
            vectors = norm_vectors(norm)
            factor = vectors.gamma / vectors.sigma
            bias = module.bias if isinstance(module.bias, Tensor) else torch.zeros_like(vectors.mu)
            weight = module.weight
            assert isinstance(weight, nn.Parameter)
            module.weight = nn.Parameter(weight * along_outputs(factor, layer), weight.requires_grad)  # its own, if it was tied
            module.bias = nn.Parameter(vectors.beta + factor * (bias - vectors.mu), requires_grad=weight.requires_grad)
            _neutralise(norm)
            if _is_plain(flow, layer.norm):
                replace(folded, layer.norm, nn.Identity())
    return folded


def _is_plain(flow: Flow, name: str) -> bool:
    """Whether the module does nothing but normalise: no activation in it, no hook behind it."""
    return all(flow.nodes[call.output].op == "batch_norm" for call in flow.calls_of[name] if call.output is not None)


def _neutralise(norm: nn.Module) -> None:
    """Make a batch norm hand its input on."""
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None
    norm.eps, zeros = 0.0, torch.zeros_like(norm.running_mean)
    norm.running_mean, norm.running_var = zeros, torch.ones_like(zeros)
    if norm.affine:
        norm.weight, norm.bias = nn.Parameter(torch.ones_like(zeros), False), nn.Parameter(zeros.clone(), False)


def along_outputs(values: Tensor, layer: Layer) -> Tensor:
    """Per-output-channel ``values``, (out,), shaped to multiply the weight of ``layer``."""
    if layer.kind != "conv_transpose":
        return values.view(-1, *(1 for _ in layer.weight_shape[1:]))
    inputs, outputs, *kernel = layer.weight_shape
    per_group = values.view(layer.groups, 1, outputs).expand(layer.groups, inputs // layer.groups, outputs)
    return per_group.reshape(inputs, outputs, *(1 for _ in kernel))


def by_outputs(weight: Tensor, layer: Layer) -> Tensor:
    """The weight as (out, in / groups, *kernel), whatever the kind of the layer; its rows are what one output sees."""
    if layer.kind != "conv_transpose":
        return weight
    inputs, outputs = weight.shape[:2]
    grouped = weight.view(layer.groups, inputs // layer.groups, outputs, *weight.shape[2:])
    return grouped.transpose(1, 2).reshape(layer.groups * outputs, inputs // layer.groups, *weight.shape[2:])


def from_outputs(rows: Tensor, layer: Layer) -> Tensor:
    """The inverse of :func:`by_outputs`."""
    if layer.kind != "conv_transpose":
        return rows
    inputs, outputs = layer.weight_shape[:2]
    grouped = rows.view(layer.groups, outputs, inputs // layer.groups, *rows.shape[2:])
    return grouped.transpose(1, 2).reshape(inputs, outputs, *rows.shape[2:])
