"""What the command line shows: tables, summaries and the progress bar, all of which fold on a narrow terminal."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from inspect import cleandoc, getmodule

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table
from torch import nn

from datafree.bits.cost import float_bytes
from datafree.context import Event
from datafree.graph.chains import pairs, roles
from datafree.graph.coverage import Coverage, coverage
from datafree.graph.flow import Flow
from datafree.measure.accuracy import Accuracy, Comparison
from datafree.method import Method, choices
from datafree.report.content import estimate_text, fidelity_text
from datafree.result import Result, strict_json

NOTE_LENGTH = 300  # a note may name every layer of the network: run.json holds it in full
_COLUMN = 30  # characters that a run needs beside others

Rows = Iterable[tuple[str, str]]


def show_json(console: Console, value: object) -> None:
    """Strict JSON: a number that is not finite becomes null."""
    console.file.write(strict_json(value) + "\n")


def show_rows(console: Console, rows: Rows) -> None:
    """Labels with their texts."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, style="bold")
    grid.add_column(overflow="fold")
    for label, text in rows:
        grid.add_row(label, text)
    console.print(grid)


# ---------------------------------------------------------------- the network


@dataclass(frozen=True)
class LayerRow:
    """A layer as ``inspect`` tells it: ``partner`` is the other layer of its DF-MPC pair, ``bytes`` its size in float."""

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    norm: str | None
    activation: str | None
    role: str
    partner: str | None
    parameters: int
    bytes: int


@dataclass(frozen=True)
class NetworkReport:
    """What ``inspect`` has found; ``coverage`` says what is quantized if every layer is, and what stays in float for which reason."""

    network: str
    layers: tuple[LayerRow, ...]
    coverage: Coverage
    float_bytes: int


def network_report(name: str, flow: Flow, model: nn.Module) -> NetworkReport:
    """The layers of ``flow`` in execution order, and totals."""
    partners: dict[str, str] = {}
    for pair in pairs(flow):
        if pair.high is not None:
            partners |= {pair.low: pair.high, pair.high: pair.low}
    low_or_high = roles(flow)
    rows = []
    for layer in flow.layers.values():
        special = [word for word, holds in (("first", layer.first), ("last", layer.last), ("depthwise", layer.depthwise)) if holds]
        role = ", ".join(special) or low_or_high[layer.name]
        count = sum(parameter.numel() for parameter in model.get_submodule(layer.name).parameters(recurse=False))
        about = (layer.kind, layer.weight_shape, layer.norm, layer.activation, role, partners.get(layer.name))
        rows.append(LayerRow(layer.name, *about, count, 4 * count))
    return NetworkReport(name, tuple(rows), coverage(flow, model, flow.layers), float_bytes(model))


def show_network(console: Console, report: NetworkReport) -> None:
    """A row for each layer, the layers that stay in float with their reasons, and totals."""
    wide = _table("layer", "kind", "weight", "norm", "activation", "role", "pair with", "#parameters", "#float bytes")
    narrow = _table("layer\nrole", "weight\nnorm, activation", "#parameters\nfloat bytes")
    for row in report.layers:
        shape, sizes = "x".join(map(str, row.weight_shape)), (f"{row.parameters:,}", f"{row.bytes:,}")
        wide.add_row(row.name, row.kind, shape, row.norm or "-", row.activation or "-", row.role, row.partner or "-", *sizes)
        role = f"{row.role}, with {row.partner}" if row.partner else row.role
        behind = ", ".join(filter(None, ("norm" if row.norm else None, row.activation)))
        narrow.add_row(f"{row.name}\n{role}", f"{row.kind} {shape}\n{behind}", "\n".join(sizes))
    console.print(_fitting(console, wide, narrow))
    for weight, reason in report.coverage.floats.items():
        console.print(f"{weight} stays in float: {reason}")
    console.print(f"{report.network}: {len(report.layers)} layers that can be quantized, {coverage_text(asdict(report.coverage))}")
    console.print(f"{report.coverage.parameters:,} parameters, {report.float_bytes:,} bytes in float")


# ---------------------------------------------------------------- the methods


