"""What the docs say is so: every Python snippet and every command runs, links lead somewhere, the page of methods is up to date."""

import re
import shlex
from pathlib import Path

import pytest

import datafree.method
from datafree.cli import main
from docs.generate import PAGE, page, row, section

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(path: Path, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(path.read_text()) if kind == language]


@pytest.mark.parametrize("path", [path for path in PAGES if blocks(path, "python")], ids=lambda path: path.name)
def test_snippets_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of one page in order, each with the names of those before it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datafree.method, "_table", dict(datafree.methods()))  # a snippet may add a method
    names: dict[str, object] = {"__name__": f"snippets of {path.name}"}
    for snippet in blocks(path, "python"):
        exec(compile(snippet, f"{path.name}: {snippet.partition(chr(10))[0]}", "exec"), names)


@pytest.mark.parametrize("path", [ROOT / "docs" / "index.md"], ids=lambda path: path.name)
def test_commands_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the README run among the tests of the command line."""
    monkeypatch.chdir(tmp_path)
    lines = [line for block in blocks(path, "") for line in block.splitlines() if line.startswith("datafree ")]
    assert lines and all(main(shlex.split(line, comments=True)[1:]) == 0 for line in lines)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", BLOCK.sub("", path.read_text())):
        assert target.startswith("https://") or (path.parent / target).exists(), f"{path.name} links to {target}"


def test_the_page_of_methods_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "the methods have changed: run python docs/generate.py"


def test_every_method_and_field_is_on_the_page() -> None:
    told = page()
    for name, cls in datafree.methods().items():
        assert f"\n## {name}\n" in told
        assert all(f"\n| `{field}` | " in told for field in cls.__dataclass_fields__)  # type: ignore[attr-defined]


def test_a_method_without_fields_and_a_bar_in_a_cell() -> None:
    assert "It has no fields." in section({"name": "a", "source": "b", "doc": "c", "fields": []})
    assert row("a", "`float | None`") == "| a | `float \\| None` |"
