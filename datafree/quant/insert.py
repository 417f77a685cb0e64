"""Quantizers into a network and out of it again: the student is the teacher's own modules with quantizers hung in.

A weight is parametrized (``torch.nn.utils.parametrize``): ``layer.weight`` is the quantized weight, the latent float weight is the
only copy stored. A point of activations is a child module ``input_quantizer`` or ``output_quantizer`` and a forward hook.
"""

import copy
import difflib
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from datafree.errors import NetworkError, TargetError
from datafree.plan import LayerPlan, Plan, QSpec
from datafree.quant.grid import dequantize, quantize, row_blocks
from datafree.quant.quantizer import Quantizer
from datafree.quant.ranges import minmax

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_Side = Literal["input", "output"]


def insert(teacher: nn.Module, plan: Plan) -> nn.Module:
    """A deep copy of ``teacher`` with the quantizers of ``plan``: weights min-max ranged, activations without a range yet.

    Raises TargetError on names that the network does not have, NetworkError where a quantizer cannot be hung in.
    """
    student = copy.deepcopy(teacher)
    for name, layer_plan in plan.layers.items():
        _insert_weight(student, name, layer_plan.weight)
    points = {f"{name}:input": layer_plan.input for name, layer_plan in plan.layers.items() if layer_plan.input is not None}
    for point in points.keys() & plan.tensors.keys():
        raise TargetError(f"the plan quantizes {point} twice, for the layer and in Plan.tensors: leave one out")
    for point, spec in {**points, **plan.tensors}.items():
        _insert_point(student, point, spec)
    return student


def plan_of(student: nn.Module) -> Plan:
    """The plan that ``student`` carries out, read from its modules in the order of their registration.

    The input of a quantized layer is always told as ``LayerPlan.input``, other points in ``Plan.tensors``.
    """
    points = {point: quantizer.spec for point, quantizer in quantizers(student).items()}
    layers = {
        name: LayerPlan(weight_quantizer(layer).spec, points.pop(f"{name}:input", None))
        for name, layer in quantized_layers(student).items()
    }
    return Plan(layers, points)


def find_module(model: nn.Module, name: str) -> nn.Module:
    """The submodule called ``name``. Raises TargetError, naming the closest matches."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        known = [each for each, _ in model.named_modules(remove_duplicate=False) if each]
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else f"it has {', '.join(known[:5])} and so on"
        raise TargetError(f"the network has no module {name!r}: {hint}") from None


def quantized_layers(student: nn.Module) -> dict[str, nn.Module]:
    """The layers whose weights are quantized, by name; a shared layer once, under its first name."""
    return {name: module for name, module in student.named_modules() if is_quantized(module)}


def is_quantized(layer: nn.Module) -> bool:
    """Whether the layer's weight is quantized."""
    return _weight_chain(layer) is not None


def quantizers(student: nn.Module) -> dict[str, Quantizer]:
    """The quantizers of activations by point, ``"<module>:input"`` or ``"<module>:output"``."""
    found: dict[str, Quantizer] = {}
    for name, module in student.named_modules():
        for side in ("input", "output"):
            child = module._modules.get(f"{side}_quantizer")
            if isinstance(child, Quantizer):
                found[f"{name}:{side}"] = child
    return found


def weight_quantizer(layer: nn.Module) -> Quantizer:
    """The quantizer of the layer's weight. Raises NetworkError if the weight is not quantized."""
    chain = _weight_chain(layer)
    if chain is None:
        raise NetworkError(f"the weight of a {_described(layer)} is not quantized: name its layer in the plan")
    quantizer = chain[0]
    assert isinstance(quantizer, Quantizer)
    return quantizer


def latent_weight(layer: nn.Module) -> Tensor:
    """The float parameter behind a quantized weight. Raises NetworkError if the weight is not quantized."""
    chain = _weight_chain(layer)
    if chain is None:
        raise NetworkError(f"the weight of a {_described(layer)} is not quantized: name its layer in the plan")
    original = chain.original
    assert isinstance(original, Tensor)
    return original


@torch.no_grad()
def effective_weight(layer: nn.Module) -> Tensor:
    """The quantized weight as the layer uses it, in float and without gradient. Raises NetworkError if it is not quantized."""
    return weight_quantizer(layer)(latent_weight(layer))  # type: ignore[no-any-return]


@torch.no_grad()
def codes_of(layer: nn.Module) -> Tensor:
    """The integer codes of the layer's weight, int16, in its shape."""
    quantizer, latent = weight_quantizer(layer), latent_weight(layer)
    codes = torch.empty_like(latent, dtype=torch.int16)
    for rows, scale, zero in row_blocks(latent, quantizer.scale, quantizer.zero, quantizer.spec):
        codes[rows] = quantize(latent[rows], scale, zero, quantizer.spec)
    return codes


