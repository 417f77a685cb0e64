"""Weights of random networks, scaled as training leaves them."""

import warnings

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from datafree.task import Task
from field import pixels
from random_parts import LAYERS


@torch.no_grad()
def fit_weights(model: nn.Module, task: Task) -> None:
    """Scale every layer, one after the other, in place: outputs of unit variance on realistic pixels, means near 0 where a bias can."""
    done: set[nn.Module] = set()

    def fit(layer: nn.Module, args: object, output: Tensor) -> Tensor:
        if layer in done:  # called a second time
            return output
        done.add(layer)
        output = output if layer.bias is None else output - along(layer.bias, output, layer)
        factor = 1 / float(output.std())
        layer.weight *= factor
        if layer.bias is None:
            return output * factor
        rows = output.movedim(-1 if isinstance(layer, nn.Linear) else 1, -1).flatten(0, -2)
        layer.bias.copy_(0.3 * torch.randn(len(layer.bias)) - factor * rows.mean(0))
        return output * factor + along(layer.bias, output, layer)

    hooks = [module.register_forward_hook(fit) for module in model.modules() if isinstance(module, LAYERS)]
    model.train()
    model(task.normalise(pixels(16, task.shape, seed=3)))
    for hook in hooks:
        hook.remove()


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
