"""What a method is: options with bounds, the checks of their values, the table and the scan of the folder."""

import importlib
import sys
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import pytest
from torch import nn

import datafree.method
from datafree.context import Ctx
from datafree.errors import MethodError
from datafree.method import Method, find_method, method, methods, option
from datafree.plan import Target
from datafree.task import Task

MINE = """
from torch import nn
from datafree.method import Method, method

@method("mine")
class Mine(Method):
    def run(self, teacher, task, target, ctx):
        return teacher
"""


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> dict[str, type[Method]]:
    """A copy of the table of methods, so that those of these tests stay out of the others."""
    copied = dict(methods())
    monkeypatch.setattr(datafree.method, "_table", copied)
    return copied


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """One more folder that the scan looks into."""
    package = sys.modules["datafree.methods"]
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    before = set(sys.modules)
    yield tmp_path
    for name in {name for name in sys.modules if name.startswith("datafree.methods.")} - before:
        del sys.modules[name]
        delattr(package, name.rpartition(".")[2])


def made(**values: object) -> Method:
    """A method with a field of every kind, entered in the table as ``every``."""

    @method("every")
    class Every(Method):
        mode: Literal["fast", "good"] = option("fast", "how")
        shape: Literal["flat", "steep"] | None = option(None, "form")
        steps: int = option(10, "how many", at_least=1)
        rate: float = option(0.5, "how quick", at_least=0, at_most=1)
        most: float = option(0.0, "a power of ten", at_most=3)
        flag: bool = option(True, "whether")
        limit: float | None = option(None, "a bound of its own", at_least=0)
        name_of_it: str = option("a", "a name")
        sizes: tuple[int, ...] = option((1, 2), "sizes")

        def run(self, teacher: nn.Module, task: Task, target: Target, ctx: Ctx) -> nn.Module:
            return teacher

    return Every(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("mode", "best", "choose from fast, good"),
        ("mode", ["fast"], "choose from fast, good"),
        ("shape", "round", "choose from flat, steep, None"),
        ("steps", 0, "expected a whole number, at least 1"),
        ("steps", 2.0, "expected a whole number, at least 1"),
        ("steps", True, "expected a whole number, at least 1"),
        ("rate", 1.5, "expected a finite number, 0 to 1"),
        ("rate", -0.1, "expected a finite number, 0 to 1"),
        ("rate", float("nan"), "expected a finite number, 0 to 1"),
        ("rate", "0.5", "expected a finite number, 0 to 1"),
        ("rate", None, "expected a finite number, 0 to 1"),
        ("most", 4, "expected a finite number, at most 3"),
        ("most", float("-inf"), "expected a finite number, at most 3"),
        ("flag", 1, "expected True or False"),
        ("limit", -1.0, "expected a finite number or None, at least 0"),
        ("limit", float("inf"), "expected a finite number or None, at least 0"),
        ("name_of_it", 3, "expected str"),
        ("sizes", [1], "expected tuple"),
    ],
)
def test_a_value_that_does_not_fit_is_told(field: str, value: object, expected: str) -> None:
    with pytest.raises(MethodError) as caught:
        made(**{field: value}).check()
    assert str(caught.value) == f"every: {field} cannot be {value!r}: {expected}"


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"mode": "good", "steps": 1, "rate": 0, "most": 3, "flag": False, "limit": None},
        {"rate": 1.0, "steps": 10**400, "limit": 0, "most": -1e9},
    ],
)
def test_a_value_on_the_bound_and_a_whole_number_for_a_float_pass(values: dict[str, object]) -> None:
    made(**values).check()


def test_true_is_no_choice_among_numbers() -> None:
    @method("numbers")
    class Numbers(Method):
        order: Literal[1, 2] = option(1, "the order")

        def run(self, teacher: nn.Module, task: Task, target: Target, ctx: Ctx) -> nn.Module:
            return teacher

    Numbers(order=2).check()
    with pytest.raises(MethodError, match="order cannot be True: choose from 1, 2"):
        Numbers(order=True).check()  # type: ignore[arg-type]


def test_bounds_join_the_help_and_stand_in_the_metadata() -> None:
    every: dict[str, MappingProxyType[object, object]] = {each.name: each.metadata for each in fields(made())}  # type: ignore[arg-type]
    assert every["rate"] == {"help": "how quick (0 to 1)", "at_least": 0, "at_most": 1}
    assert every["steps"]["help"] == "how many (at least 1)" and every["most"]["help"] == "a power of ten (at most 3)"
    assert every["flag"] == {"help": "whether", "at_least": None, "at_most": None}


def test_a_method_is_frozen_and_takes_keywords_only() -> None:
    chosen = made()
    with pytest.raises(FrozenInstanceError):
        chosen.mode = "good"  # type: ignore[attr-defined]
    with pytest.raises(TypeError):
        type(chosen)("good")  # type: ignore[call-arg]


def test_two_methods_of_one_name_are_refused(table: dict[str, type[Method]]) -> None:
    first = type(made())
    with pytest.raises(MethodError, match=rf"two methods are called 'every': {__name__} and {__name__}"):
        made()
    assert table["every"] is first


@pytest.mark.parametrize("name", methods())
def test_every_method_passes_its_own_checks_and_explains_each_field(name: str) -> None:
    cls = find_method(name)
    cls().check()
    assert cls.name == name and cls.__doc__
    for each in fields(cls):  # type: ignore[arg-type]
        assert each.metadata["help"], each.name


@pytest.mark.parametrize(("field", "value"), [("rho", 1.1), ("rho", -0.1), ("lambda1", -1), ("lambda2", -1e-9), ("lambda1", float("inf"))])
def test_bounds_of_dfmpc(field: str, value: float) -> None:
    with pytest.raises(MethodError, match=f"dfmpc: {field} cannot be"):
        find_method("dfmpc")(**{field: value}).check()


def test_an_unknown_method_lists_the_choices() -> None:
    with pytest.raises(MethodError) as caught:
        find_method("dfmcp")
    assert str(caught.value) == f"unknown method 'dfmcp': choose from {', '.join(sorted(methods()))}"


def test_the_scan_finds_a_new_file(folder: Path) -> None:
    before = list(methods())
    (folder / "mine.py").write_text(MINE)
    importlib.invalidate_caches()  # the folder was looked into a moment ago
    assert list(methods()) == sorted([*before, "mine"])
    assert find_method("mine")().name == "mine"


@pytest.mark.parametrize(("source", "error"), [("import no_such_module", ModuleNotFoundError), ("1 / 0", ZeroDivisionError)])
def test_the_scan_lets_errors_through(folder: Path, source: str, error: type[Exception]) -> None:
    (folder / "broken.py").write_text(source)
    with pytest.raises(error):
        methods()
