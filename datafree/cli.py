"""The command ``datafree``: one function for each command, flags derived from frozen dataclasses."""

import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
from cyclopts import App, CycloptsError, Parameter
from cyclopts.help import ColumnSpec, DefaultFormatter, DescriptionRenderer, HelpEntry
from rich.console import Console, RenderableType
from rich.console import Group as Stack
from rich.padding import Padding

from datafree import parallel, show
from datafree.api import load, quantize, with_estimate, with_layers
from datafree.checks import check_network
from datafree.cli_export import bench_speed_command, export_command, verify_command
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
from datafree.cli_report import compare_command, manifest_command, report_command
from datafree.cli_search import search_command
from datafree.context import Ctx
from datafree.errors import DataError, DatafreeError, VerifyError
from datafree.export.files import write_whole
from datafree.graph.flow import read
from datafree.graph.plain import teacher_of
from datafree.graph.swap import frozen_copy
from datafree.input_check import input_warning
from datafree.measure.accuracy import Comparison, compare, evaluate
from datafree.measure.data import Data, find_data, open_data
from datafree.method import Method, find_method, methods, option
from datafree.networks import EMBEDDED, Network
from datafree.plan import Plan, Protocol, Target
from datafree.report.evidence import recorder
from datafree.report.runs import RUN_FILE
from datafree.result import Result, check_free, strict_json
from datafree.task import Task

DEMO_RUNS = (("anchor", (2, 6)), ("dfmpc", (2, 6)), ("anchor", (4,)), ("dfmpc", (4,)), ("rtn", (4,)))
DIGITS = "digits"  # the network of the demo, and the name of the held-out digits as data
STACKED_BELOW = 72  # columns, below which help stands under its flag, so that no flag is broken in two
_TARGET = Target()


@dataclass(frozen=True)
class QuantizeFlags:
    """What is asked for, and where it goes."""

    weight_bits: Ints = option(_TARGET.widths, "one width, or low,high for the pairing of DF-MPC")
    act_bits: ActBits = option(_TARGET.act_bits, "bits of the activations")
    protocol: Protocol = option(_TARGET.protocol, "what is quantized: see the README")
    plan: Path | None = option(
        None, "a file that 'search' wrote: the bits of all layers and activations, in place of --weight-bits and --act-bits"
    )
    max_bytes: int | None = option(None, "what the packed weights may take")
    keep: Names = option((), "layers that stay in float")
    float_shortcuts: bool = option(False, "quantize activations only where layers take them in, not in residual sums")
    seed: Seed = option(0, "of every random draw")
    data: str | None = option(None, "labelled data, for measuring only, once all is done; the word digits: those held out")
    out: Path | None = option(None, "a new folder; runs/NET-METHOD-... unless given")
    keep_pictures: Annotated[bool, Parameter(negative=())] = option(
        False, "keep the inputs that the method makes; they may leak statistics of the training data"
    )
    json: Json = option(False, "print JSON instead of a table")


_QUANTIZE = QuantizeFlags()
_QuantizeFlags = Annotated[QuantizeFlags, Parameter(name="*")]


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns 0, 2 after an error that is the user's to mend, 3 where a file failed its check, or 130 if interrupted."""
    given = sys.argv[1:] if argv is None else argv
    try:
        _app(given)(given)
    except CycloptsError as error:
        error.verbose = False
        return _fail(f"{error} (see datafree {' '.join((*(error.command_chain or ()), '--help'))})")
    except VerifyError as error:
        return _fail(str(error), 3)
    except DatafreeError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    return 0


def _stacked(entry: HelpEntry) -> RenderableType:
    return Stack(" ".join(entry.display_labels_with_metavar), Padding(DescriptionRenderer()(entry), (0, 0, 0, 4)))


def _fail(message: str, code: int = 2) -> int:
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr)
    return code


def _app(argv: Sequence[str]) -> App:
    stacked = (ColumnSpec(renderer=_stacked),)
    app = App(
        name="datafree",
        help="Quantize a trained network without any data.",
        version=version("datafree"),
        help_formatter=DefaultFormatter(column_specs=stacked if _stdout().width < STACKED_BELOW else None),
        default_parameter=Parameter(negative_iterable=(), negative_none=()),
        result_action="return_none",
        exit_on_error=False,
        print_error=False,
        suppress_keyboard_interrupt=False,
    )
    app.command(_demo, name="demo")
    app.command(_methods, name="methods")
    app.command(_inspect, name="inspect")
    app.command(_quantize_command(_method_in(argv)), name="quantize")
    app.command(search_command(_method_in(argv)), name="search")
    app.command(_evaluate, name="evaluate")
    app.command(report_command, name="report")
    app.command(compare_command, name="compare")
    app.command(manifest_command, name="manifest")
    app.command(export_command, name="export")
    app.command(verify_command, name="verify")
    app.command(bench_speed_command, name="bench-speed")
    return app


