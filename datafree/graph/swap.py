"""Copy a network, and replace its parts by name."""

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, fx, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from datafree.errors import NetworkError
from datafree.user_code import USER_ERRORS, described_error

_TENSORS_OF_A_MODULE = ("_parameters", "_buffers", "_modules")


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside DataParallel, DistributedDataParallel and torch.compile; any other network itself.

    Raises NetworkError for a TorchScript or torch.export module, whose layers are gone.
    """
    while (inner := _inside(model)) is not None:
        model = inner
    kind = _compiled_kind(model)
    if kind is not None:
        raise NetworkError(
            f"the network is a {kind} module, whose layers can no longer be replaced: give the Python network (torch.nn.Module) that it "
            "was made from, with the weights loaded into it"
        )
    return model


def wrappers(model: nn.Module) -> list[str]:
    """What is taken off by :func:`unwrapped` and :func:`frozen_copy`: ``DataParallel around the network``, for example."""
    found = {name: module for name, module in model.named_modules() if _inside(module) is not None}
    kinds = {name: "torch.compile" if _is_compiled(module) else type(module).__name__ for name, module in found.items()}
    return [f"{kind} around {name or 'the network'}" for name, kind in kinds.items()]


def frozen_copy(model: nn.Module, device: torch.device | None = None) -> nn.Module:
    """A copy in eval mode and float32 that needs no gradients, without the wrappers of data-parallel and compiled networks.

    Modules are copied, tensors are shared with ``model`` where neither dtype nor device changes: the copy is light, and
    nobody may write into its tensors. Raises NetworkError where a part of the network refuses to be copied; the message names it.
    """
    model = unwrapped(model)
    shared = _moved_tensors(model, device)
    try:
        for module in reversed(list(model.modules())):  # inner wrappers first
            inner = _inside(module)
            if inner is not None:
                shared[id(module)] = copy.deepcopy(inner, shared)
        return copy.deepcopy(model, shared).eval()
    except USER_ERRORS as error:
        raise NetworkError(
            f"the network cannot be copied (copy.deepcopy) because of {_uncopyable(model) or 'one of its modules'}: "
            f"{described_error(error)}. Keep it outside the network, or set it to None before the call"
        ) from error


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the submodule ``name``, under all its names."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for child in [child for child, each in parent._modules.items() if each is old]:
            setattr(parent, child, module)


def _inside(module: nn.Module) -> nn.Module | None:
    """The network that a wrapper runs; None where ``module`` is no wrapper."""
    if isinstance(module, DataParallel | DistributedDataParallel):
        return module.get_submodule("module")
    return module.get_submodule("_orig_mod") if _is_compiled(module) else None


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch._dynamo") and "_orig_mod" in module._modules


def _compiled_kind(model: nn.Module) -> str | None:
    """TorchScript or torch.export; None for a Python network, to which a graph of torch.fx that calls modules belongs."""
    if isinstance(model, torch.jit.ScriptModule):
        return "TorchScript"
    if isinstance(model, fx.GraphModule) and any(isinstance(node.target, torch._ops.OpOverload) for node in model.graph.nodes):
        return "torch.export"
    return None


def _moved_tensors(model: nn.Module, device: torch.device | None) -> dict[int, object]:
    """By the id of each tensor of ``model`` what stands for it in a copy: the memo of copy.deepcopy."""
    memo: dict[int, object] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            if name not in _TENSORS_OF_A_MODULE:
                memo |= {id(tensor): _moved(tensor, device) for tensor in _tensors_in(value)}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(_moved(parameter, device), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = _moved(buffer, device)
    return memo


def _tensors_in(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors_in(each)
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors_in(each)


def _moved(tensor: Tensor, device: torch.device | None) -> Tensor:
    return tensor.detach().to(device=device, dtype=torch.float32 if tensor.is_floating_point() else None)


def _uncopyable(model: nn.Module) -> str | None:
    """Path and type of what cannot be copied, such as ``its attribute trainer.lock (a lock)``."""
    tensors = _moved_tensors(model, None)
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in _TENSORS_OF_A_MODULE and not _copies(value, tensors):
                return f"its attribute {_deepest(f'{path}.{name}' if path else name, value, tensors)}"
    return None


def _deepest(path: str, value: object, tensors: dict[int, object], levels: int = 4) -> str:
    """Go on into what ``value`` holds, as far as the part of it that cannot be copied has a name."""
    if isinstance(value, Mapping):
        parts = [(f"{path}[{key!r}]", each) for key, each in value.items()]
    elif isinstance(value, list | tuple):
        parts = [(f"{path}[{index}]", each) for index, each in enumerate(value)]
    else:
        parts = [(f"{path}.{name}", each) for name, each in getattr(value, "__dict__", {}).items()]
    for name, part in parts if levels else ():  # objects may refer to each other in a circle
        if not _copies(part, tensors):
            return _deepest(name, part, tensors, levels - 1)
    return f"{path} (a {type(value).__name__})"


def _copies(value: object, tensors: dict[int, object]) -> bool:
    try:
        copy.deepcopy(value, dict(tensors))
    except USER_ERRORS:
        return False
    return True
