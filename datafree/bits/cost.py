"""What a network takes in bytes, before and after quantization.

The counting rule, per module:

- a quantized weight: ceil(n * bits / 8) for its n codes, 4 for each scale, 4 for each zero point of an asymmetric grid;
- a quantized activation: 4 for each scale, 4 for each zero point of an asymmetric grid;
- a batch norm: 8 a channel (scale and shift in float32), as if folded, whatever it stores;
- biases and everything else in the state dict: its true bytes; a tensor that several modules share counts once.

A saved file is larger by a header and, as it keeps batch norms bit for bit, by 8 bytes for each of their channels.
"""

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from datafree.errors import NetworkError
from datafree.plan import Plan, QSpec
from datafree.quant.freeze import own_tensors
from datafree.quant.grid import has_zero_points
from datafree.quant.insert import LAYERS, find_module, is_quantized, latent_weight, plan_of, quantized_layers, quantizers
from datafree.quant.quantizer import Quantizer

_FLOAT = 4


def packed_bytes(student: nn.Module) -> int:
    """Bytes of the quantized network by the rule above."""
    return sum(packed_bytes_table(student).values())


def packed_bytes_table(student: nn.Module) -> dict[str, int]:
    """Bytes of each module that holds something, by name and without its children."""
    return _table(student, plan_of(student))


def plan_bytes(model: nn.Module, plan: Plan) -> int:
    """What :func:`packed_bytes` will give once ``plan`` has been inserted into the float network ``model``.

    Raises TargetError on names that the network does not have, NetworkError on activations with a scale for each channel: how many
    those are is known only once they have been observed.
    """
    return sum(_table(model, plan).values())


def float_bytes(model: nn.Module) -> int:
    """Bytes of the network in float32 by the same rule, also for a student or a network in half precision."""
    total, seen = 0, set[int]()
    for module in model.modules():
        if isinstance(module, Quantizer):
            continue
        if isinstance(module, _BatchNorm):
            total += _norm_bytes(module)
            continue
        for value in own_tensors(module).values():
            if id(value) not in seen:
                seen.add(id(value))
                total += value.numel() * (_FLOAT if value.is_floating_point() else value.element_size())
    return total


def _table(model: nn.Module, plan: Plan) -> dict[str, int]:
    first_name = {id(module): name for name, module in model.named_modules()}
    specs = {id(find_module(model, name)): layer.weight for name, layer in plan.layers.items()}
    counted = {id(latent_weight(layer)) for layer in quantized_layers(model).values()}
    table = dict.fromkeys(first_name.values(), 0)
    for name, module in model.named_modules():
        if isinstance(module, Quantizer):
            continue
        if isinstance(module, _BatchNorm):
            table[name] += _norm_bytes(module)
            continue
        spec = specs.get(id(module))
        if spec is not None:
            table[name] += _weight_bytes(name, module, spec)
        for key, value in own_tensors(module).items():
            if id(value) not in counted and not (spec is not None and key == "weight"):
                counted.add(id(value))
                table[name] += value.numel() * value.element_size()
    for point, point_spec in plan.activations.items():
        table[first_name[id(find_module(model, point.rpartition(":")[0]))]] += _point_bytes(model, point, point_spec)
    return {name: size for name, size in table.items() if size}


def _weight_bytes(name: str, layer: nn.Module, spec: QSpec) -> int:
    if not isinstance(layer, LAYERS):
        raise NetworkError(f"{name} is a {type(layer).__name__}, which is no conv or linear layer: take it out of the plan")
    # not layer.weight of a student: that would quantize it anew
    weight: Tensor = latent_weight(layer) if is_quantized(layer) else layer.weight
    scales = 1 if spec.axis is None else weight.shape[spec.axis]
    return (weight.numel() * spec.bits + 7) // 8 + scales * _range_bytes(spec)


def _point_bytes(model: nn.Module, point: str, spec: QSpec) -> int:
    if spec.axis is None:
        return _range_bytes(spec)
    quantizer = quantizers(model).get(point)
    if quantizer is None or not quantizer.ready:
        raise NetworkError(f"{point} has a scale for each slice of axis {spec.axis}, how many is not known yet: insert and observe first")
    return quantizer.scale.numel() * _range_bytes(spec)


def _range_bytes(spec: QSpec) -> int:
    """One scale, and its zero point where there is one."""
    return 2 * _FLOAT if has_zero_points(spec) else _FLOAT


def _norm_bytes(norm: _BatchNorm) -> int:
    return 2 * _FLOAT * norm.num_features
