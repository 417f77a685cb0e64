"""The commands that tell of runs: ``report``, ``compare``, ``manifest``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from datafree import show
from datafree.cli_export import Json, Run
from datafree.errors import MissingExtraError, OutputError
from datafree.export.files import write_whole
from datafree.report.content import content, verdict, verdict_rows
from datafree.report.manifest import manifest, manifest_rows
from datafree.report.runs import Table, open_folder
from datafree.result import strict_json

PAGE, TWIN = "report.html", "report.json"


def report_command(run: Run, /, *, out: Annotated[Path | None, Parameter(help="the page; report.html in RUN unless given")] = None) -> None:
    """Write the report of a run: one page of HTML that works offline, and the same as JSON beside it."""
    found = open_folder(run)
    told = content(found)
    try:
        from datafree.report.page import page
    except ModuleNotFoundError as error:
        raise _no_extra(error) from error
    file = run / PAGE if out is None else out
    twin = write_whole(file.with_suffix(".json"), (strict_json(told) + "\n").encode())
    html = write_whole(file, page(told, found.pictures).encode())
    _stdout().print(f"wrote {html} ({html.stat().st_size / 1000:.0f} kB) and {twin}", soft_wrap=True)


def compare_command(
    *runs: Run,
    html: Annotated[Path | None, Parameter(help="write a page of HTML as well")] = None,
    json: Json = False,
) -> None:
    """Lay the figures of runs side by side."""
    if not runs:
        raise OutputError("give the folders of the runs to compare")
    found = {str(run): verdict(open_folder(run)) for run in runs}
    if json:
        show.show_json(_stdout(), found)
    else:
        show.show_side_by_side(_stdout(), {name: verdict_rows(told) for name, told in found.items()})
    if html is not None:
        write_whole(html, _comparison_page(found).encode())
        if not json:
            _stdout().print(f"wrote {html}", soft_wrap=True)


def manifest_command(run: Run, /, *, json: Json = False) -> None:
    """Tell what went into a run: the network, the method, every file that was read, the seed, the versions."""
    told = manifest(open_folder(run))
    if json:
        show.show_json(_stdout(), told)
    else:
        show.show_rows(_stdout(), manifest_rows(told))


def _comparison_page(runs: Mapping[str, Table]) -> str:
    try:
        from datafree.report.page import comparison_page
    except ModuleNotFoundError as error:
        raise _no_extra(error) from error
    return comparison_page(runs)


def _no_extra(error: ModuleNotFoundError) -> MissingExtraError:
    return MissingExtraError(f"{error.name} is not installed: pip install 'datafree[report]'")


def _stdout() -> Console:
    return Console(highlight=False, markup=False, emoji=False)
