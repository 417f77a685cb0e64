"""What is quantized and how: plain values, to and from JSON.

A user states a :class:`Target`; a method turns it into a :class:`Plan`; the student carries the plan out.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, get_args

from datafree.errors import TargetError

Grid = Literal["uniform", "ternary", "dorefa"]
Protocol = Literal["deploy", "paper", "dfmpc"]

PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
WEIGHT_BITS = (2, 3, 4, 5, 6, 7, 8)


@dataclass(frozen=True)
class QSpec:
    """How one tensor is quantized.

    Args:
        bits: stored bits per value, 2 to 8 (a ternary value takes 2).
        symmetric: zero point fixed at the middle of the grid (codes ``-n..n``); else codes ``0..2^bits - 1``.
        axis: the axis whose slices have a scale each; None for one scale for the tensor.
        grid: ``uniform``; ``ternary`` (codes -1, 0, 1); ``dorefa`` (``2^bits`` levels in [-max, max], none of them 0).
    """

    bits: int
    symmetric: bool = True
    axis: int | None = None
    grid: Grid = "uniform"

    def __post_init__(self) -> None:
        if self.bits not in WEIGHT_BITS:
            raise TargetError(f"{self.bits} bits are not supported: choose from {_listed(WEIGHT_BITS)}")
        if self.grid not in get_args(Grid):
            raise TargetError(f"unknown grid {self.grid!r}: choose from {_listed(get_args(Grid))}")
        if self.grid == "ternary" and self.bits != 2:
            raise TargetError(f"a ternary grid takes 2 bits a value, not {self.bits}")

    @property
    def levels(self) -> tuple[int, int]:
        """Smallest and largest integer code."""
        if self.grid == "ternary":
            return -1, 1
        if self.grid == "dorefa" or not self.symmetric:
            return 0, 2**self.bits - 1
        return 1 - 2 ** (self.bits - 1), 2 ** (self.bits - 1) - 1


@dataclass(frozen=True)
class LayerPlan:
    """One layer: its weight, and its input where the layer itself quantizes it.

    ``input`` is None where the input arrives as it is: in float, or quantized already at a point of ``Plan.tensors``.
    """

    weight: QSpec
    input: QSpec | None = None


@dataclass(frozen=True)
class Plan:
    """The whole network.

    Args:
        layers: from layer name to its plan, in execution order; a layer that is absent stays float.
        tensors: further quantized tensors, from a point ``"<module>:input"`` or ``"<module>:output"`` to its spec
            (a residual trunk that feeds an addition as well as a layer, say).
    """

    layers: Mapping[str, LayerPlan] = field(default_factory=dict)
    tensors: Mapping[str, QSpec] = field(default_factory=dict)

    @property
    def activations(self) -> dict[str, QSpec]:
        """Every quantized activation by its point, those of ``tensors`` and the inputs of layers."""
        return {**{f"{name}:input": layer.input for name, layer in self.layers.items() if layer.input is not None}, **self.tensors}

    def to_json(self) -> dict[str, object]:
        """A JSON-ready dictionary; :meth:`from_json` is its inverse."""
        return asdict(self)

    @staticmethod
    def read(path: str | Path) -> "Plan":
        """The plan in a file, such as ``plan.json`` of a run. Raises TargetError where there is none, naming the file."""
        try:
            return Plan.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise TargetError(f"the plan {path} cannot be read: {error.strerror or error}") from error
        except ValueError as error:
            raise TargetError(f"the plan {path} is damaged: {error}") from error

    @staticmethod
    def from_json(data: Mapping[str, object]) -> "Plan":
        """Read what :meth:`to_json` wrote. Raises TargetError on anything else."""
        try:
            layers = {
                name: LayerPlan(_spec(entry["weight"]), None if entry["input"] is None else _spec(entry["input"]))
                for name, entry in _table(data["layers"]).items()
            }
            return Plan(layers, {name: _spec(entry) for name, entry in _table(data["tensors"]).items()})
        except (KeyError, TypeError, AttributeError) as error:
            raise TargetError(f"not a plan of datafree: {error!r} while reading it; expected what Plan.to_json gives") from error


def _table(data: object) -> Mapping[str, Mapping[str, object]]:
    if not isinstance(data, Mapping):
        raise TypeError(f"expected a mapping, found {type(data).__name__}")
    return data


def _spec(data: object) -> QSpec:
    if not isinstance(data, Mapping):
        raise TypeError(f"expected a mapping, found {type(data).__name__}")
    return QSpec(**data)


@dataclass(frozen=True)
class Target:
    """What the user asks for.

    Args:
        weight_bits: bits of the weights, one width or several; of two widths (low, high) the low one goes to the low
            layers of the DF-MPC pairing and the high one to the others.
        act_bits: bits of the activations; None keeps them in float.
        max_bytes: the packed weights, scales and biases must not take more.
        protocol: ``deploy`` (all that a runtime computes is quantized; first, last and depthwise layers 8 bits), ``paper`` (all
            weights at the given bits, activations only after an activation function), ``dfmpc`` (weights only).
        keep: names of layers that stay in float.
        float_shortcuts: quantize activations only where a layer takes them in; residual sums add the float tensors. Less is
            lost than a runtime on integers would lose: it is there to compare with figures obtained that way.
        plan: says the bits of every layer and activation, such as one that a search has found; layers that it leaves in float must
            stand in ``keep``, and ``weight_bits`` and ``act_bits`` are left alone. A method whose grids are others refuses it.
    """

    weight_bits: int | tuple[int, ...] = (2, 6)
    act_bits: int | None = None
    max_bytes: int | None = None
    protocol: Protocol = "deploy"
    keep: tuple[str, ...] = ()
    float_shortcuts: bool = False
    plan: Plan | None = None

    def __post_init__(self) -> None:
        for bits in self.widths:
            if bits not in WEIGHT_BITS:
                raise TargetError(f"weight_bits: {bits!r} is not supported: choose from {_listed(WEIGHT_BITS)}")
        if not self.widths or len(self.widths) > 2 and self.max_bytes is None:
            raise TargetError(f"weight_bits {self.weight_bits!r}: give one width or two (low, high)")
        if self.act_bits is not None and self.act_bits not in WEIGHT_BITS:
            raise TargetError(f"act_bits: {self.act_bits!r} is not supported: choose None (float) or from {_listed(WEIGHT_BITS)}")
        if self.protocol not in PROTOCOLS:
            raise TargetError(f"unknown protocol {self.protocol!r}: choose from {_listed(PROTOCOLS)}")
        if self.protocol == "dfmpc" and self.act_bits is not None:
            raise TargetError(f"protocol dfmpc quantizes weights only, but act_bits is {self.act_bits}: use deploy or paper")
        if self.plan is not None:
            if (self.weight_bits, self.act_bits) != (Target.weight_bits, Target.act_bits):
                raise TargetError("a plan says the bits of every layer and activation: leave weight_bits and act_bits out beside it")
            if self.protocol == "dfmpc" and self.plan.activations:
                raise TargetError("protocol dfmpc quantizes weights only, but the plan quantizes activations: use deploy or paper")
        if self.max_bytes is not None and self.max_bytes <= 0:
            raise TargetError(f"max_bytes must be positive, not {self.max_bytes}")

    @property
    def widths(self) -> tuple[int, ...]:
        """The weight widths in rising order."""
        given = self.weight_bits
        return tuple(sorted(given)) if isinstance(given, (tuple, list)) else (given,)


def _listed(choices: tuple[object, ...]) -> str:
    return ", ".join(str(choice) for choice in choices)
