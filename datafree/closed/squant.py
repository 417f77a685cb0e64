"""SQuant: rounding errors that cancel within each kernel and each output channel (Guo et al., ICLR 2022, arXiv 2202.07471).

Legend: t the weight in steps, q its code, e = q - t. An offer is -e of an entry that may still be flipped to the other side of t,
up where it is positive, and 0 of all others.
"""

from typing import Literal

import torch
from torch import Tensor

from datafree.errors import NetworkError
from datafree.plan import QSpec

Stages = Literal["ekc", "ek", "ec"]


def squant(weight: Tensor, scale: Tensor, zero: Tensor, spec: QSpec, stages: Stages = "ekc") -> Tensor:
    """Codes (int16, shape of ``weight``) whose errors sum up to at most half a step in each output channel, and one in each kernel.

    E rounds to nearest; K flips the entries nearest to the other side until the sum of a kernel is within half a step, and leaves it
    one offer; C does the same for the channel with those offers. Codes are clipped to the grid at the end, as published.

    Args:
        weight: (out, in / groups, taps), outputs first; one tap (1x1, linear) skips K.
        scale: (out,).
        zero: (out,).
        spec: the grid.
        stages: ``ek`` leaves out C, ``ec`` leaves out K.

    Raises NetworkError where shapes do not fit.
    """
    if weight.dim() != 3 or scale.shape != weight.shape[:1] or zero.shape != scale.shape:
        raise NetworkError(
            f"weight {tuple(weight.shape)}, scale {tuple(scale.shape)} and zero {tuple(zero.shape)} do not fit: "
            "expected (out, in / groups, taps), (out,) and (out,)"
        )
    low, high = spec.levels
    t = weight.detach().float() / scale[:, None, None] + zero[:, None, None]
    error = torch.round(t) - t
    movable = torch.where(error < 0, t < high, t > low)
    offers = torch.where(movable, -error, 0.0)
    if "k" in stages and weight.shape[2] > 1:
        error, offers = _cancel(error, offers)
    if "c" in stages:
        rows, _ = _cancel(error.flatten(1), offers.flatten(1))
        error = rows.view_as(error)
    return torch.round(t + error).clamp(low, high).to(torch.int16)


def _cancel(error: Tensor, offers: Tensor) -> tuple[Tensor, Tensor]:
    """Flip entries until each row (last axis) of errors sums up to at most half a step: new errors, and the one offer left a row.

    That is the next entry in the queue where the sum keeps its sign, and the last one flipped, back, where it has overshot.
    """
    total = error.sum(-1, keepdim=True)
    direction = -total.sign()
    gain = (offers * direction).clamp(min=0)
    wanted = total.abs().round()
    flips = torch.minimum(wanted, (gain > 0).sum(-1, keepdim=True))  # where the grid ends there may be too few
    order = gain.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(error.shape[-1], device=error.device).expand_as(order))
    flipped = error + direction * (rank < flips)
    next_in_queue = torch.where(flips >= total.abs(), flips - 1, flips)
    return flipped, torch.where((rank == next_in_queue) & (gain > 0), -flipped, 0.0)