def method_report(name: str, method: type[Method]) -> dict[str, object]:
    """A method and its fields, ready for JSON."""
    found = [
        {
            "name": each.name,
            "type": _type_name(each.type),
            "default": each.default,
            "choices": choices(each.type),
            "help": each.metadata["help"],
        }
        for each in fields(method)  # type: ignore[arg-type]
    ]
    text = cleandoc(method.__doc__ or "")
    return {"name": name, "summary": _first_line(text), "source": _source(method), "doc": text, "fields": found}


def show_methods(console: Console, table: Mapping[str, type[Method]]) -> None:
    """Each name with a line on what it does, and where it comes from."""
    show_rows(console, ((name, f"{_first_line(method.__doc__)}\n{_source(method)}") for name, method in table.items()))


def show_method(console: Console, name: str, method: type[Method]) -> None:
    """The whole docstring, and every field with its default and help."""
    console.print(name, style="bold")
    console.print(_source(method) + "\n")
    paragraphs = cleandoc(method.__doc__ or "").replace("``", "").split("\n\n")
    console.print("\n\n".join(" ".join(each.split()) for each in paragraphs))
    options = _table("field", "default", "what it does")
    for each in fields(method):  # type: ignore[arg-type]
        listed = choices(each.type)
        options.add_row(each.name, str(each.default), each.metadata["help"] + (f" [{', '.join(map(str, listed))}]" if listed else ""))
    console.print(options)


# ---------------------------------------------------------------- what came of it


def run_rows(name: str, result: Result, method: Method) -> Rows:
    """The summary of a quantization; as many rows for a large network as for a small one."""
    run = result.run
    chosen = (f"{each.name}={getattr(method, each.name)}" for each in fields(method) if getattr(method, each.name) != each.default)  # type: ignore[arg-type]
    yield "network", name
    yield "method", ", ".join((method.name, *chosen))
    yield "bits", _bits(result)
    yield "protocol", str(run["protocol"])
    yield "size", f"{number(run, 'float_bytes'):,} -> {number(run, 'packed_bytes'):,} bytes packed, {ratio(run)} smaller"
    covered = run["coverage"]
    assert isinstance(covered, dict)
    yield "quantized", coverage_text(covered)
    yield "time", f"{number(run, 'seconds'):.2f} s"
    fidelity = run["fidelity"]
    assert isinstance(fidelity, dict)
    yield "fidelity on noise", f"{fidelity_text(fidelity)}, {fidelity['n']} inputs"
    yield "estimated top-1 drop", estimate_text(run.get("estimate"))


def coverage_text(covered: Mapping[str, object]) -> str:
    """How much of a network is quantized, from the dictionary of a ``Coverage``."""
    parameters = 100 * number(covered, "quantized_parameters") / max(1, number(covered, "parameters"))
    macs = 100 * number(covered, "quantized_macs") / max(1, number(covered, "macs"))
    return f"{parameters:.1f} % of the parameters, {macs:.1f} % of the multiply-adds"


def note_rows(result: Result) -> Rows:
    """What the method noted on the way, long notes shortened; those that say what stays in float are whole."""
    notes = result.run["notes"]
    assert isinstance(notes, list)
    for note in notes:
        whole = len(note) <= NOTE_LENGTH or "float" in note
        yield "note", note if whole else f"{note[:NOTE_LENGTH]} ... (in full in run.json)"


def accuracy_rows(comparison: Comparison) -> Rows:
    """Top-1 of both networks, what was lost, and how their answers pair up."""
    paired = comparison.paired
    yield "full precision", top1(comparison.teacher)
    yield "quantized", top1(comparison.student)
    yield "drop", f"{paired.drop:.2f} points, +- {paired.half_width:.2f} (95 %)"
    yield "paired", f"both right {paired.both}, only original {paired.only_teacher}, only quantized {paired.only_student}"


def accuracy_report(data: str, comparison: Comparison) -> dict[str, object]:
    """Both accuracies and their paired counts, ready for JSON."""
    paired = comparison.paired
    return {
        "data": data,
        "n": paired.total,
        "top1_full_precision": comparison.teacher.top1,
        "top1_quantized": comparison.student.top1,
        "drop": paired.drop,
        "drop_half_width_95": paired.half_width,
        "paired": asdict(paired),
    }


def top1(accuracy: Accuracy) -> str:
    """Percent, and the counts that it stands for."""
    return f"{accuracy.top1:.2f} % ({accuracy.correct} of {accuracy.total})"


