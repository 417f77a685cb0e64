"""Several processes that train one student, each on inputs of its own: their gradients are averaged before every step.

``torchrun`` starts them, on one machine or on several that share a file system, and :func:`join` makes them a group. What lies outside
of ``fit`` each of them does alike, from the same seed; the random draws inside of it are those of the process. Without a group everything
here does nothing.
"""

import atexit
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from datafree.errors import TargetError

T = TypeVar("T")


def join(device: str) -> str:
    """Join the processes that ``torchrun`` has started, for good; returns the device of this one, ``cuda:1`` for ``cuda``.

    A process that nobody has started beside others keeps ``device``; a group that is there already is taken. GPUs talk by NCCL, CPUs by
    gloo. Raises TargetError where there are fewer GPUs than processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    if device == "cuda":
        local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= gpus:
            raise TargetError(f"{local + 1} processes cannot share {gpus} GPUs: start one for each")
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
        atexit.register(dist.destroy_process_group)
    return device


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is, from 0. The first writes files and tells how far it is."""
    return dist.get_rank() if dist.is_initialized() else 0


def gathered(value: T) -> list[T]:
    """The value of each process, in their order."""
    found = [value] * count()
    if count() > 1:
        dist.all_gather_object(found, value)
    return found


def agreed(value: T) -> T:
    """The value of the first process."""
    told = [value]
    if count() > 1:
        dist.broadcast_object_list(told, 0)
    return told[0]


def mean(value: Tensor) -> Tensor:
    """The mean of a tensor over the processes, to the same bits in each; no gradient flows through it."""
    if count() == 1:
        return value.detach()
    whole = value.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(whole)
    return whole / count()


def average_gradients(params: Sequence[Tensor]) -> None:
    """Give every parameter the mean of its gradients; a process that has none for it counts as zero."""
    if count() == 1:
        return
    found = [torch.zeros_like(each) if each.grad is None else each.grad for each in params]
    whole = mean(torch.cat([each.reshape(-1) for each in found]))
    parts = whole.split([each.numel() for each in params])  # type: ignore[no-untyped-call]
    for param, part in zip(params, parts, strict=True):
        param.grad = part.view(param.shape)


@torch.no_grad()
def align(tensors: Iterable[Tensor]) -> None:
    """Overwrite ``tensors`` by those of the first process."""
    for each in tensors if count() > 1 else ():
        told = each.detach().clone(memory_format=torch.contiguous_format)
        dist.broadcast(told.view(-1).view(torch.uint8), 0)  # as bytes, for there are types that gloo does not know
        each.copy_(told)


@contextmanager
def apart(generator: torch.Generator) -> Iterator[None]:
    """While it lasts, ``generator``, the same in all processes, draws for each of them something else; afterwards the same again."""
    if count() == 1:
        yield
        return
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    generator.manual_seed(seed + rank())
    try:
        yield
    finally:
        generator.manual_seed(seed + count())
