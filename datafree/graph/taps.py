"""Let batch norms normalise by the statistics of the batch at hand, for as long as it is needed."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


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