def show_demo(console: Console, runs: Sequence[tuple[Result, Comparison]]) -> None:
    """Full precision and every run: accuracy, size, time."""
    headers = ("method", "#accuracy", "#packed bytes", "#seconds")
    wide, narrow = _table(*headers), _table(*headers)
    for table, between in ((wide, ", "), (narrow, "\n")):
        result, comparison = runs[0]
        table.add_row("full precision", f"{comparison.teacher.top1:.2f} %", f"{number(result.run, 'float_bytes'):,}", "")
        for result, comparison in runs:
            paired, run = comparison.paired, result.run
            accuracy = f"{comparison.student.top1:.2f} %{between}-{paired.only_teacher} +{paired.only_student}"
            size = f"{number(run, 'packed_bytes'):,}{between}{ratio(run)}"
            table.add_row(f"{run['method']}{between}{_widths(result)} bits", accuracy, size, f"{number(run, 'seconds'):.2f}")
    console.print(_fitting(console, wide, narrow))
    console.print("\n-: right in full precision only; +: right when quantized only.")


def show_side_by_side(console: Console, runs: Mapping[str, Sequence[tuple[str, str]]]) -> None:
    """A column for each run, whose rows have the same labels; stacked on a narrow terminal."""
    table = _table("", *runs)
    for row in zip(*runs.values(), strict=True):
        table.add_row(row[0][0], *(text for _, text in row))
    if console.width >= _COLUMN * (1 + len(runs)):
        console.print(table)
        return
    for place, (name, rows) in enumerate(runs.items()):
        console.print(f"{'' if place == 0 else chr(10)}{name}", style="bold")
        show_rows(console, rows)


def number(run: Mapping[str, object], key: str) -> int | float:
    """A number of the record of a run."""
    value = run[key]
    assert isinstance(value, int | float)
    return value


def ratio(run: Mapping[str, object]) -> str:
    """How many times smaller the packed weights are."""
    return f"{number(run, 'float_bytes') / number(run, 'packed_bytes'):.1f}x"


# ---------------------------------------------------------------- progress


@contextmanager
def progress(console: Console) -> Iterator[Callable[[Event], None]]:
    """A listener that draws a bar for each stage; on anything but a terminal it draws nothing."""
    if not console.is_terminal:
        yield lambda event: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, expand=True) as bar:
        stages: dict[str, TaskID] = {}

        def show(event: Event) -> None:
            if event.total:
                if event.name not in stages:
                    stages[event.name] = bar.add_task(event.name, total=event.total)
                bar.update(stages[event.name], completed=event.step, total=event.total)

        yield show


# ---------------------------------------------------------------- pieces


def _fitting(console: Console, wide: Table, narrow: Table) -> Table:
    """The wide table if no cell of it must be folded."""
    return wide if console.measure(wide, options=console.options.update(max_width=1000)).maximum <= console.width else narrow


def _table(*headers: str) -> Table:
    """A table without side lines; a header with # is of a column of numbers."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for header in headers:
        table.add_column(header.lstrip("#"), justify="right" if header.startswith("#") else "left", overflow="fold")
    return table


def _first_line(text: str | None) -> str:
    return cleandoc(text or "").partition("\n")[0]


def _source(method: type[Method]) -> str:
    """The first line of the method's file, which names its paper."""
    module = getmodule(method)
    return _first_line(module.__doc__ if module else None)


def _type_name(kind: object) -> str:
    return "choice" if choices(kind) else kind.__name__ if isinstance(kind, type) else str(kind)


def _widths(result: Result) -> str:
    target = result.run["target"]
    assert isinstance(target, dict)
    given = target["weight_bits"]
    return "/".join(map(str, given)) if isinstance(given, tuple) else str(given)


def _bits(result: Result) -> str:
    """What was asked for, and what the layers got."""
    target = result.run["target"]
    assert isinstance(target, dict)
    counts = Counter(layer.weight.bits for layer in result.plan.layers.values())
    layers = ", ".join(f"{count} of {bits} bits" for bits, count in sorted(counts.items()))
    if target["plan"]:
        activations = sorted({spec.bits for spec in result.plan.activations.values()})
        return f"as the plan says (layers: {layers}), activations {'/'.join(map(str, activations)) or 'float'}"
    return f"weights {_widths(result)} (layers: {layers}), activations {target['act_bits'] or 'float'}"
