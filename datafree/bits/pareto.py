"""The Pareto frontier of size and loss over all ways to give bits to layers, by dynamic programming (ZeroQ, arXiv 2001.00281).

Losses of layers add up: after each layer only partial choices stay that no other beats in both size and loss, which is exact. Where
these become too many, the best of each of some equally wide classes of size stay. Optionally the sum gives way, every few layers, to the
loss of all layers chosen so far together, measured: then the few best of each class stay to be measured, dominated or not.

Differs: ZeroQ's mixed precision was never published as code; the numbers of classes and survivors are those of a re-implementation.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from datafree.errors import TargetError

CLASSES, KEPT = 200, 10  # classes of size, and choices kept in each
GROUP, MEASURED = 5, 5  # layers between two measurements, and choices kept in each class after one
JOINT_CLASSES = 20  # classes where every survivor is measured

Joint = Callable[[Mapping[str, int]], float]


@dataclass(frozen=True)
class Point:
    """A way to give bits to all layers: the bytes it takes, what it loses, and the bits by layer."""

    size: int
    loss: float
    widths: Mapping[str, int]


@dataclass(frozen=True)
class _Partial:
    """Choices for the layers so far: sizes and losses (k,), and the number of the width of each layer (k, layers)."""

    size: NDArray[np.int64]
    loss: NDArray[np.float64]
    taken: NDArray[np.int8]

    def only(self, places: NDArray[np.intp]) -> "_Partial":
        return _Partial(self.size[places], self.loss[places], self.taken[places])


def frontier(
    distortion: Mapping[str, Mapping[int, float]],
    cost: Mapping[str, Mapping[int, int]],
    max_bytes: int | None = None,
    joint: Joint | None = None,
) -> list[Point]:
    """The points that no other beats in both size and loss, from small to large.

    Args:
        distortion: what each layer loses at each width.
        cost: bytes by layer, then by width; the widths of a layer in it are those it may get.
        max_bytes: larger points are left out; None: there is no bound.
        joint: measures what the given layers lose together at the given bits; None: the sum of their distortions.

    Raises TargetError where even the smallest is larger than ``max_bytes``, or a distortion is not finite.
    """
    smallest = sum(min(sizes.values()) for sizes in cost.values())
    if max_bytes is not None and smallest > max_bytes:
        raise TargetError(f"max_bytes = {max_bytes} is out of reach: with these widths the smallest possible size is {smallest} bytes")
    partial = _Partial(np.zeros(1, np.int64), np.zeros(1), np.zeros((1, 0), np.int8))
    rest, names = smallest, list(cost)
    for number, name in enumerate(names, 1):
        rest -= min(cost[name].values())
        partial = _with_layer(partial, name, distortion[name], cost[name])
        if max_bytes is not None:
            partial = partial.only(np.flatnonzero(partial.size + rest <= max_bytes))
        if joint is None:
            partial = _undominated(partial)
            partial = partial if len(partial.size) <= CLASSES * KEPT else _best(partial, CLASSES, KEPT)
        else:
            partial = _best(partial, JOINT_CLASSES, KEPT)
            if number % GROUP == 0 or number == len(names):
                partial = _best(_measured(partial, names[:number], cost, joint), JOINT_CLASSES, MEASURED)
    partial = _undominated(partial)
    return [
        Point(int(size), float(loss), _widths(row, cost)) for size, loss, row in zip(partial.size, partial.loss, partial.taken, strict=True)
    ]


def _with_layer(partial: _Partial, name: str, distortion: Mapping[int, float], cost: Mapping[int, int]) -> _Partial:
    """Each choice so far with each width of one more layer."""
    lost = np.array([distortion[bits] for bits in cost])
    if not np.isfinite(lost).all():
        bits = list(cost)[int(np.flatnonzero(~np.isfinite(lost))[0])]
        raise TargetError(f"the distortion of {name} at {bits} bits is {distortion[bits]}, expected a finite number")
    size = partial.size[:, None] + np.array(list(cost.values()))
    numbers = np.tile(np.arange(len(cost), dtype=np.int8), len(partial.size))
    taken = np.concatenate([partial.taken.repeat(len(cost), 0), numbers[:, None]], 1)
    return _Partial(size.ravel(), (partial.loss[:, None] + lost).ravel(), taken)


def _undominated(partial: _Partial) -> _Partial:
    """By rising size, only choices that lose less than all smaller ones."""
    order = np.lexsort((partial.loss, partial.size))
    loss = partial.loss[order]
    before = np.concatenate([[np.inf], np.minimum.accumulate(loss)[:-1]])
    return partial.only(order[loss < before])


def _best(partial: _Partial, classes: int, kept: int) -> _Partial:
    """In each class of size the ``kept`` choices that lose least."""
    low, high = int(partial.size.min()), int(partial.size.max())
    number = (partial.size - low) * classes // (high - low + 1)
    order = np.lexsort((partial.size, partial.loss, number))
    first = np.searchsorted(number[order], number[order])
    return partial.only(order[np.arange(len(order)) - first < kept])


def _measured(partial: _Partial, names: Sequence[str], cost: Mapping[str, Mapping[int, int]], joint: Joint) -> _Partial:
    some = {name: cost[name] for name in names}
    return _Partial(partial.size, np.array([joint(_widths(row, some)) for row in partial.taken]), partial.taken)


def _widths(row: NDArray[np.int8], cost: Mapping[str, Mapping[int, int]]) -> dict[str, int]:
    return {name: list(sizes)[number] for (name, sizes), number in zip(cost.items(), row, strict=True)}
