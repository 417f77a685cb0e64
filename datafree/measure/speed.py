"""How fast exported files run: interleaved in one process, so that all meet the same machine."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from datafree.export.integers import Array
from datafree.export.runtime import Loaded

ROUNDS = 30
SECONDS = 3.0  # a series ends after so many, though not before 5 rounds


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one run: median and quartiles."""

    median: float
    low: float
    high: float


def interleaved(files: Sequence[Loaded], inputs: Array, rounds: int = ROUNDS, seconds: float = SECONDS) -> list[Latency]:
    """The latency of each file on ``inputs``, (n, *shape), the files taking turns; no more than ``rounds`` or ``seconds`` for each."""
    return timed([lambda each=each: each.run(inputs) for each in files], rounds, seconds)  # type: ignore[misc]


def timed(calls: Sequence[Callable[[], object]], rounds: int = ROUNDS, seconds: float = SECONDS) -> list[Latency]:
    """The latency of each call, the calls taking turns after two rounds that do not count."""
    taken: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds * len(calls)
    for number in range(-2, rounds):
        for call, found in zip(calls, taken, strict=True):
            start = time.perf_counter()
            call()
            if number >= 0:
                found.append(1000 * (time.perf_counter() - start))
        if number >= 5 and time.perf_counter() > end:
            break
    return [_latency(found) for found in taken]


def _latency(milliseconds: list[float]) -> Latency:
    low, middle, high = statistics.quantiles(milliseconds, n=4)
    return Latency(middle, low, high)
