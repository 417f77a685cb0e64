"""How a network is run to be measured: what its modules take and give, batch norms by the batch's statistics, a quick layout."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from datafree.errors import NetworkError


@contextmanager
def anchored(model: nn.Module, but: Collection[str] = ()) -> Iterator[None]:
    """Every batch norm, but those named, normalises by the batch and keeps its stored affine: outputs have mean beta and variance gamma^2.

    Stored statistics are left alone. The modules themselves change their mode while it lasts: no other thread may run ``model`` meanwhile
    (give it a ``swap.frozen_copy``, which shares the tensors).
    """
    named = model.named_modules()
    norms = [module for name, module in named if isinstance(module, _BatchNorm) and module.running_mean is not None and name not in but]
    before = [(norm.training, norm.track_running_stats) for norm in norms]
    try:
        for norm in norms:
            norm.training, norm.track_running_stats = True, False
        yield
    finally:
        for norm, (training, tracked) in zip(norms, before, strict=True):
            norm.training, norm.track_running_stats = training, tracked


@contextmanager
def anchored_alike(teacher: nn.Module, student: nn.Module) -> Iterator[None]:
    """Batch norms of ``teacher`` find their stored statistics in every batch, and those of ``student`` are helped just as much.

    What enters a norm counts as scaled and shifted channel by channel, as much as brings the batch to the mean and variance that the
    teacher's norm has stored; the student's norm of the same name gets the same scale and shift. So inputs unlike the network's data pass
    both as if they were like them, and what the student does otherwise than the teacher stays. Run the teacher on each batch before the
    student. Norms that the student lacks are the teacher's alone. No value is moved: a norm has other statistics stored while it runs.
    """
    moves: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    others = {name: module for name, module in student.named_modules() if isinstance(module, _BatchNorm)}
    stored = {
        module: (module.running_mean, module.running_var)
        for model in (teacher, student)
        for module in model.modules()
        if isinstance(module, _BatchNorm)
    }

    def forget(module: nn.Module, args: object) -> None:
        moves.clear()

    def bring(norm: _BatchNorm, name: str) -> "torch.utils.hooks.RemovableHandle":
        def look(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            mean, variance = stored[norm]
            assert mean is not None and variance is not None
            at, found = norm.running_mean, norm.running_var = batch_moments(norm_input(args, kwargs))
            moves.setdefault(name, []).append((mean, at, ((found + norm.eps) / (variance + norm.eps)).sqrt()))

        return norm.register_forward_pre_hook(look, with_kwargs=True)

    def follow(norm: _BatchNorm, name: str) -> "torch.utils.hooks.RemovableHandle":
        def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            mean, at, width = moves[name].pop(0)
            own_mean, own_variance = stored[norm]
            assert own_mean is not None and own_variance is not None
            norm.running_mean = at + (own_mean - mean) * width
            norm.running_var = (own_variance + norm.eps) * width.square() - norm.eps

        return norm.register_forward_pre_hook(look)

    def restore(norm: nn.Module, *_: object) -> None:
        assert isinstance(norm, _BatchNorm)
        norm.running_mean, norm.running_var = stored[norm]

    handles = [teacher.register_forward_pre_hook(forget)]
    for name, norm in teacher.named_modules():
        if isinstance(norm, _BatchNorm) and norm.running_mean is not None:
            handles += [bring(norm, name), norm.register_forward_hook(restore, always_call=True)]
            if name in others:
                handles += [follow(others[name], name), others[name].register_forward_hook(restore, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def norm_input(args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> Tensor:
    """What a batch norm is called with, by place or by name: for hooks with keywords."""
    return args[0] if args else kwargs["input"]


@torch.no_grad()
def batch_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel of ``x`` (n, channels, *sizes), float32: as ``torch.var_mean``, in a quarter of its time."""
    inputs = x.float().flatten(2) if x.dim() > 2 else x.float()[..., None]
    mean = inputs.mean(2).mean(0)
    return mean, torch.linalg.vector_norm(inputs - mean[:, None], dim=2).square().mean(0) / inputs.shape[2]


def channels_last(model: nn.Module, inputs: Tensor) -> Tensor:
    """The same values, (n, *shape), with the channels of pictures last in memory, which the layers keep: they run faster so.

    As they are where the network does not allow it: a ``view`` of its own may want the channels first.
    """
    if inputs.dim() != 4:
        return inputs
    laid_out = inputs.contiguous(memory_format=torch.channels_last)
    try:
        with torch.no_grad():
            model(laid_out[:2].clone())
    except RuntimeError:
        return inputs
    return laid_out


@contextmanager
def outputs(model: nn.Module, name: str | None) -> Iterator[list[Tensor]]:
    """While it lasts, what the module ``name`` gives, a tensor for each call; nothing for None.

    They pile up from pass to pass, and are no copies: whoever changes one in place changes it here, too.
    """
    seen: list[Tensor] = []

    def look(module: nn.Module, args: object, result: object) -> None:
        if isinstance(result, Tensor):
            seen.append(result)

    handle = None if name is None else model.get_submodule(name).register_forward_hook(look)
    try:
        yield seen
    finally:
        if handle is not None:
            handle.remove()


@torch.no_grad()
def calls(model: nn.Module, inputs: Tensor) -> list[tuple[str, nn.Module, tuple[int, ...]]]:
    """Every call of a module that gives a tensor, in the order in which they end: its name, itself, and the tensor's shape."""
    seen: list[tuple[str, nn.Module, tuple[int, ...]]] = []

    def watch(name: str, module: nn.Module) -> "torch.utils.hooks.RemovableHandle":
        def look(module: nn.Module, args: object, result: object) -> None:
            if isinstance(result, Tensor):
                seen.append((name, module, tuple(result.shape)))

        return module.register_forward_hook(look)

    handles = [watch(name, module) for name, module in model.named_modules()]
    try:
        model(inputs.clone())
    finally:
        for handle in handles:
            handle.remove()
    return seen


@dataclass(frozen=True)
class Entered:
    """What a module was handed: its first tensors, joined, on the CPU, and the other arguments of its first call."""

    inputs: Tensor
    others: tuple[object, ...]
    named: Mapping[str, object]


@torch.no_grad()
def entering(model: nn.Module, name: str, batches: Iterable[Tensor], run: Callable[[nn.Module, Tensor], object]) -> Entered:
    """What the module ``name`` is handed while ``run(model, batch)`` goes over the batches. Raises NetworkError where that is no tensor."""
    seen: list[Entered] = []

    def look(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        if not args or not isinstance(args[0], Tensor):
            raise NetworkError(f"{name} was not handed a tensor first this time: what enters it cannot be recorded")
        seen.append(Entered(args[0].to("cpu", copy=True), args[1:], kwargs))

    handle = model.get_submodule(name).register_forward_pre_hook(look, prepend=True, with_kwargs=True)  # before a quantizer of its own
    try:
        for batch in batches:
            run(model, batch)
    finally:
        handle.remove()
    if not seen:
        raise NetworkError(f"{name} was not called this time: what enters it cannot be recorded")
    return Entered(torch.cat([each.inputs for each in seen]), seen[0].others, seen[0].named)
