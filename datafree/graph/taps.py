"""How a network is run to be measured: batch norms by the statistics of the batch at hand, inputs laid out in memory for speed."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def anchored(model: nn.Module) -> Iterator[None]:
    """Every batch norm normalises by the batch and keeps its stored affine: outputs have mean beta and variance gamma^2.

    Stored statistics are left alone.
    """
    norms = [
        module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    ]
    before = [(norm.training, norm.track_running_stats) for norm in norms]
    try:
        for norm in norms:
            norm.training, norm.track_running_stats = True, False
        yield
    finally:
        for norm, (training, tracked) in zip(norms, before, strict=True):
            norm.training, norm.track_running_stats = training, tracked


def channels_last(model: nn.Module, inputs: Tensor) -> Tensor:
    """The same values, (n, *shape), with the channels of pictures last in memory, which the layers keep: they run faster so.

    As they are where the network does not allow it: a ``view`` of its own may want the channels first.
    """
    if inputs.dim() != 4:
        return inputs
    laid_out = inputs.contiguous(memory_format=torch.channels_last)
    try:
        with torch.no_grad():
            model(laid_out[:2])
    except RuntimeError:
        return inputs
    return laid_out
