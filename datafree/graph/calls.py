"""What a layer really computes with: its input and geometry as its own forward hands them to the convolution or product.

A forward of the layer's own may pad its input first (as ports from TensorFlow do), or take it as a keyword.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from datafree.errors import FlowError
from datafree.graph.tape import op_name

_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_GEOMETRY = ("stride", "padding", "dilation")
_PLACES: Mapping[str, tuple[int, ...]] = MappingProxyType(  # of these among the arguments of a product
    {"conv": (3, 4, 5), "conv_transpose": (3, 4, 7), "linear": ()}
)


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer.

    Args:
        input: of the convolution or product itself.
        stride: for each spatial axis; () for linear layers.
        padding: zeros before and behind, for each spatial axis.
        dilation: for each spatial axis.
    """

    input: Tensor
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()


def layer_call(module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> LayerCall:
    """The convolution or product that ``module(*args, **kwargs)`` comes to, without computing it.

    Raises FlowError where the forward of the module comes to none.
    """
    if _is_plain(module) and args and isinstance(args[0], Tensor):
        return _call(args[0], getattr(module, "kernel_size", ()), [getattr(module, name, None) for name in _GEOMETRY])
    try:
        with _Catch():
            module.forward(*args, **kwargs)
    except _Caught as caught:
        return caught.call
    raise FlowError(f"a {type(module).__name__} computed no convolution or product this time: its inputs cannot be recorded")


def _is_plain(module: nn.Module) -> bool:
    """Whether the forward is torch's own, with zeros as padding."""
    own = next((kind for kind in _PLAIN if isinstance(module, kind)), None)
    plain = own is not None and getattr(module.forward, "__func__", None) is own.forward
    return plain and getattr(module, "padding_mode", "zeros") == "zeros"


class _Caught(BaseException):
    """Ends a forward at its product; no handler of the network's may take it for a failure."""

    def __init__(self, call: LayerCall) -> None:
        self.call = call


class _Catch(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs, op = kwargs or {}, op_name(func)
        if op not in _PLACES:
            return func(*args, **kwargs)

        def argument(place: int, name: str) -> object:
            return args[place] if len(args) > place else kwargs.get(name)

        x, weight = argument(0, "input"), argument(1, "weight")
        assert isinstance(x, Tensor) and isinstance(weight, Tensor)
        raise _Caught(_call(x, weight.shape[2:], [argument(*each) for each in zip(_PLACES[op], _GEOMETRY, strict=False)]))


def _call(x: Tensor, kernel: Sequence[int], geometry: Sequence[object]) -> LayerCall:
    """``geometry``: stride, padding and dilation as the function takes them; no kernel: a linear layer."""
    axes = len(kernel)
    if not axes:
        return LayerCall(x)
    stride, padding, dilation = (default if value is None else value for value, default in zip(geometry, (1, 0, 1), strict=True))
    steps = _each(dilation, axes)
    if padding == "same":
        reach = [step * (size - 1) for step, size in zip(steps, kernel, strict=True)]
        sides = tuple((total // 2, total - total // 2) for total in reach)
    else:
        sides = tuple((size, size) for size in _each(0 if padding == "valid" else padding, axes))
    return LayerCall(x, _each(stride, axes), sides, steps)


def _each(value: object, axes: int) -> tuple[int, ...]:
    """One number for each axis."""
    numbers = tuple(value) if isinstance(value, tuple | list) else (value,)
    return numbers * axes if len(numbers) == 1 else numbers
