"""Layers in plain form: weights computed from parameters alone are computed once, and layers written by hand become torch's own.

Weight norm, spectral norm, weight standardisation, an equalised learning rate and ``F.conv2d`` with a parameter of the module's own all
come to a product with a weight that does not depend on the input. Such a module becomes a layer of torch, under its name.
"""

from collections.abc import Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from datafree.graph.flow import LAYERS
from datafree.graph.swap import frozen_copy, replace
from datafree.graph.tape import Call, ModuleCall, Name, Node, Tape, record, tensors_in
from datafree.task import Task

_CLOSE = 1e-4  # of the largest answer: what sums of floats in another order may differ by
# The arguments of each product behind its weight, in order.
_ARGUMENTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "conv": ("bias", "stride", "padding", "dilation", "groups"),
        "conv_transpose": ("bias", "stride", "padding", "output_padding", "groups", "dilation"),
        "linear": ("bias",),
    }
)


class _Pads(nn.Module):
    """A convolution that pads its input with zeros first: ``pads`` as ``F.pad`` takes them."""

    pads: tuple[int, ...]

    def forward(self, x: Tensor) -> Tensor:
        padded: Tensor = super().forward(F.pad(x, self.pads))
        return padded


class PaddedConv1d(_Pads, nn.Conv1d):
    """``nn.Conv1d`` behind zero padding of any width on either side."""


class PaddedConv2d(_Pads, nn.Conv2d):
    """``nn.Conv2d`` behind zero padding of any width on any side."""


class PaddedConv3d(_Pads, nn.Conv3d):
    """``nn.Conv3d`` behind zero padding of any width on any side."""


def teacher_of(model: nn.Module, task: Task, device: torch.device | None = None) -> nn.Module:
    """A copy of ``model`` that is ready to be quantized: :func:`frozen_copy`, in plain form; it computes what ``model`` does.

    Raises NetworkError where the network cannot be copied, FlowError where its forward pass cannot be followed.
    """
    teacher = frozen_copy(model, device)
    _bake(teacher)
    inputs = task.noise(2, torch.Generator("cpu" if device is None else device).manual_seed(0))
    changed = frozen_copy(teacher)
    if not _replace_layers(changed, record(changed, inputs)):
        return teacher
    with torch.no_grad():
        before, after = (list(tensors_in(each(inputs.clone()))) for each in (teacher, changed))
    equal = all((one - two).abs().max() <= _CLOSE * one.abs().max() for one, two in zip(before, after, strict=True))
    return changed if equal else teacher  # something else was hung on a layer: it stays as it is, in float


def _bake(model: nn.Module) -> None:
    """Replace parametrized and normed weights by their values, in place."""
    for module in model.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, WeightNorm | SpectralNorm):
                (remove_weight_norm if isinstance(hook, WeightNorm) else remove_spectral_norm)(module, hook.name)
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                remove_parametrization(module, name)
    model.requires_grad_(False)


def remove_parametrization(module: nn.Module, name: str) -> None:
    """Make a parametrized tensor of ``module`` a plain parameter that holds its value, in place.

    A copy of a module shares the class that torch made for the original, and taking a parametrization off edits that class: so it gets
    one of its own.
    """
    shared = type(module)
    module.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))
    parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    value = getattr(module, name)
    if not isinstance(value, nn.Parameter):  # torch makes a buffer of what needs no gradient
        delattr(module, name)
        module.register_parameter(name, nn.Parameter(value.detach(), requires_grad=False))


def _replace_layers(model: nn.Module, tape: Tape) -> bool:
    """Put plain layers in the place of modules that come to one, in place; whether there are any."""
    calls: dict[str, list[ModuleCall]] = {}
    for call in tape.module_calls:
        calls.setdefault(call.module, []).append(call)
    layers = {}
    for name, found in calls.items():
        made = (
            [_plain_layer(model, tape, call) for call in found] if name and not _is_fit(model.get_submodule(name), tape, found) else [None]
        )
        if made[0] is not None and all(each is not None and each.extra_repr() == made[0].extra_repr() for each in made):
            layers[name] = made[0]
    for name, layer in layers.items():
        replace(model, name, layer)
    return bool(layers)


