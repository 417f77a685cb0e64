"""What generated inputs are meant to show: one class each, or shares of several (superposed, Qimera, NeurIPS 2021).

Legend: n inputs, K classes that one input shows.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Blend:
    """What each of n inputs is meant to show.

    Args:
        classes: (n, K).
        shares: of each of them, (n, K); those of an input add up to 1.
        place: where, (n, axes), each in [0, 1]; None: anywhere.
    """

    classes: Tensor
    shares: Tensor
    place: Tensor | None = None

    def mean(self, entries: Tensor) -> Tensor:
        """``entries`` of the classes, (n, K, width), weighted by their shares: (n, width)."""
        return (self.shares[:, :, None] * entries).sum(1)

    def labels(self, classes: int) -> Tensor:
        """Classes, (n,), where each input shows one; else the shares of all, (n, classes), those of a class drawn twice added."""
        if self.classes.shape[1] == 1:
            return self.classes[:, 0]
        return torch.zeros(len(self.classes), classes, device=self.shares.device).scatter_add_(1, self.classes, self.shares)


Policy = Callable[[int, int, torch.Generator], Blend]


def one_class(n: int, classes: int, generator: torch.Generator) -> Blend:
    """Each input shows one class, all as likely."""
    drawn = torch.randint(classes, (n, 1), generator=generator, device=generator.device)
    return Blend(drawn, torch.ones(n, 1, device=generator.device))


@dataclass(frozen=True)
class Superposed:
    """One coin for all: with probability ``chance`` each input shows ``slots`` classes at once, else one.

    A class may be drawn twice. The shares are the softmax of standard normal numbers.
    """

    chance: float
    slots: int

    def __call__(self, n: int, classes: int, generator: torch.Generator) -> Blend:
        """As every :data:`Policy`."""
        device = generator.device
        if float(torch.rand((), generator=generator, device=device)) >= self.chance:
            return one_class(n, classes, generator)
        drawn = torch.randint(classes, (n, self.slots), generator=generator, device=device)
        return Blend(drawn, torch.randn(n, self.slots, generator=generator, device=device).softmax(1))
