"""A criterion without data: how far the student is from its teacher on inputs of the source that it never learns from."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from datafree.errors import MethodError
from datafree.synth.source import Batch, Pool, Source

_LOOKS = 40  # in all steps
_PATIENCE = 10  # looks in a row that find nothing better


def set_aside(source: Source, n: int) -> tuple[Tensor, Source]:
    """``n`` inputs, (n, *shape), and a source of others: the rest of a pool; any other source makes new ones for every sample.

    Raises MethodError where a pool has no more than ``n``.
    """
    if not isinstance(source, Pool):
        return source.sample(n).inputs, source
    batch, generator = source.batch, source.generator
    if n >= len(batch.inputs):
        raise MethodError(f"{n} of {len(batch.inputs)} inputs cannot be held out: nothing is left to learn from")
    order = torch.randperm(len(batch.inputs), generator=generator, device=generator.device)
    labels, answer = (None if each is None else each[order[n:]] for each in (batch.labels, batch.answer))
    return batch.inputs[order[:n]], Pool(Batch(batch.inputs[order[n:]], labels, answer), generator)


@final
class HeldOut:
    """Stops a fit of ``params`` in which ``distance`` falls no more, and keeps those with which it was least.

    It looks before the first step and forty times in ``steps`` steps; ten looks in a row that find nothing better end the fit.
    """

    def __init__(self, params: Sequence[Tensor], distance: Callable[[], float], steps: int) -> None:
        self.params, self.distance, self.every = params, distance, max(1, steps // _LOOKS)
        self.best = [each.detach().clone() for each in params]
        self.least, self.at, self.looked = math.inf, 0, -self.every

    def __call__(self, losses: Sequence[float]) -> bool:
        """Look, if it is time to; whether it is over."""
        if len(losses) >= self.looked + self.every:
            self.looked = len(losses)
            self.look(self.looked)
        return self.looked - self.at >= _PATIENCE * self.every

    def look(self, taken: int) -> None:
        """Keep the parameters as they are now, after so many steps, if they are better than all before."""
        found = self.distance()
        if found < self.least:
            self.least, self.at = found, taken
            self.best = [each.detach().clone() for each in self.params]

    @torch.no_grad()
    def give(self) -> None:
        """Give the parameters the best values that were seen."""
        for param, best in zip(self.params, self.best, strict=True):
            param.copy_(best)

    def state_dict(self) -> dict[str, object]:
        """The best parameters, the distance with them, when they were found, and the last look."""
        return {"best": self.best, "least": self.least, "at": self.at, "looked": self.looked}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take back what :meth:`state_dict` gave."""
        best, least, at, looked = (state[key] for key in ("best", "least", "at", "looked"))
        assert isinstance(best, list) and isinstance(least, float) and isinstance(at, int) and isinstance(looked, int)
        self.best, self.least, self.at, self.looked = best, least, at, looked
