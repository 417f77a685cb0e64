"""Double precision on devices that have it, and on the CPU for those that do not."""

import torch
from torch import Tensor


def has_float64(device: torch.device) -> bool:
    """Whether the device computes in double precision: Apple's GPUs do not."""
    return device.type != "mps"


def float64(x: Tensor) -> Tensor:
    """``x`` in double precision; on the CPU where its device has none, so the result is moved back with ``.to(device, torch.float32)``."""
    return x.to(x.device if has_float64(x.device) else "cpu", torch.float64)
