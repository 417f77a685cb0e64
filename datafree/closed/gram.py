"""Mean and covariance of the inputs of layers, measured on pictures: what error-feedback rounding needs to know.

Patches are what one output sees: (channels of a group) x (taps of the kernel). Depthwise layers have one small matrix a
channel. A transposed convolution is treated as one linear map a tap, which is exact where its stride is its kernel.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datafree.graph.flow import Flow, Layer
from datafree.graph.fold import by_outputs, from_outputs

PATCHES = 6000  # sampled from one batch, at most


@dataclass(frozen=True)
class Gram:
    """Second-order statistics of the patches of one layer.

    Args:
        mean: (groups, n), n = channels of a group times taps.
        cov: (groups, n, n), about the mean.
    """

    mean: Tensor
    cov: Tensor


@dataclass
class Sums:
    """Running sums of patches, from which a :class:`Gram` follows."""

    count: int = 0
    first: Tensor | None = None
    second: Tensor | None = None

    def add(self, patches: Tensor) -> None:
        """Count in ``patches``, (groups, samples, n)."""
        first, second = patches.sum(1), patches.transpose(1, 2) @ patches
        self.count += patches.shape[1]
        self.first = first if self.first is None else self.first + first
        self.second = second if self.second is None else self.second + second

    def gram(self) -> Gram:
        """Mean and covariance of all that was counted in."""
        assert self.first is not None and self.second is not None
        mean = self.first / self.count
        return Gram(mean, self.second / self.count - mean[:, :, None] * mean[:, None, :])


def grams(model: nn.Module, flow: Flow, names: Iterable[str], inputs: Tensor, generator: torch.Generator) -> dict[str, Gram]:
    """Statistics of the inputs of the layers ``names`` while ``model`` runs on ``inputs``, (n, *shape), in one batch.

    The caller decides on the mode of the batch norms (see ``graph.taps.anchored``).
    """
    found = {name: Sums() for name in names}
    with torch.no_grad(), watching(model, flow, found, generator):
        model(inputs)
    return {name: sums.gram() for name, sums in found.items()}


@contextmanager
def watching(model: nn.Module, flow: Flow, sums: Mapping[str, Sums], generator: torch.Generator) -> Iterator[None]:
    """Count the inputs of layers into ``sums`` for as long as the context lasts."""
    handles = []
    for name, found in sums.items():
        module, layer = model.get_submodule(name), flow.layers[name]

        def watch(module: nn.Module, args: tuple[Tensor, ...], layer: Layer = layer, found: Sums = found) -> None:
            found.add(patches(module, layer, args[0], generator))

        handles.append(module.register_forward_pre_hook(watch))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def patches(module: nn.Module, layer: Layer, x: Tensor, generator: torch.Generator) -> Tensor:
    """What sampled outputs of the layer see of its input ``x``: (groups, samples, n)."""
    if layer.kind == "linear":
        rows = x.reshape(1, -1, x.shape[-1])
        return rows if rows.shape[1] <= PATCHES else rows[:, torch.randperm(rows.shape[1], generator=generator, device=x.device)[:PATCHES]]
    spatial = x.dim() - 2
    if layer.kind == "conv":
        x = F.pad(x, _padding(module, spatial), mode="constant" if module.padding_mode == "zeros" else str(module.padding_mode))
        kernel, stride, dilation = (tuple(getattr(module, key)) for key in ("kernel_size", "stride", "dilation"))
    else:
        kernel, stride, dilation = (1,) * spatial, (1,) * spatial, (1,) * spatial
    sizes = [(size - d * (k - 1) - 1) // s + 1 for size, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)]
    places = _sample((x.shape[0], *sizes), generator, x.device)
    taps = torch.cartesian_prod(*(torch.arange(k, device=x.device) for k in kernel)).view(-1, spatial)
    at = [places[axis + 1][:, None] * stride[axis] + taps[:, axis] * dilation[axis] for axis in range(spatial)]  # (samples, taps)
    seen = x.movedim(1, -1)[(places[0][:, None], *at)]  # (samples, taps, channels)
    per_group = seen.view(*seen.shape[:2], layer.groups, -1).permute(2, 0, 3, 1)
    return per_group.reshape(layer.groups, seen.shape[0], -1)


def rows_of(weight: Tensor, layer: Layer) -> Tensor:
    """The weight as (groups, rows, n), matching the patches; :func:`from_rows` is the inverse."""
    rows = by_outputs(weight, layer)
    if layer.kind == "conv_transpose":  # one row an output and tap
        rows = rows.flatten(2).transpose(1, 2)
        return rows.reshape(layer.groups, -1, rows.shape[2])
    return rows.reshape(layer.groups, rows.shape[0] // layer.groups, -1)


def from_rows(rows: Tensor, layer: Layer) -> Tensor:
    """From (groups, rows, n) back to the shape of the layer's weight."""
    if layer.kind != "conv_transpose":
        return rows.reshape(layer.weight_shape)
    inputs, outputs = layer.weight_shape[:2]
    by_tap = rows.reshape(layer.groups * outputs, -1, inputs // layer.groups).transpose(1, 2)
    return from_outputs(by_tap.reshape(*by_tap.shape[:2], *layer.kernel), layer)


def output_mean(change: Tensor, gram: Gram, layer: Layer) -> Tensor:
    """How far the change of a weight, in its own shape, moves the mean of each output: (out,)."""
    shift = (rows_of(change, layer) @ gram.mean[:, :, None]).squeeze(2)
    return _per_output(shift, layer)


def output_energy(weight: Tensor, gram: Gram, layer: Layer) -> Tensor:
    """Variance of each output that the weight, in its own shape, would have: (out,)."""
    rows = rows_of(weight, layer)
    return _per_output(((rows @ gram.cov) * rows).sum(2), layer)


def _per_output(rows: Tensor, layer: Layer) -> Tensor:
    if layer.kind != "conv_transpose":
        return rows.reshape(-1)
    taps = rows.numel() // (layer.groups * layer.weight_shape[1])
    return rows.reshape(-1, taps).mean(1)  # an output pixel sees one tap of each input where stride is kernel


def _padding(module: nn.Module, spatial: int) -> list[int]:
    """Of both sides of each axis, last axis first, as ``F.pad`` wants it."""
    padding = module.padding
    if padding == "valid":
        return [0] * (2 * spatial)
    if padding == "same":
        reach = [d * (k - 1) for k, d in zip(module.kernel_size, module.dilation, strict=True)]  # type: ignore[arg-type]
        return [side for total in reversed(reach) for side in (total // 2, total - total // 2)]
    return [size for size in reversed(tuple(padding)) for _ in range(2)]  # type: ignore[arg-type]


def _sample(sizes: tuple[int, ...], generator: torch.Generator, device: torch.device) -> list[Tensor]:
    """Indices of at most PATCHES places in an array of ``sizes``, one tensor an axis."""
    total = 1
    for size in sizes:
        total *= size
    if total <= PATCHES:
        flat = torch.arange(total, device=device)
    else:
        flat = torch.randint(total, (PATCHES,), generator=generator, device=device)
    return list(torch.unravel_index(flat, sizes))
