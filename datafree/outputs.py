"""What a network returned, taken apart: its tensors by name, and the task's answer among them."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import final

import torch
from torch import Tensor

from datafree.errors import NetworkError


def answer_of(result: object, output: int | str | None) -> Tensor:
    """The task's answer among what a network returned.

    Args:
        result: a tensor, or tensors in a tuple, list, mapping or dataclass; a list of mappings or dataclasses, one for each input of the
            batch, counts as one of their parts, stacked.
        output: the position in a tuple or list, the key of a mapping, the field of a dataclass, or a name as in :func:`named_outputs`;
            None where there is one tensor only.

    Raises NetworkError, which lists what was returned, where that names no tensor.
    """
    return _pick(_gathered(result), output)


def named_outputs(result: object, output: int | str | None) -> dict[str, Tensor]:
    """All tensors that a network returned, by name, the task's answer first.

    Parts of a mapping are named by their keys, those of a dataclass or named tuple by their fields; of a tuple or list the answer is
    ``output``, the others ``output_0``, ``output_1`` and so on by their positions. Names of nested parts are joined: ``maps_0``.

    Raises NetworkError as :func:`answer_of` does, and where two parts have one name.
    """
    gathered = _gathered(result)
    answer, found = _pick(gathered, output), _tensors(gathered)
    own = next(name for name, tensor in found.items() if tensor is answer)
    others = {name: tensor for name, tensor in found.items() if name != own}
    name = "output" if _unnamed(gathered) else own
    if name in others:
        raise NetworkError(f"two parts of what the network returned are called {name!r}: rename one")
    return {name: answer, **others}


def left_out(result: object) -> tuple[str, ...]:
    """The names of parts that are no tensors, such as numbers and text; a part that is None is none."""
    return tuple(name for name, part in _leaves(_gathered(result)).items() if not isinstance(part, Tensor))


def one_for_each_input(result: object) -> bool:
    """Whether the network returned a list with a mapping or dataclass for each input of the batch, as torchvision's detectors do."""
    if not isinstance(result, list) or not result or any(_unnamed(part) or _children(part) is None for part in result):
        return False
    return len({tuple(_children(part) or ()) for part in result}) == 1


def _gathered(result: object) -> object:
    """One mapping instead of one for each input; a part whose shapes differ stays a list."""
    if not one_for_each_input(result):
        return result
    assert isinstance(result, list)
    rows = [_children(part) or {} for part in result]
    return _PerInput({key: _stacked([row[key] for row in rows]) for key in rows[0]})


@final
class _PerInput(dict[str, object]):
    """The parts of all inputs by key."""


def _stacked(parts: list[object]) -> object:
    tensors = [part for part in parts if isinstance(part, Tensor)]
    same = len(tensors) == len(parts) and len({tensor.shape for tensor in tensors}) == 1
    return torch.stack(tensors) if same else parts


def _pick(result: object, output: int | str | None) -> Tensor:
    if isinstance(result, Tensor):
        if output is not None:
            raise NetworkError(f"Task.output is {output!r}, but the network returned a Tensor: leave it out")
        return result
    found = _tensors(result)
    if not found:
        raise NetworkError(f"the network returned a {type(result).__name__} without a tensor: let its forward return its answer")
    part = result if output is None else _part(result, output)
    inside = list(_tensors(part).values())
    if len(inside) == 1:
        return inside[0]
    listed = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in found.items())
    if output is None:
        raise NetworkError(f"the network returned {listed}: choose the answer with Task.output, {_how_to_choose(result)}")
    if isinstance(result, _PerInput) and len(inside) > 1:
        raise NetworkError(
            f"the network returned {listed}: part {output!r} has a different shape for each input: let the network return what it has "
            "before it selects"
        )
    what = f"holds {len(inside)} tensors" if inside else "is none of its parts"
    raise NetworkError(f"the network returned {listed}: Task.output {output!r} {what}; choose {_how_to_choose(result)}")


def _part(result: object, output: int | str) -> object:
    """The part at a position, key, field or joined name; None where there is none."""
    if isinstance(result, Mapping) and output in result:
        return result[output]
    if isinstance(output, int):
        return result[output] if isinstance(result, (tuple, list)) and -len(result) <= output < len(result) else None
    return (_children(result) or {}).get(output, _leaves(result).get(output))


def _how_to_choose(result: object) -> str:
    children = _children(result) or {}
    if _unnamed(result) and all(isinstance(part, Tensor) for part in children.values()):
        return f"a position from 0 to {len(children) - 1}"
    return f"one of {', '.join(map(repr, _tensors(result)))}"


def _tensors(result: object) -> dict[str, Tensor]:
    return {name: part for name, part in _leaves(result).items() if isinstance(part, Tensor)}


def _leaves(result: object) -> dict[str, object]:
    """Whatever is no container, by name. Raises NetworkError where two have one name."""
    found: dict[str, object] = {}
    for name, part in _walk(result, "output" if _unnamed(result) else ""):
        if name in found:
            raise NetworkError(f"two parts of what the network returned are called {name!r}: rename one")
        found[name] = part
    return found


def _walk(value: object, name: str) -> Iterator[tuple[str, object]]:
    children = _children(value)
    if children is not None:
        for key, child in children.items():
            yield from _walk(child, f"{name}_{key}" if name else key)
    elif value is not None:
        yield name, value


def _unnamed(value: object) -> bool:
    """Whether the parts of the value have no names of their own."""
    return isinstance(value, Tensor) or (isinstance(value, (tuple, list)) and not hasattr(value, "_fields"))


def _children(value: object) -> dict[str, object] | None:
    """The parts of a container by key, field or position; None for what is none."""
    if isinstance(value, Mapping):
        return {str(key): part for key, part in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, (tuple, list)):
        return dict(zip(getattr(value, "_fields", map(str, range(len(value)))), value, strict=True))
    return None