@torch.no_grad()
def assign(layer: nn.Module, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> None:
    """Give the layer these codes (integers of any dtype, in the weight's shape) and this range: its latent weight becomes their values.

    Raises NetworkError on a wrong shape, codes that are no integers or off the grid, and what :meth:`Quantizer.set` refuses.
    """
    quantizer, latent = weight_quantizer(layer), latent_weight(layer)
    if codes.shape != latent.shape:
        raise NetworkError(
            f"{_described(layer)}: codes have shape {tuple(codes.shape)}, expected that of the weight, {tuple(latent.shape)}"
        )
    low, high = quantizer.spec.levels
    for rows, _, _ in row_blocks(codes, quantizer.scale, quantizer.zero, quantizer.spec):
        part = codes[rows]
        wrong = (part != part.round()) | (part < low) | (part > high)
        if bool(wrong.any()):
            raise NetworkError(f"{_described(layer)}: a code is {part[wrong][0].item()}, expected integers from {low} to {high}")
    quantizer.set(scale, zero)
    for rows, scales, zeros in row_blocks(latent, quantizer.scale, quantizer.zero, quantizer.spec):
        latent[rows] = dequantize(codes[rows].to(latent.device), scales, zeros, quantizer.spec)


def _described(layer: nn.Module) -> str:
    """One line: a layer does not know its own name."""
    return f"{type(layer).__name__}({layer.extra_repr()})"


def _weight_chain(module: nn.Module) -> parametrize.ParametrizationList | None:
    """What stands behind ``module.weight``, if that is one Quantizer."""
    chains = module._modules.get("parametrizations")
    chain = chains["weight"] if isinstance(chains, nn.ModuleDict) and "weight" in chains else None
    return chain if isinstance(chain, parametrize.ParametrizationList) and isinstance(chain[0], Quantizer) else None


def _insert_weight(student: nn.Module, name: str, spec: QSpec) -> None:
    layer = find_module(student, name)
    if not isinstance(layer, LAYERS):
        raise NetworkError(f"{name} is a {type(layer).__name__}, which is no conv or linear layer: take it out of the plan")
    if parametrize.is_parametrized(layer, "weight"):
        reason = "quantized" if is_quantized(layer) else "parametrized"
        raise NetworkError(f"the weight of {name} is {reason} already: pass the float network, without parametrizations")
    weight = layer._parameters.get("weight")
    if weight is None:
        raise NetworkError(f"the weight of {name} is no parameter of its own (weight norm, perhaps): bake it in first")
    if spec.axis is not None and not -weight.dim() <= spec.axis < weight.dim():
        raise NetworkError(f"{name}: its weight of shape {tuple(weight.shape)} has no axis {spec.axis}")
    if not weight.is_floating_point():
        raise NetworkError(f"the weight of {name} is {weight.dtype}, expected floats: pass the float network")
    holders = [each for each, other in student.named_parameters(remove_duplicate=False) if other is weight]
    if len({id(find_module(student, each.rpartition(".")[0])) for each in holders}) > 1:
        # tied to another module: closed forms write to the weight, so this layer needs its own
        layer.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    quantizer = Quantizer(spec, None if spec.axis is None else weight.shape[spec.axis], weight.device)
    quantizer.train(layer.training)
    quantizer.set(*minmax(weight, spec))
    parametrize.register_parametrization(layer, "weight", quantizer)
    layer.get_submodule("parametrizations").train(layer.training)


def _insert_point(student: nn.Module, point: str, spec: QSpec) -> None:
    name, colon, side = point.rpartition(":")
    if not colon or side not in ("input", "output"):
        raise TargetError(f"{point!r} is no point of a network: expected '<module>:input' or '<module>:output'")
    module = find_module(student, name)
    if isinstance(module, _CONTAINERS):
        raise NetworkError(
            f"{point}: {name or 'the network'} is a {type(module).__name__}, and a new child would change it: name a module in it"
        )
    if f"{side}_quantizer" in module._modules:
        raise NetworkError(f"{point} is quantized already: pass the float network, and name a shared module once")
    device = next((each.device for each in student.parameters()), None)
    quantizer = Quantizer(spec, device=device)
    quantizer.train(module.training)
    module.add_module(f"{side}_quantizer", quantizer)
    if side == "input":
        module.register_forward_pre_hook(_quantize_input, with_kwargs=True)
    else:
        module.register_forward_hook(_quantize_output)


def _quantize_input(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[tuple[object, ...], dict[str, object]]:
    """Quantize the first tensor among the arguments, those without a name first."""
    values = _quantize_first(module, (*args, *kwargs.values()), "input")
    return values[: len(args)], dict(zip(kwargs, values[len(args) :], strict=True))


def _quantize_output(module: nn.Module, args: tuple[object, ...], result: object) -> object:
    """Quantize the result, or the first tensor of a tuple."""
    if isinstance(result, Tensor):
        return _quantize_first(module, (result,), "output")[0]
    if isinstance(result, tuple):
        values = _quantize_first(module, result, "output")
        make = getattr(type(result), "_make", tuple)  # a named tuple stays one
        return make(values)
    raise NetworkError(f"{type(module).__name__} returned a {type(result).__name__}, expected a tensor or a tuple: choose another point")


def _quantize_first(module: nn.Module, values: tuple[object, ...], side: _Side) -> tuple[object, ...]:
    for index, value in enumerate(values):
        if isinstance(value, Tensor):
            return (*values[:index], module.get_submodule(f"{side}_quantizer")(value), *values[index + 1 :])
    raise NetworkError(f"{type(module).__name__} has no tensor among its {side}s to quantize: choose another point")
