"""Parts of small networks with forwards of their own, as networks from the field have them."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONVS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # by number of spatial axes
TRANSPOSED = (None, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (*CONVS, *TRANSPOSED[1:])
Step = nn.Module | Callable[[Tensor], Tensor]


class Steps(nn.Module):
    """Modules and plain functions, one after the other."""

    def __init__(self, *steps: Step) -> None:
        super().__init__()
        self.order: list[str | Callable[[Tensor], Tensor]] = []
        for number, step in enumerate(steps):
            if isinstance(step, nn.Module):
                self.add_module(f"step{number}", step)
            self.order.append(f"step{number}" if isinstance(step, nn.Module) else step)

    def forward(self, x: Tensor) -> Tensor:
        for step in self.order:
            x = (getattr(self, step) if isinstance(step, str) else step)(x)
        return x

    def extra_repr(self) -> str:
        return " -> ".join(step if isinstance(step, str) else getattr(step, "__name__", repr(step)) for step in self.order)


class SamePadded:
    """A convolution that pads in its forward as TensorFlow does: as many outputs as inputs over stride, the odd pixel at the end."""

    def forward(self, input: Tensor) -> Tensor:
        pads: list[int] = []
        for size, kernel, stride, dilation in zip(input.shape[2:], self.kernel_size, self.stride, self.dilation, strict=True):
            total = max((math.ceil(size / stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
            pads = [total // 2, total - total // 2, *pads]
        return self._conv_forward(F.pad(input, pads), self.weight, self.bias)


class LeftPadded:
    """A causal convolution: its forward pads one side of every axis."""

    def forward(self, input: Tensor) -> Tensor:
        reach = [(kernel - 1) * dilation for kernel, dilation in zip(self.kernel_size, self.dilation, strict=True)]
        return self._conv_forward(F.pad(input, [pad for each in reversed(reach) for pad in (each, 0)]), self.weight, self.bias)


def padding_itself(mixin: type, dims: int) -> type[nn.Module]:
    """The convolution of so many axes whose forward is that of ``mixin``."""
    return type(f"{mixin.__name__}{dims}d", (mixin, CONVS[dims]), {})


class ChannelsLast(nn.Module):
    """A module that works on the last axis, between two permutations."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.movedim(1, -1)).movedim(-1, 1)


class ByKeyword(nn.Module):
    """Its layer gets its input as a keyword argument."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(input=x)


class BareLayer(nn.Module):
    """A convolution or linear layer written by hand: a parameter and a function."""

    def __init__(self, inputs: int, outputs: int, dims: int) -> None:
        super().__init__()
        kernel = (3,) * dims
        self.kernel = nn.Parameter(torch.randn(outputs, inputs, *kernel) * (2 / (inputs * 3**dims)) ** 0.5)
        self.shift = nn.Parameter(0.1 * torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        dims = self.kernel.dim() - 2
        if dims == 0:
            return F.linear(x, self.kernel, self.shift)
        return (F.conv1d, F.conv2d, F.conv3d)[dims - 1](x, self.kernel, self.shift, padding=1)

    def extra_repr(self) -> str:
        return f"kernel {tuple(self.kernel.shape)}"


class Residual(nn.Module):
    """The sum of its input and what its body makes of it."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None, in_place: bool) -> None:
        super().__init__()
        self.body, self.shortcut, self.in_place = body, shortcut, in_place

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        x = x if self.shortcut is None else self.shortcut(x)
        if self.in_place:
            y += x
            return y
        return x + y

    def extra_repr(self) -> str:
        return "in place" if self.in_place else ""


class Concat(nn.Module):
    """What its branches make of the input, side by side."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class Twice(nn.Module):
    """Its body, called twice."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.body(x))


class Gate(nn.Module):
    """Squeeze and excite: a factor for each channel."""

    def __init__(self, channels: int, dims: int, linear: bool) -> None:
        super().__init__()
        self.dims, self.linear = dims, linear or dims == 0
        hidden = max(2, channels // 2)
        make = (lambda i, o: nn.Linear(i, o)) if self.linear else (lambda i, o: CONVS[dims](i, o, 1))
        self.reduce, self.expand = make(channels, hidden), make(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        axes = tuple(range(2, 2 + self.dims))
        squeezed = x.mean(axes, keepdim=not self.linear) if axes else x
        gate = torch.sigmoid(self.expand(F.relu(self.reduce(squeezed))))
        return x * (gate.view(*gate.shape[:2], *(1 for _ in axes)) if self.linear else gate)


class Mixing(nn.Module):
    """Attention or a recurrent layer over all positions, added to its input."""

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm = nn.LayerNorm(channels)
        if kind == "attention":
            self.qkv, self.project = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        elif kind == "multihead":
            self.attention = nn.MultiheadAttention(channels, 2, batch_first=True)
        else:
            self.recurrent = {"lstm": nn.LSTM, "gru": nn.GRU}[kind](channels, channels, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        return x + self.mixed(tokens).transpose(1, 2).reshape(x.shape)

    def mixed(self, tokens: Tensor) -> Tensor:
        """(n, positions, channels) to the same shape."""
        if self.kind == "attention":
            q, k, v = self.qkv(tokens).chunk(3, -1)
            return self.project((q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1) @ v)
        if self.kind == "multihead":
            return self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.recurrent(tokens)[0]


class Prepare(nn.Module):
    """The network normalises its input itself: out of place, or in place, which changes the caller's tensor."""

    def __init__(self, mean: float, std: float, in_place: bool) -> None:
        super().__init__()
        self.mean, self.std, self.in_place = mean, std, in_place

    def forward(self, x: Tensor) -> Tensor:
        return x.sub_(self.mean).div_(self.std) if self.in_place else (x - self.mean) / self.std

    def extra_repr(self) -> str:
        return f"mean {self.mean}, std {self.std}{', in place' if self.in_place else ''}"


def pooled(x: Tensor) -> Tensor:
    """The mean over all positions, (n, channels)."""
    return x.mean(tuple(range(2, x.dim()))) if x.dim() > 2 else x


def resized(sizes: Sequence[int], mode: str) -> Callable[[Tensor], Tensor]:
    """A function that interpolates to ``sizes``."""

    def resize(x: Tensor) -> Tensor:
        return F.interpolate(x, size=tuple(sizes), mode=mode, align_corners=None if mode == "nearest" else False)

    resize.__name__ = f"interpolate({tuple(sizes)}, {mode})"
    return resize