def _method_in(argv: Sequence[str]) -> type[Method]:
    """The method that the command line names: the other flags depend on it."""
    name = DEFAULT_METHOD
    for index, token in enumerate(argv):
        if token.startswith("--method="):
            name = token.partition("=")[2]
        elif token == "--method" and index + 1 < len(argv):
            name = argv[index + 1]
    return find_method(name)


def _quantize_command(chosen: type[Method]) -> Callable[..., None]:
    default = chosen()

    def command(
        net: Net,
        /,
        *,
        method: str = DEFAULT_METHOD,
        flags: _QuantizeFlags = _QUANTIZE,
        network: NetworkGroup = NETWORK,
        own: Method = default,
    ) -> None:
        _quantize(net, flags, replace(network, device=parallel.join(network.device)), own)

    return for_method(command, chosen, "Quantize a network and save what came of it.", QuantizeFlags)


# ---------------------------------------------------------------- the commands


def _demo(*, out: Annotated[Path | None, Parameter(help="a new folder; datafree-demo unless given")] = None) -> None:
    """Quantize the embedded network in several ways and measure each on held-out digits."""
    folder = _fresh(Path("datafree-demo")) if out is None else check_free(out)
    network = open_network(DIGITS, NETWORK)
    console = _stdout()
    found: list[tuple[Result, Comparison]] = []
    with show.progress(_stderr()) as listen:
        for method, bits in DEMO_RUNS:
            result = quantize(network.model, network.task, method=method, target=Target(weight_bits=bits), on_event=listen)
            data, name = _data(DIGITS, DIGITS, network.task)
            comparison = compare(network.model, result.student, network.task, data, listen)
            result = _measured(_named(result, DIGITS, network), name, comparison)
            result.save(folder / f"{method}-w{'-'.join(map(str, bits))}")
            found.append((result, comparison))
    console.print(f"A network for handwritten digits ({found[0][1].paired.total} held out), quantized without data:\n")
    show.show_demo(console, found)
    console.print("The held-out digits served only to measure: no method saw them.")
    console.print(f"files: {folder}", soft_wrap=True)


def _methods(
    name: Annotated[str | None, Parameter(help="one method, to be told in full")] = None,
    /,
    *,
    verbose: Annotated[bool, Parameter(help="tell all methods in full", negative=())] = False,
    json: Json = False,
) -> None:
    """List the methods, or tell one in full."""
    table = methods() if name is None else {name: find_method(name)}
    console = _stdout()
    if json:
        show.show_json(console, [show.method_report(*each) for each in table.items()])
    elif verbose or name is not None:
        for each in table.items():
            show.show_method(console, *each)
    else:
        show.show_methods(console, table)
        console.print("\n'datafree methods NAME' tells one in full.")


def _inspect(net: Net, /, *, network: NetworkGroup = NETWORK, json: Json = False) -> None:
    """Show the layers of a network: what follows each, its role and size, and what cannot be quantized."""
    found = open_network(net, network)
    notes = (*found.notes, *check_network(found.model, found.task))
    ctx = Ctx.create(device=network.device)
    teacher = teacher_of(found.model, found.task, ctx.device)
    flow = read(teacher, found.task, ctx)
    warning = input_warning(teacher, flow, found.task)
    notes = (*notes, *([warning] if warning else []))
    report = show.network_report(found.name, flow, teacher)
    if json:
        show.show_json(_stdout(), {**asdict(report), "notes": notes})
    else:
        show.show_network(_stdout(), report)
        show.show_rows(_stdout(), [("note", note) for note in notes])


