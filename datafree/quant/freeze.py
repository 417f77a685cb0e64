"""The student as integers: codes and ranges of its weights, and the same network without quantized weights to compute."""

import copy
from dataclasses import dataclass

from torch import Tensor, nn

from datafree.graph.plain import remove_parametrization
from datafree.plan import QSpec
from datafree.quant.insert import codes_of, latent_weight, quantized_layers, weight_quantizer
from datafree.quant.quantizer import Quantizer


@dataclass(frozen=True, eq=False)
class Frozen:
    """One quantized weight: value = scale * (codes - zero).

    Args:
        codes: int16, in the shape of the weight, within ``spec.levels``.
        scale: float32, (C,) along ``spec.axis``, or ().
        zero: like ``scale``.
        spec: the grid.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    spec: QSpec


def freeze(student: nn.Module) -> dict[str, Frozen]:
    """Codes and ranges of every quantized layer, by name."""
    return {name: _frozen(layer) for name, layer in quantized_layers(student).items()}


def materialise(student: nn.Module) -> nn.Module:
    """A copy whose weights are plain parameters that hold the quantized values; it computes the same to the last bit.

    Quantizers of activations stay. ``student`` is not changed.
    """
    plain = copy.deepcopy(student)
    for layer in quantized_layers(plain).values():
        remove_parametrization(layer, "weight")
    return plain


def float_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All that has to be stored besides quantized weights and quantizers: parameters and persistent buffers, each tensor once."""
    held = {id(latent_weight(layer)) for layer in quantized_layers(model).values()}
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, Quantizer):
            continue
        for key, value in own_tensors(module).items():
            if id(value) not in held:
                held.add(id(value))
                found[f"{name}.{key}" if name else key] = value
    return found


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and persistent buffers of ``module`` itself, without those of its children."""
    buffers = {key: value for key, value in module._buffers.items() if key not in module._non_persistent_buffers_set}
    return {key: value for key, value in {**module._parameters, **buffers}.items() if value is not None}


def _frozen(layer: nn.Module) -> Frozen:
    quantizer = weight_quantizer(layer)
    return Frozen(codes_of(layer), quantizer.scale.clone(), quantizer.zero.clone(), quantizer.spec)
