"""What stands in for a student's quantizers while it is reconstructed: weights between two codes, and ranges that learn.

Legend: s scale, z zero point, B the lower of two codes, V what decides between them, h(V) in [0, 1] the share of the upper one.
"""

from typing import final

import torch
from torch import Tensor, nn

from datafree.quant.grid import broadcast, quantize
from datafree.quant.quantizer import Quantizer

ZETA, GAMMA = 1.1, -0.1  # h is a sigmoid stretched to between these, then clipped
BETA = (20.0, 2.0)  # first and last exponent of the rounding term
LEAST = 0.01  # of its first value: no scale that learns falls below

_UNDECIDED = 0.4  # how far from the code at hand a weight starts that is nearer to another one


def share(v: Tensor) -> Tensor:
    """h(V), elementwise."""
    return (v.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def logit(h: Tensor) -> Tensor:
    """V of h, in [0, 1]."""
    return ((h - GAMMA) / (ZETA - h)).log()


def undecided(v: Tensor, beta: float) -> Tensor:
    """``sum(1 - |2 h(V) - 1|^beta)``: 0 where every weight has chosen a code, else as many as have not, about."""
    return (1 - (2 * share(v) - 1).abs().pow(beta)).sum()


def annealed(progress: float, warm_up: float) -> float | None:
    """beta when so large a share of the steps is over: none during ``warm_up``, then along a line from the first to the last of BETA."""
    if progress < warm_up:
        return None
    first, last = BETA
    return last + (first - last) * (1 - (progress - warm_up) / (1 - warm_up) if warm_up < 1 else 0.0)


@final
class SoftWeight(nn.Module):
    """AdaRound (arXiv 2004.10568): ``s (clamp(B + h(V)) - z)``, which starts where the float weight lies between two codes.

    With ``learn_scale`` s learns as well, while B stays (GENIE-M, CVPR 2023): codes do not depend on the scale that is sought.

    Args:
        wanted: the float weight, in the weight's shape.
        latent: what is quantized at present. Where its code is not one of the two next to ``wanted`` (error feedback saw to that), the
            weight starts beside that code, on the side of ``wanted``.
        quantizer: of the weight, with its range.
        learn_scale: whether the scale is a parameter.
    """

    def __init__(self, wanted: Tensor, latent: Tensor, quantizer: Quantizer, learn_scale: bool) -> None:
        super().__init__()
        self.spec = quantizer.spec
        codes = quantize(latent.detach(), quantizer.scale, quantizer.zero, self.spec).float()
        self.zero = broadcast(quantizer.zero, self.spec, codes)
        away = wanted.detach().float() / broadcast(quantizer.scale, self.spec, codes) + self.zero - codes
        position = codes + torch.where(away.abs() <= 0.5, away, _UNDECIDED * away.sign())
        self.base = position.floor()
        self.v = nn.Parameter(logit(position - self.base))
        self.scale = nn.Parameter(quantizer.scale.clone(), requires_grad=learn_scale)
        self.least = LEAST * quantizer.scale

    def forward(self, latent: Tensor) -> Tensor:
        """The weight, between its codes; ``latent`` is left alone."""
        codes = (self.base + share(self.v)).clamp(*self.spec.levels)
        value: Tensor = broadcast(torch.maximum(self.scale, self.least), self.spec, codes) * (codes - self.zero)
        return value

    @torch.no_grad()
    def hard(self) -> tuple[Tensor, Tensor]:
        """Codes, the upper one where V is at least 0, and scale."""
        return (self.base + (self.v >= 0)).clamp(*self.spec.levels), torch.maximum(self.scale, self.least)


@final
class LearnedRange(nn.Module):
    """A quantizer of activations whose scale learns (LSQ, arXiv 1902.08153), and that lets a share ``drop`` of the values pass.

    Values that pass in float, chosen anew each time, are QDrop's (arXiv 2203.05740): weights must serve all mixtures of both.
    """

    def __init__(self, quantizer: Quantizer, drop: float, generator: torch.Generator) -> None:
        super().__init__()
        self.spec, self.zero, self.least = quantizer.spec, quantizer.zero, LEAST * quantizer.scale
        self.drop, self.generator = drop, generator
        self.scale = nn.Parameter(quantizer.scale.clone())

    def forward(self, x: Tensor) -> Tensor:
        """``x``, quantized but for what is dropped."""
        scale, zero = (broadcast(each, self.spec, x) for each in (self.value(), self.zero))
        quantized: Tensor = _LearnedStep.apply(x, scale, zero, self.spec.levels)  # type: ignore[no-untyped-call]
        return mixed(quantized, x, self.drop, self.generator)

    def value(self) -> Tensor:
        """The scale."""
        return torch.maximum(self.scale, self.least)


def mixed(quantized: Tensor, x: Tensor, drop: float, generator: torch.Generator) -> Tensor:
    """Elementwise one of the two, ``x`` with the chance ``drop``."""
    if drop == 0:
        return quantized
    chosen = torch.rand(x.shape, generator=generator, device=generator.device) < drop
    return torch.where(chosen.to(x.device), x, quantized)


class _LearnedStep(torch.autograd.Function):
    """Fake quantization with a gradient for the scale: the code's distance from the value in steps, or the code where it was clipped."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, zero: Tensor, levels: tuple[int, int]) -> Tensor:  # type: ignore[no-untyped-def]
        steps = x.float() / scale
        nearest = steps.round() + zero
        codes = nearest.clamp(*levels)
        kept = nearest.eq_(codes)  # a factor of 0 or 1: a mask of booleans takes several times as long
        codes.sub_(zero)
        ctx.save_for_backward(kept, torch.addcmul(codes, kept, steps, value=-1))
        ctx.shape = scale.shape
        return (codes * scale).to(x.dtype)

    @staticmethod
    def backward(ctx, slope: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        kept, gain = ctx.saved_tensors
        return (slope * kept).to(slope.dtype), (slope * gain).sum_to_size(ctx.shape), None, None
