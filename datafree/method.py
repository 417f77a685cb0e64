"""What a method is, and the table of methods found in ``datafree/methods``.

A method is a frozen dataclass with one ``run``. Its fields are the paper's hyper-parameters, each made by :func:`option`
with a help text; the command line, the JSON, the docs and the contract tests are derived from them.
"""

import importlib
import math
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from types import NoneType, UnionType
from typing import ClassVar, Literal, TypeVar, Union, dataclass_transform, get_args, get_origin

from torch import nn

from datafree.context import Ctx
from datafree.errors import MethodError
from datafree.plan import Target
from datafree.task import Task

T = TypeVar("T")


def option(default: T, help: str, at_least: float | None = None, at_most: float | None = None) -> T:
    """A field of a method: its default, the text that explains it, and the bounds of a number, which join the text."""
    bounds = _bounds(at_least, at_most)
    told = f"{help} ({bounds})" if bounds else help
    value: T = field(default=default, metadata={"help": told, "at_least": at_least, "at_most": at_most})
    return value


class Method(ABC):
    """A way to quantize a network: subclasses are final, and made with :func:`method`."""

    name: ClassVar[str]
    shares_work: ClassVar[bool] = False  # whether it is quicker in several processes: it trains something in ``fit``

    @abstractmethod
    def run(self, teacher: nn.Module, task: Task, target: Target, ctx: Ctx) -> nn.Module:
        """Make the student. The teacher is in eval mode and must not be changed."""

    def check(self) -> None:
        """Raise MethodError where a field holds what its type or its bounds do not allow; a number must be finite."""
        for each in fields(self):  # type: ignore[arg-type]
            value = getattr(self, each.name)
            low, high = each.metadata.get("at_least"), each.metadata.get("at_most")
            outside = isinstance(value, int | float) and (low is not None and value < low or high is not None and value > high)
            if outside or not _fits(value, each.type):
                raise MethodError(f"{self.name}: {each.name} cannot be {value!r}: {_expected(each.type, _bounds(low, high))}")


def _fits(value: object, kind: object) -> bool:
    """Whether ``value`` is of the type ``kind`` of a field; a whole number serves as a float, a bool never as a number."""
    if get_origin(kind) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(kind))
    if get_origin(kind) in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(kind))
    if kind in (int, float) and isinstance(value, int):
        return not isinstance(value, bool)
    if kind is float:
        return isinstance(value, float) and math.isfinite(value)
    plain = get_origin(kind) or kind
    assert isinstance(plain, type), f"a field of a method has no type that can be checked: {kind!r}"
    return isinstance(value, plain)


def choices(kind: object) -> tuple[object, ...] | None:
    """What a field of the type ``kind`` may be, None among it where it is optional; None where that cannot be listed."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else ()
    listed = [(None,) if part is NoneType else choices(part) for part in parts]
    return tuple(each for part in listed for each in part or ()) if any(parts) and all(listed) else None


def _expected(kind: object, bounds: str) -> str:
    if listed := choices(kind):
        return f"choose from {', '.join(map(str, listed))}"
    names: dict[object, str] = {bool: "True or False", int: "a whole number", float: "a finite number", NoneType: "None"}
    parts: tuple[object, ...] = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    told = " or ".join(names.get(part) or str(getattr(part, "__name__", part)) for part in parts)
    return f"expected {told}{f', {bounds}' if bounds else ''}"


def _bounds(low: float | None, high: float | None) -> str:
    if low is not None and high is not None:
        return f"{low:g} to {high:g}"
    return f"at least {low:g}" if low is not None else f"at most {high:g}" if high is not None else ""


_table: dict[str, type[Method]] = {}
M = TypeVar("M", bound=Method)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(option,))
def method(name: str) -> Callable[[type[M]], type[M]]:
    """Make a class a method called ``name``: a frozen, keyword-only dataclass, entered in the table."""

    def enter(cls: type[M]) -> type[M]:
        if name in _table:
            raise MethodError(f"two methods are called {name!r}: {_table[name].__module__} and {cls.__module__}")
        made = dataclass(frozen=True, kw_only=True)(cls)
        made.name = name
        _table[name] = made
        return made

    return enter


def methods() -> dict[str, type[Method]]:
    """All methods by name, sorted. A method that cannot be imported raises its own error."""
    package = importlib.import_module("datafree.methods")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return dict(sorted(_table.items()))


def find_method(name: str) -> type[Method]:
    """The method called ``name``. Raises MethodError, listing the choices."""
    table = methods()
    if name not in table:
        raise MethodError(f"unknown method {name!r}: choose from {', '.join(table)}")
    return table[name]
