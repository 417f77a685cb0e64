"""Write methods.md from the dataclasses of the methods: ``python docs/generate.py``."""

from pathlib import Path

from datafree.method import methods
from datafree.show import method_report

PAGE = Path(__file__).with_name("methods.md")
HEAD = """\
<!-- Written by docs/generate.py from the dataclasses in datafree/methods: change those, then run it again. -->

# Methods

Each is a frozen dataclass; its fields are flags of the command line as well: `weight_range` is `--weight-range`, and a
field that is `True` or `False` has `--no-...` too. [How to choose](index.md).
"""


def page() -> str:
    """The whole page: for each method its source, its docstring and a table of its fields."""
    return "\n".join([HEAD, *(section(method_report(name, cls)) for name, cls in methods().items())])


def section(report: dict[str, object]) -> str:
    """One method."""
    rows = [row(f"`{each['name']}`", values(each), f"`{each['default']}`", each["help"]) for each in report["fields"]]
    table = "\n".join([row("field", "values", "default", "what it does"), row(*["---"] * 4), *rows])
    doc = str(report["doc"]).replace("``", "`")
    return f"## {report['name']}\n\n{report['source']}\n\n{doc}\n\n{table if rows else 'It has no fields.'}\n"


def values(field: dict[str, object]) -> str:
    """What a field may hold: its choices, or its type."""
    return ", ".join(f"`{each}`" for each in field["choices"]) if field["choices"] else f"`{field['type']}`"


def row(*cells: object) -> str:
    """One line of a table, in which a bar inside a cell does no harm."""
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
