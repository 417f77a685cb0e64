"""Weights of random networks, scaled as training leaves them."""

import dataclasses
import warnings

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from datafree.task import Task
from field import pixels, sqnr
from random_parts import LAYERS


@torch.no_grad()
def fit_weights(model: nn.Module, task: Task) -> None:
    """Scale every layer in place, one after the other: outputs of unit size on realistic pixels, and half as far from 0 with a bias."""
    done: set[nn.Module] = set()

    def fit(layer: nn.Module, args: object, output: Tensor) -> Tensor:
        if layer in done:  # called a second time
            return output
        done.add(layer)
        output = output if layer.bias is None else output - along(layer.bias, output, layer)
        factor = 1 / max(float(output.square().mean().sqrt()), 1e-3)
        layer.weight *= factor
        if layer.bias is None:
            return output * factor
        rows = output.movedim(-1 if isinstance(layer, nn.Linear) else 1, -1).flatten(0, -2)
        layer.bias.copy_(0.3 * torch.randn(len(layer.bias)) - 0.5 * factor * rows.mean(0))
        return output * factor + along(layer.bias, output, layer)

    hooks = [module.register_forward_hook(fit) for module in model.modules() if isinstance(module, LAYERS)]
    model.train()
    model(task.normalise(pixels(16, task.shape, seed=3)))
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def rounded_sqnr(model: nn.Module, task: Task) -> float:
    """SQNR of the answers, in dB, where the input of every layer is rounded to 8 bits between its own ends: no range could do better."""

    def rounded(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        value = args[0] if args else kwargs["input"]
        step = (value.max() - value.min()).clamp(min=1e-12) / 255
        value = (value / step).round() * step
        return ((value, *args[1:]), kwargs) if args else (args, {**kwargs, "input": value})

    inputs = task.normalise(pixels(16, task.shape))
    exact = answer(model, task, inputs.clone())
    hooks = [module.register_forward_pre_hook(rounded, with_kwargs=True) for module in model.modules() if isinstance(module, LAYERS)]
    found = sqnr(exact, answer(model, task, inputs))
    for hook in hooks:
        hook.remove()
    return found


def answer(model: nn.Module, task: Task, inputs: Tensor) -> Tensor:
    """The part of what the network returns that its task names."""
    result = model(inputs)
    if task.output is None:
        return result
    return getattr(result, task.output) if dataclasses.is_dataclass(result) else result[task.output]


def along(bias: Tensor, output: Tensor, layer: nn.Module) -> Tensor:
    """The bias, ready to be added to what the layer puts out."""
    return bias if isinstance(layer, nn.Linear) else bias.view(-1, *(1 for _ in output.shape[2:]))


def wrap_weights(model: nn.Module) -> None:
    """Weight norms on the layers marked for them, in place."""
    for module in list(model.modules()):
        kind = module.__dict__.pop("weight_norm", None)
        if kind == "weight norm":
            parametrizations.weight_norm(module)
        elif kind == "old weight norm":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                nn.utils.weight_norm(module)