def _is_fit(module: nn.Module, tape: Tape, calls: list[ModuleCall]) -> bool:
    """Whether the module is a layer of torch's that multiplies by its own weight."""
    if not isinstance(module, LAYERS):
        return False
    products = [node for call in calls for node in tape.nodes[call.start : call.stop] if node.op in _ARGUMENTS and node.call is not None]
    own = {f"{calls[0].module}.{name}" for name, each in module.named_parameters(recurse=False) if each is module.weight}
    return all(isinstance(_weight(node.call), Name) and _weight(node.call).name in own for node in products if node.call)  # type: ignore[attr-defined]


def _weight(call: Call) -> object:
    return call.args[1] if len(call.args) > 1 else call.kwargs.get("weight")


def _plain_layer(model: nn.Module, tape: Tape, call: ModuleCall) -> nn.Module | None:
    """The layer that the call comes to: padding with zeros, perhaps, and one product with a weight that the input does not change."""
    *before, product = tape.nodes[call.start : call.stop] or (None,)
    if product is None or product.op not in _ARGUMENTS or product.call is None or call.input is None:
        return None
    if (product.module, product.index, len(product.inputs)) != (call.module, call.output, 1):
        return None
    pads: list[int] = []
    at = call.input
    for node in before:
        sides = _zero_pads(node)
        if sides is None or node.inputs != (at,):
            return None
        pads = [one + two for one, two in zip(sides, [*pads, *[0] * len(sides)], strict=False)] + pads[len(sides) :]
        at = node.index
    weight = _value(model, _weight(product.call))
    given = dict(zip(_ARGUMENTS[product.op], product.call.args[2:], strict=False)) | dict(product.call.kwargs)
    bias = _value(model, given.get("bias"))
    if product.inputs[0] != at or weight is None or len(tape.nodes[at].shape) < weight.dim() or weight.dim() < 2:
        return None
    return _layer(product, weight, bias, given, tuple(pads))


def _zero_pads(node: Node) -> tuple[int, ...] | None:
    """How ``F.pad`` was called, if it padded with zeros."""
    if node.op != "pad" or node.call is None:
        return None
    names = ("input", "pad", "mode", "value")
    given = dict(zip(names, node.call.args, strict=False)) | dict(node.call.kwargs)
    sides = given["pad"]
    plain = given.get("mode", "constant") == "constant" and not given.get("value") and isinstance(sides, tuple | list)
    return tuple(sides) if plain else None  # type: ignore[arg-type]


def _value(model: nn.Module, symbol: object) -> Tensor | None:
    if isinstance(symbol, Name):
        path, _, name = symbol.name.rpartition(".")
        symbol = getattr(model.get_submodule(path), name)
    return symbol.detach().clone() if isinstance(symbol, Tensor) else None


def _layer(product: Node, weight: Tensor, bias: Tensor | None, given: Mapping[str, object], pads: tuple[int, ...]) -> nn.Module | None:
    geometry = {key: value for key, value in given.items() if key in _ARGUMENTS[product.op] and key != "bias" and value is not None}
    axes, groups = weight.dim() - 2, geometry.get("groups", 1)
    assert isinstance(groups, int)
    made: nn.Module
    with torch.device("meta"):
        if product.op == "linear":
            made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
        elif product.op == "conv":
            kinds = (PaddedConv1d, PaddedConv2d, PaddedConv3d) if any(pads) else (nn.Conv1d, nn.Conv2d, nn.Conv3d)
            made = kinds[axes - 1](weight.shape[1] * groups, weight.shape[0], weight.shape[2:], bias=bias is not None, **geometry)  # type: ignore[arg-type]
        else:
            transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[axes - 1]
            made = transposed(weight.shape[0], weight.shape[1] * groups, weight.shape[2:], bias=bias is not None, **geometry)  # type: ignore[arg-type]
    if any(pads) and not isinstance(made, _Pads):
        return None
    if isinstance(made, _Pads):
        made.pads = pads
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias, requires_grad=False)
    return made.eval()
