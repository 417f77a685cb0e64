"""Copy a network, and replace its parts by name."""

import copy

import torch
from torch import nn

from datafree.errors import NetworkError


def frozen_copy(model: nn.Module, device: torch.device | None = None) -> nn.Module:
    """A copy in eval mode and float32 that needs no gradients.

    Modules are copied, tensors are shared with ``model`` where neither dtype nor device changes: the copy is light, and
    nobody may write into its tensors. Raises NetworkError where a part of the network refuses to be copied.
    """
    shared: dict[int, object] = {}
    for parameter in model.parameters():
        shared[id(parameter)] = nn.Parameter(_moved(parameter.data, device), requires_grad=False)
    for buffer in model.buffers():
        shared[id(buffer)] = _moved(buffer.data, device)
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:  # the weight that a norm of weights has computed: no copy may be made
                shared[id(value)] = _moved(value.detach(), device)
    try:
        return copy.deepcopy(model, shared).eval()
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise NetworkError(
            f"the network cannot be copied (copy.deepcopy): {error}. Take what it holds besides modules and weights out"
        ) from error


def _moved(tensor: torch.Tensor, device: torch.device | None) -> torch.Tensor:
    return tensor.to(device=device, dtype=torch.float32 if tensor.is_floating_point() else None)


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the submodule ``name``, under all its names."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for child in [child for child, each in parent._modules.items() if each is old]:
            setattr(parent, child, module)
