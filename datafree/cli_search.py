"""The command ``search``: the frontier of bytes and expected loss, and the plan on it that meets a bound."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
from cyclopts import Parameter
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from datafree import show
from datafree.bits.pareto import Point
from datafree.cli_flags import (
    DEFAULT_METHOD,
    NETWORK,
    ActBits,
    Ints,
    Json,
    Names,
    Net,
    NetworkFlags,
    NetworkGroup,
    Seed,
    for_method,
    open_network,
)
from datafree.context import Ctx
from datafree.errors import MissingExtraError, OutputError, TargetError
from datafree.export.files import write_whole
from datafree.method import Method, option
from datafree.plan import Protocol, Target
from datafree.planning import WIDTHS, Frontier, Measure, search
from datafree.result import export, strict_json
from datafree.synth.noise import Pictures
from datafree.task import Task

SHOWN = 12  # points of a frontier, which may have hundreds
_TARGET = Target()


@dataclass(frozen=True)
class SearchFlags:
    """What bounds the choice, how loss is told, and where the plan goes."""

    max_bytes: int | None = option(None, "take the plan that is expected to lose least in so many bytes")
    max_drop: float | None = option(
        None, "take the smallest plan that is expected to lose so much at most, in the unit of --by; it is no drop of accuracy"
    )
    by: Measure = option(
        "kl",
        "expected loss: KL divergence of the answers in nats per input, or the noise-to-signal ratio in closed form; both add up layers",
    )
    widths: Ints = option(WIDTHS, "bits that a layer may get")
    act_bits: ActBits = option(_TARGET.act_bits, "bits of the activations")
    protocol: Protocol = option(_TARGET.protocol, "what is quantized: see the README")
    keep: Names = option((), "layers that stay in float")
    float_shortcuts: bool = option(False, "quantize activations only where layers take them in, not in residual sums")
    inputs: Pictures = option("mix", "the pictures that loss is expected on: procedural ones, or ones optimised as ZeroQ's (distilled)")
    latency: Annotated[bool, Parameter(negative=())] = option(False, "time the points that are shown, as ONNX files in ONNX Runtime")
    seed: Seed = option(0, "of every random draw")
    out: Path = option(Path("plan.json"), "a new file for the plan, which 'quantize --plan' takes")
    json: Json = option(False, "print JSON, with all points, instead of a table")


_SEARCH = SearchFlags()
_SearchFlags = Annotated[SearchFlags, Parameter(name="*")]


def search_command(chosen: type[Method]) -> Callable[..., None]:
    """The command for one method, whose fields become flags."""
    default = chosen()

    def command(
        net: Net,
        /,
        *,
        method: str = DEFAULT_METHOD,
        flags: _SearchFlags = _SEARCH,
        network: NetworkGroup = NETWORK,
        own: Method = default,
    ) -> None:
        _search(net, flags, network, own)

    return for_method(command, chosen, "Tell what size costs what loss, and write the plan that meets a bound.", SearchFlags)


def _search(net: str, flags: SearchFlags, network: NetworkFlags, method: Method) -> None:
    bounds = [flags.max_bytes, flags.max_drop]
    if None not in bounds:
        raise TargetError("--max-bytes and --max-drop both choose the plan: give one of them")
    bounded = bounds != [None, None]
    if bounded and flags.out.exists():
        raise OutputError(f"{flags.out} is there already: choose another file with --out, or remove it")
    target = Target(act_bits=flags.act_bits, protocol=flags.protocol, keep=flags.keep, float_shortcuts=flags.float_shortcuts)
    found = open_network(net, network)
    with show.progress(Console(stderr=True)) as listen:
        ctx = Ctx.create(flags.seed, network.device, listen)
        frontier = search(
            found.model, found.task, ctx, method=method, target=target, widths=flags.widths, by=flags.by, inputs=flags.inputs
        )  # fmt: skip
    picked = (
        frontier.within(flags.max_bytes) if flags.max_bytes is not None
        else frontier.losing(flags.max_drop) if flags.max_drop is not None else None
    )  # fmt: skip
    shown = _some(frontier.points, picked)
    latency = _latencies(frontier, shown, found.task) if flags.latency else {}
    if picked is not None:
        write_whole(flags.out, (strict_json(frontier.plan(picked).to_json()) + "\n").encode())
    console = Console(highlight=False, markup=False, emoji=False)
    rows = [_row(point, latency.get(point.size)) for point in (frontier.points if flags.json else shown)]
    if flags.json:
        chosen = None if picked is None else _row(picked, latency.get(picked.size))
        report = {"network": found.name, "method": method.name, "fields": asdict(method), "target": asdict(target)}  # type: ignore[call-overload]
        how = {"by": flags.by, "unit": frontier.unit, "inputs": flags.inputs, "seed": flags.seed}
        show.show_json(console, {**report, **how, "frontier": rows, "picked": chosen, "plan": flags.out if picked else None})
        return
    console.print(_table(rows, None if picked is None else picked.size, flags.latency))
    console.print(f"\n{len(shown)} of {len(frontier.points)} points; loss: {frontier.unit}, expected, on synthetic inputs")
    if picked is not None:
        console.print(f"* {picked.size:,} bytes, expected loss {picked.loss:.3g}; layers: {_counts(picked)}")
        console.print(f"plan: {flags.out}", soft_wrap=True)


def _row(point: Point, latency: float | None) -> dict[str, object]:
    return {"bytes": point.size, "expected_loss": point.loss, "latency_ms": latency, "widths": dict(point.widths)}


def _some(points: Sequence[Point], picked: Point | None) -> list[Point]:
    """Points at even distances on the frontier, its ends and the one that was picked among them."""
    last = len(points) - 1
    places = {round(place * last / (SHOWN - 1)) for place in range(SHOWN)} | ({points.index(picked)} if picked else set())
    return [points[place] for place in sorted(places)]


def _table(rows: Sequence[Mapping[str, object]], picked: int | None, timed: bool) -> Table:
    """Four narrow columns, so that it fits a terminal of 60."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for header in ("", "bytes", "loss", *(["ms"] if timed else []), "bits"):
        table.add_column(header, justify="left" if header in ("", "bits") else "right")
    for row in rows:
        widths = row["widths"]
        assert isinstance(widths, dict)
        bits = f"{min(widths.values())} to {max(widths.values())}, mean {sum(widths.values()) / len(widths):.1f}"
        times = [f"{row['latency_ms']:.2f}"] if timed else []
        table.add_row("*" if row["bytes"] == picked else "", f"{row['bytes']:,}", f"{row['expected_loss']:.3g}", *times, bits)
    return table


def _counts(point: Point) -> str:
    given = list(point.widths.values())
    return ", ".join(f"{given.count(bits)} of {bits} bits" for bits in sorted(set(given)))


def _latencies(frontier: Frontier, points: Sequence[Point], task: Task) -> dict[int, float]:
    """The median milliseconds of one input for each point, by its size: all files take turns in one process."""
    try:
        from datafree.export.runtime import open_file
        from datafree.measure.speed import interleaved
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"{error.name} is not installed: pip install 'datafree[onnx]'") from error

    inputs = task.noise(1, torch.Generator().manual_seed(0)).numpy()
    with tempfile.TemporaryDirectory(prefix="datafree-") as folder:
        files = [export(frontier.student(point.widths).cpu(), task, Path(folder) / f"{point.size}.onnx") for point in points]
        timed = interleaved([open_file(file) for file in files], inputs, seconds=1.0)
    return {point.size: found.median for point, found in zip(points, timed, strict=True)}
