"""Write methods.md from the dataclasses of the methods and from benchmarks/results: ``python docs/generate.py``."""

import json
import statistics
from collections import defaultdict
from pathlib import Path

from datafree.method import methods
from datafree.show import method_report

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
PAGE = Path(__file__).with_name("methods.md")
HEAD = """\
<!-- Written by docs/generate.py from the dataclasses in datafree/methods and from benchmarks/results: change those, then run it again. -->

# Methods

Each is a frozen dataclass; its fields are flags of the command line as well: `weight_range` is `--weight-range`, and a
field that is `True` or `False` has `--no-...` too. [How to choose](index.md). What was measured is top-1 in percent, the mean over the
seeds, after quantization without data; [results](results.md) has methods side by side, with intervals and times.
"""


def page() -> str:
    """The whole page: for each method its source, its docstring and a table of its fields."""
    rows = measured()
    return "\n".join([HEAD, *(section(method_report(name, cls)) + rows.get(name, "") for name, cls in methods().items())])


def section(report: dict[str, object]) -> str:
    """One method."""
    rows = [row(f"`{each['name']}`", values(each), f"`{each['default']}`", each["help"]) for each in report["fields"]]
    table = "\n".join([row("field", "values", "default", "what it does"), row(*["---"] * 4), *rows])
    doc = str(report["doc"]).replace("``", "`")
    return f"## {report['name']}\n\n{report['source']}\n\n{doc}\n\n{table if rows else 'It has no fields.'}\n"


def measured() -> dict[str, str]:
    """By method, the table of its results: those of one network, setting and choice of fields (its label) in a row."""
    found: dict[str, dict[tuple[str, ...], list[dict[str, object]]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(RESULTS.glob("*.json")):
        each = json.loads(path.read_text())
        if "top1" in each:
            found[each["run"]["method"]][each["network"], each["label"], each["setting"]].append(each)
    head = [row("network", "as", "setting", "full precision", "top-1", "seeds"), row(*["---"] * 6)]
    return {name: "\n" + "\n".join([*head, *(outcome(key, each) for key, each in by.items())]) + "\n" for name, by in found.items()}


def outcome(key: tuple[str, ...], found: list[dict[str, object]]) -> str:
    """One row of :func:`measured`."""
    return row(*key, f"{found[0]['float_top1']:.2f}", f"{statistics.mean(each['top1'] for each in found):.2f}", len(found))


def values(field: dict[str, object]) -> str:
    """What a field may hold: its choices, or its type."""
    return ", ".join(f"`{each}`" for each in field["choices"]) if field["choices"] else f"`{field['type']}`"


def row(*cells: object) -> str:
    """One line of a table, in which a bar inside a cell does no harm."""
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
