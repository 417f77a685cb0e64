"""Flags that several commands share: how they are read, the network they are about, and those of a method."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter, Token
from cyclopts.validators import Number

from datafree.context import Ctx
from datafree.errors import MethodError
from datafree.method import Method, methods, option
from datafree.networks import FORMS, Network, load_network, task_with

DEFAULT_METHOD = "anchor"


def _split(kind: type[int] | type[float] | type[str]) -> Parameter:
    """A flag whose value is a list with commas."""

    def convert(hint: object, tokens: Sequence[Token]) -> tuple[object, ...]:
        parts = [part.strip() for part in tokens[0].value.split(",")]
        if not all(parts):
            raise ValueError(f"{tokens[0].value!r} has an empty part: separate values with single commas")
        try:
            return tuple(kind(part) for part in parts)
        except ValueError as error:
            raise ValueError(f"{tokens[0].value!r} is no list of {kind.__name__}s with commas") from error

    def told(value: tuple[object, ...] | None) -> str | None:
        return ",".join(map(str, value)) if value else None

    return Parameter(converter=convert, n_tokens=1, allow_leading_hyphen=True, show_default=told, metavar=f"{kind.__name__.upper()},...")


def _act_bits(hint: object, tokens: Sequence[Token]) -> int | None:
    text = tokens[0].value
    if text == "float":
        return None
    if not text.isdecimal():
        raise ValueError(f"{text!r} is neither a number of bits nor float")
    return int(text)


Ints = Annotated[tuple[int, ...], _split(int)]
Floats = Annotated[tuple[float, ...], _split(float)]
Names = Annotated[tuple[str, ...], _split(str)]
ActBits = Annotated[int | None, Parameter(converter=_act_bits, show_default=lambda value: value or "float", metavar="float|INT")]
Net = Annotated[str, Parameter(help=f"The network: {FORMS}.")]
Seed = Annotated[int, Parameter(validator=Number(gte=0, lt=2**63))]
Json = Annotated[bool, Parameter(help="print JSON instead of a table", negative=())]


@dataclass(frozen=True)
class NetworkFlags:
    """Where the weights are, and what to put in place of the network's own task."""

    weights: Path | None = option(None, "a file of weights: .safetensors, .pt, .pth, .ckpt or .bin")
    weights_key: str | None = option(None, "which state dict of that file to take, such as state_dict_ema, where it has several")
    input_shape: Ints | None = option(None, "shape of one input, such as 3,32,32")
    mean: Floats | None = option(None, "per channel, subtracted from pixels in [0, 1]")
    std: Floats | None = option(None, "per channel, divides what is left")
    classes: int | None = option(None, "how many classes there are")
    resize: int | None = option(None, "short side of pictures before the centre is cropped")
    device: str = option("cpu", "where to work: cpu, cuda, ...")


NETWORK = NetworkFlags()
NetworkGroup = Annotated[NetworkFlags, Parameter(name="*", group=Group("Network", sort_key=2))]


def open_network(net: str, flags: NetworkFlags) -> Network:
    """The network that ``net`` names, with the task that the flags make of its own."""
    Ctx.create(device=flags.device)  # refuses one that is not there
    found = load_network(net, flags.weights, weights_key=flags.weights_key)
    given = {"shape": flags.input_shape, "mean": flags.mean, "std": flags.std}
    task = task_with(found.task, flags.input_shape, flags.mean, flags.std, flags.classes, flags.resize)
    return replace(found, task=task, assumed=tuple(name for name in found.assumed if given[name] is None))


def for_method(command: Callable[..., None], chosen: type[Method], about: str, flags: type) -> Callable[..., None]:
    """``command`` for one method: the dataclass becomes the type of its parameter ``own``, so that its fields become flags.

    about: the first line of its help; flags: the dataclass of the command's own flags. Raises MethodError where names collide.
    """
    taken = {each.name for other in (flags, NetworkFlags) for each in fields(other)} | {"method"}
    for each in fields(chosen):  # type: ignore[arg-type]
        if each.name in taken:
            raise MethodError(f"{chosen.name}: the field {each.name} is called like a flag that every method has: rename it")
    others = ", ".join(methods())
    command.__doc__ = (
        f"{about}\n\nThe flags under 'Method' are those of {chosen.name}; '--method NAME --help' shows those of another method: {others}."
    )
    command.__annotations__ |= {
        "method": Annotated[str, Parameter(help=f"how to quantize: {others}", metavar="NAME")],
        "own": Annotated[chosen, Parameter(name="*", group=Group(f"Method {chosen.name}", sort_key=1))],
    }
    return command
