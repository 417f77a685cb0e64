"""Ranges of activations from what passes through the student."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor, nn

from datafree.errors import NetworkError
from datafree.plan import QSpec
from datafree.quant.insert import quantizers
from datafree.quant.precision import float64
from datafree.quant.quantizer import Quantizer
from datafree.quant.ranges import Rule, channel_rows, fit, from_range

Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]
_SAMPLE = 200_000
_THIN = (5**0.5 - 1) / 2  # the golden ratio: its stride falls into step with no number of channels


@torch.no_grad()
def observe(
    student: nn.Module,
    batches: Iterable[Tensor],
    rule: Rule,
    run: Callable[[nn.Module, Tensor], object],
    reach: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """Set the range of every activation quantizer from what passes it while ``run(student, batch)`` is called.

    Meanwhile activations pass unchanged, weights are quantized, and the student stays in its mode (call ``eval`` first). Of more than
    200 000 values at a point ``mse`` looks at a part, and at the extremes. ``reach``: of some points, how many times as far as what was
    seen values may reach; half of them are taken to. Raises NetworkError, naming points that saw nothing.
    """
    points = quantizers(student)
    if not points:
        return
    seen = {point: _Seen(quantizer.spec, keep=rule == "mse") for point, quantizer in points.items()}
    watch(student, batches, {point: each.watch for point, each in seen.items()}, run)
    _check_seen([point for point in points if seen[point].low is None])
    for point, quantizer in points.items():
        seen[point].check(point)
        quantizer.set(*seen[point].range(rule, reach.get(point, 1.0)))


@torch.no_grad()
def observe_percentile(
    student: nn.Module, batches: Iterable[Tensor], percentile: float, run: Callable[[nn.Module, Tensor], object]
) -> None:
    """As :func:`observe`, with ranges that hold so many percent of the values at either end: the mean of each end over the batches."""
    points = quantizers(student)
    ends: dict[str, list[Tensor]] = {point: [] for point in points}

    def looking(point: str) -> Hook:
        def look(module: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> Tensor:
            rows = channel_rows(args[0], points[point].spec.axis)
            beyond = round(rows.shape[1] * (1 - percentile / 100))
            low, high = (rows.kthvalue(place, dim=1).values for place in (1 + beyond, rows.shape[1] - beyond))
            ends[point].append(torch.stack([low, high]))
            return args[0]

        return look

    watch(student, batches, {point: looking(point) for point in points}, run)
    _check_seen([point for point, seen in ends.items() if not seen])
    for point, quantizer in points.items():
        _set_ends(quantizer, torch.stack(ends[point]).mean(0))


@torch.no_grad()
def observe_moving(student: nn.Module, batches: Iterable[Tensor], run: Callable[[nn.Module, Tensor], object]) -> None:
    """As :func:`observe`, with min-max ranges that move from batch to batch and quantize what passes: GDFQ's (arXiv 2003.03603).

    Differs: the momentum at batch n is min(0.9, 1 - 1/n), a mean at first, since the published correction of the bias writes its result
    back into what it corrects, and takes a constant 1 to 4000 before it comes back.
    """
    points = quantizers(student)
    ends: dict[str, tuple[int, Tensor]] = {}

    def moving(point: str) -> Hook:
        quantizer = points[point]

        def move(module: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> Tensor:
            rows = channel_rows(args[0], quantizer.spec.axis)
            found = torch.stack([rows.amin(1), rows.amax(1)])
            n, before = ends.get(point, (0, found))
            ends[point] = n + 1, found.lerp(before, min(0.9, 1 - 1 / (n + 1)))
            _set_ends(quantizer, ends[point][1])
            return quantizer.forward(args[0])

        return move

    watch(student, batches, {point: moving(point) for point in points}, run)
    _check_seen([point for point in points if point not in ends])


@contextmanager
def unset_pass(student: nn.Module) -> Iterator[None]:
    """While it lasts, activations pass unchanged where no range has been set."""
    handles = [each.register_forward_hook(_pass) for each in quantizers(student).values() if not each.ready]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pass(module: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> Tensor:
    return args[0]


def _set_ends(quantizer: Quantizer, ends: Tensor) -> None:
    """The range between ``ends``, (2, channels)."""
    scale, zero = from_range(ends[0], ends[1], quantizer.spec)
    quantizer.set(*((scale[0], zero[0]) if quantizer.spec.axis is None else (scale, zero)))


def _check_seen(blind: Sequence[str]) -> None:
    if blind:
        raise NetworkError(f"no value passed {', '.join(blind)}: give at least one batch, and leave out points the forward pass skips")


@torch.no_grad()
def watch(student: nn.Module, batches: Iterable[Tensor], hooks: Mapping[str, Hook], run: Callable[[nn.Module, Tensor], object]) -> None:
    """Call the forward hook of each point on its quantizer while ``run(student, batch)`` goes over the batches.

    A hook gets ``(quantizer, (x,), quantized)`` and returns what is passed on.
    """
    points = quantizers(student)
    handles = [points[point].register_forward_hook(hook) for point, hook in hooks.items()]
    try:
        for batch in batches:
            run(student, batch)
    finally:
        for handle in handles:
            handle.remove()


class _Seen:
    """The extremes of what passed a point, and a sample of it where ``keep`` is set; a row for each channel."""

    def __init__(self, spec: QSpec, keep: bool) -> None:
        self.spec, self.keep, self.rate = spec, keep, 1.0
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self.sample: Tensor | None = None

    def watch(self, module: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> Tensor:
        """Forward hook of the quantizer: note its input and let that pass."""
        x = args[0]
        if self.spec.axis is None:  # in the order of memory, so that nothing is copied
            x = x.permute(sorted(range(x.dim()), key=x.stride, reverse=True))
        rows = channel_rows(x, self.spec.axis, check=False)  # the extremes tell at the end
        low, high = rows.amin(1), rows.amax(1)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        if self.keep:
            self._keep(rows)
        return args[0]

    def check(self, point: str) -> None:
        """Raises NetworkError where something that was seen is not finite."""
        if self.low is None or self.high is None or not torch.isfinite(torch.stack([self.low, self.high])).all():
            raise NetworkError(f"{point}: NaN or infinity passed there, no range can be taken: check the weights and the inputs")

    def range(self, rule: Rule, reach: float) -> tuple[Tensor, Tensor]:
        """Scale and zero of all that was seen, half of it taken to reach ``reach`` times as far."""
        assert self.low is not None and self.high is not None
        if self.sample is not None:
            rows = torch.cat([self.sample, self.low[:, None], self.high[:, None]], dim=1)
            rows = rows if reach == 1.0 else torch.cat([rows, reach * rows], dim=1)
            return fit(rows, self.spec if self.spec.axis is None else replace(self.spec, axis=0), rule)
        scale, zero = from_range(reach * self.low, reach * self.high, self.spec)
        return (scale[0], zero[0]) if self.spec.axis is None else (scale, zero)

    def _keep(self, rows: Tensor) -> None:
        kept = rows[:, :0] if self.sample is None else self.sample
        while (kept.shape[1] + rows.shape[1] * self.rate) * rows.shape[0] > _SAMPLE:
            kept, self.rate = _thinned(kept, _THIN), self.rate * _THIN
        self.sample = torch.cat([kept, _thinned(rows, self.rate)], dim=1)


def _thinned(rows: Tensor, rate: float) -> Tensor:
    """Evenly spaced columns, ``rate`` of them."""
    if rate == 1.0:
        return rows
    count = int(rows.shape[1] * rate)
    places = float64(torch.arange(count, device=rows.device)) / rate
    return rows[:, places.long().to(rows.device)]