def _quantize(net: str, flags: QuantizeFlags, network: NetworkFlags, method: Method) -> None:
    bits = flags.weight_bits[0] if len(flags.weight_bits) == 1 else flags.weight_bits
    plan = None if flags.plan is None else Plan.read(flags.plan)
    target = Target(bits, flags.act_bits, flags.max_bytes, flags.protocol, flags.keep, flags.float_shortcuts, plan)
    method.check()
    if flags.out is not None:
        check_free(flags.out)
    started, heard = datetime.now(UTC).isoformat(timespec="seconds"), recorder()
    with heard.listen() as loading:
        found = open_network(net, network)
    wanted = (flags.out or _fresh(_run_folder(found.name, method.name, target))).absolute()
    if flags.data is not None and not _held_out(flags.data, net):
        find_data(flags.data, found.task)  # a wrong path is told before the work; nothing is opened until the work is done
    with show.progress(_stderr()) as listen:
        with heard.listen() as quantizing:
            result = quantize(
                found.model, found.task, method=method, target=target, seed=flags.seed, device=network.device, on_event=listen,
                folder=wanted.with_name(f".{wanted.name}.resume"),
            )  # fmt: skip
        if parallel.rank():
            return  # the first process does the rest
        result = with_layers(result.keeping_pictures() if flags.keep_pictures else result, found.model)
        result = with_estimate(result, found.model)
        evidence = {"loading": asdict(loading), "quantizing": asdict(quantizing)}
        result = _named(result, net, found)
        result = replace(result, run={**result.run, "started": started, "evidence": evidence})
        folder = result.save(_fresh(_run_folder(found.name, method.name, target)) if flags.out is None else flags.out)
        comparison, data_name, refused = None, "", None
        with heard.listen() as measuring:
            try:  # the student is saved: it stays whatever comes of this
                if flags.data is not None:
                    data, data_name = _data(flags.data, net, found.task)
                    comparison = compare(found.model, result.student, found.task, data, listen)
            except DatafreeError as error:
                refused = error
    result = _measured(result, data_name, comparison)
    result = replace(result, run={**result.run, "evidence": {**evidence, "measuring": asdict(measuring)}})
    write_whole(folder / RUN_FILE, (strict_json(result.run) + "\n").encode())
    if refused is not None:
        how = shlex.join(("datafree", "evaluate", net, "--student", str(folder), "--data", str(flags.data)))
        raise type(refused)(f"{refused}; the student is in {folder} all the same: measure it with '{how}'") from refused
    if flags.json:
        show.show_json(_stdout(), {**result.run, "folder": folder})
        return
    rows = [*show.run_rows(found.name, result, method), *(show.accuracy_rows(comparison) if comparison else ()), *show.note_rows(result)]
    show.show_rows(_stdout(), rows)
    _stdout().print(f"files in {folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}", soft_wrap=True)


def _evaluate(
    net: Net,
    /,
    *,
    data: Annotated[str | None, Parameter(help="labelled data; the held-out digits if NET is digits")] = None,
    student: Annotated[Path | None, Parameter(help="a folder that 'quantize' wrote, to be compared")] = None,
    network: NetworkGroup = NETWORK,
    json: Json = False,
) -> None:
    """Measure top-1 accuracy on labelled data, of a network and of a student saved before."""
    if data is None and net not in EMBEDDED:
        raise DataError("accuracy needs labelled data: give --data PATH")
    found = open_network(net, network)
    notes = (*found.notes, *check_network(found.model, found.task))
    labelled, name = _data(data or DIGITS, net, found.task)
    model = frozen_copy(found.model, torch.device(network.device))
    quantized = None if student is None else load(student, model)
    with show.progress(_stderr()) as listen:
        if quantized is None:
            accuracy = evaluate(model, found.task, labelled, listen)
            report: dict[str, object] = {"data": name, "n": accuracy.total, "top1_full_precision": accuracy.top1}
            rows = [("full precision", show.top1(accuracy))]
        else:
            comparison = compare(model, quantized, found.task, labelled, listen)
            report, rows = show.accuracy_report(name, comparison), [*show.accuracy_rows(comparison)]
    if json:
        show.show_json(_stdout(), {"network": found.name, **report, "notes": notes})
    else:
        show.show_rows(_stdout(), [("network", found.name), ("data", name), *rows, *(("note", note) for note in notes)])


# ---------------------------------------------------------------- pieces


def _stdout() -> Console:
    return Console(highlight=False, markup=False, emoji=False)


def _stderr() -> Console:
    return Console(stderr=True, quiet=parallel.rank() > 0)


def _data(data: str, net: str, task: Task) -> tuple[Data, str]:
    """Labelled data and its name for reports."""
    if _held_out(data, net):
        from datafree.zoo.digits import held_out

        return held_out(), "held-out digits"
    return open_data(data, task), Path(data).name


def _held_out(data: str, net: str) -> bool:
    """Whether ``digits`` means those that come with the network of that name."""
    return data == DIGITS and net in EMBEDDED


def _named(result: Result, net: str, network: Network) -> Result:
    """The result with the network's name in its record, and with what was noted when it was loaded."""
    notes = result.run["notes"]
    assert isinstance(notes, list)
    return replace(result, run={"net": net, "network": network.name, **result.run, "notes": [*network.notes, *notes]})


def _measured(result: Result, data: str, comparison: Comparison | None) -> Result:
    """The result with its accuracy in its record, if that was measured."""
    accuracy = {} if comparison is None else {"accuracy": show.accuracy_report(data, comparison)}
    return replace(result, run={**result.run, **accuracy})


def _run_folder(network: str, method: str, target: Target) -> Path:
    bits = "-".join(map(str, target.widths))
    told = f"w{bits}-a{target.act_bits or 'float'}" if target.plan is None else "plan"
    name = f"{network}-{method}-{told}-{target.protocol}"
    return Path("runs") / re.sub(r"[^\w.-]+", "-", name)


def _fresh(folder: Path) -> Path:
    """``folder``, or the first of folder-2, folder-3, ... that does not exist."""
    found, number = folder, 1
    while found.exists():
        number += 1
        found = folder.with_name(f"{folder.name}-{number}")
    return found
