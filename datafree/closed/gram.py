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

from datafree.closed.moments import RHO, Moments
from datafree.closed.rounding import energy, moment_hessian, split
from datafree.graph.calls import LayerCall, layer_call
from datafree.graph.flow import Flow, Layer
from datafree.graph.fold import by_outputs, from_outputs

PATCHES = 6000  # sampled from one batch, at most
WIDEST = PATCHES  # columns of a covariance; that of wider layers is taken in equal blocks on its diagonal
Places = tuple[Tensor, ...]


@dataclass(frozen=True)
class Gram:
    """Second-order statistics of the patches of one layer.

    Args:
        mean: (groups, n), n = channels of a group times taps.
        cov: about the mean, (groups, n, n), or (groups * blocks, n / blocks, n / blocks) if only blocks on the diagonal are not 0.
    """

    mean: Tensor
    cov: Tensor


@dataclass
class Sums:
    """Running sums of patches about the mean of the first ones, from which a :class:`Gram` follows."""

    count: int = 0
    centre: Tensor | None = None
    first: Tensor | None = None
    second: Tensor | None = None

    def add(self, patches: Tensor) -> None:
        """Count in ``patches``, (groups, samples, n)."""
        self.centre = patches.mean(1, keepdim=True) if self.centre is None else self.centre
        parts = split(patches - self.centre, blocks_of(patches.shape[2]))
        first, second = parts.sum(1), parts.transpose(1, 2) @ parts
        self.count += patches.shape[1]
        self.first = first if self.first is None else self.first + first
        self.second = second if self.second is None else self.second + second

    def gram(self) -> Gram:
        """Mean and covariance of all that was counted in."""
        assert self.centre is not None and self.first is not None and self.second is not None
        mean = self.first / self.count
        cov = self.second / self.count - mean[:, :, None] * mean[:, None, :]
        return Gram(mean.reshape(len(self.centre), -1) + self.centre.squeeze(1), cov)


def blocks_of(columns: int) -> int:
    """How many equal blocks a covariance of so many columns is taken in: as few as leave no block wider than WIDEST."""
    return next(blocks for blocks in range(1, columns + 1) if columns % blocks == 0 and columns // blocks <= WIDEST)


def grams(model: nn.Module, flow: Flow, names: Iterable[str], inputs: Tensor, generator: torch.Generator) -> dict[str, Gram]:
    """Statistics of the inputs of the layers ``names`` while ``model`` runs on ``inputs``, (n, *shape), in one batch.

    The caller decides on the mode of the batch norms (see ``graph.taps.anchored``).
    """
    found = {name: Sums() for name in names}
    if not found:
        return {}
    with torch.no_grad(), watching(model, flow, found, generator):
        model(inputs.clone())
    return {name: sums.gram() for name, sums in found.items()}


def moment_gram(layer: Layer, inputs: Moments, rho: float = RHO) -> Gram:
    """Statistics without any picture: channels are independent, the taps of one correlate by ``rho`` to their distance.

    inputs: moments per input channel, (in,), as ``closed.propagate.layer_inputs`` gives them; padding is left out of account.
    """
    kernel = layer.kernel if layer.kind == "conv" else ()
    cov = moment_hessian(inputs.var, kernel, rho)
    return Gram(inputs.mean.repeat_interleave(cov.shape[2]).view(layer.groups, -1), cov)


@contextmanager
def watching(model: nn.Module, flow: Flow, sums: Mapping[str, Sums], generator: torch.Generator) -> Iterator[None]:
    """Count the inputs of layers into ``sums`` for as long as the context lasts."""
    handles = []
    for name, found in sums.items():
        module, layer = model.get_submodule(name), flow.layers[name]

        def watch(
            module: nn.Module,
            args: tuple[object, ...],
            kwargs: dict[str, object],
            output: Tensor,
            layer: Layer = layer,
            found: Sums = found,
        ) -> None:
            call = layer_call(module, args, kwargs)
            found.add(patches(call, layer, places_of(call.input if layer.kind == "conv_transpose" else output, layer, generator)))

        handles.append(module.register_forward_hook(watch, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def patches(call: LayerCall, layer: Layer, places: Places) -> Tensor:
    """What the outputs at ``places`` see of the layer's input: (groups, samples, n)."""
    x = call.input
    if layer.kind == "linear":
        return x.flatten(0, -2)[places[0]][None]
    spatial = x.dim() - 2
    if layer.kind == "conv":
        x = F.pad(x, [side for sides in reversed(call.padding) for side in sides])
        kernel, stride, dilation = layer.kernel, call.stride, call.dilation
    else:
        kernel, stride, dilation = (1,) * spatial, (1,) * spatial, (1,) * spatial
    taps = torch.cartesian_prod(*(torch.arange(k, device=x.device) for k in kernel)).view(-1, spatial)
    at = [places[axis + 1][:, None] * stride[axis] + taps[:, axis] * dilation[axis] for axis in range(spatial)]  # (samples, taps)
    seen = x.movedim(1, -1)[(places[0][:, None], *at)]  # (samples, taps, channels)
    per_group = seen.view(*seen.shape[:2], layer.groups, -1).permute(2, 0, 3, 1)
    return per_group.reshape(layer.groups, seen.shape[0], -1)


def places_of(output: Tensor, layer: Layer, generator: torch.Generator) -> Places:
    """At most PATCHES random places of what a layer puts out, one index tensor an axis: batch and space, or rows of a linear layer."""
    sizes = (output.shape[:-1].numel(),) if layer.kind == "linear" else (output.shape[0], *output.shape[2:])
    return _sample(sizes, generator, output.device)


def sampled_outputs(output: Tensor, layer: Layer, places: Places) -> Tensor:
    """What a layer puts out at ``places``: (groups, samples, out / groups)."""
    rows = output.flatten(0, -2)[places[0]] if layer.kind == "linear" else output.movedim(1, -1)[places]
    return rows.view(rows.shape[0], layer.groups, -1).transpose(0, 1)


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
    return _per_output(energy(rows_of(weight, layer), gram.cov), layer)


def _per_output(rows: Tensor, layer: Layer) -> Tensor:
    if layer.kind != "conv_transpose":
        return rows.reshape(-1)
    taps = rows.numel() // (layer.groups * layer.weight_shape[1])
    return rows.reshape(-1, taps).mean(1)  # an output pixel sees one tap of each input where stride is kernel


def _sample(sizes: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Places:
    """Indices of at most PATCHES places in an array of ``sizes``, one tensor an axis."""
    total = 1
    for size in sizes:
        total *= size
    if total <= PATCHES:
        flat = torch.arange(total, device=device)
    else:
        flat = torch.randint(total, (PATCHES,), generator=generator, device=device)
    return tuple(torch.unravel_index(flat, sizes))
