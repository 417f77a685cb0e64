"""How far what channels show on pictures holds for data, judged by how far kinds of pictures disagree.

Behind a norm, channels vary as much on pictures as on data. Where there is none, pictures say less and less the deeper a layer is: many
channels respond to objects and hardly to any picture. Rounding that only keeps the error small on pictures puts the error into just these
channels. Data is one more kind of input, so the differences between kinds of pictures tell what to expect of it: a channel's amplitude
on data is its amplitude on pictures times an unknown gain.

Legend: H the covariance of a layer's input patches, m their mean. S: variance over channels of their mean log amplitude; E: variance of the
log amplitude of a channel over kinds.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from datafree.closed.gram import Gram
from datafree.graph.calls import layer_call
from datafree.graph.flow import Flow, Layer
from datafree.quant.ranges import TINY

FLOOR = 0.01  # share of the mean variance of a layer that every channel is credited with at least: an amplitude of a tenth


@dataclass(frozen=True)
class Trust:
    """What pictures tell of the input of a layer; the defaults say: everything.

    Args:
        share: S / (S + E), how much of the differences between channels all kinds of pictures agree on.
        gain: squared coefficient of variation of the gain of a channel, relative to its layer.
        common: the same of the gain that all channels of the layer share.
    """

    share: float = 1.0
    gain: float = 0.0
    common: float = 0.0


@torch.no_grad()
def channel_trust(model: nn.Module, flow: Flow, names: Iterable[str], kinds: Sequence[Tensor]) -> dict[str, Trust]:
    """How far ``kinds``, two batches of inputs or more, agree on the inputs of the layers ``names``.

    The caller decides on the mode of the batch norms (see ``graph.taps.anchored``).
    """
    variances: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = []
    for name, found in variances.items():

        def watch(
            module: nn.Module,
            args: tuple[object, ...],
            kwargs: dict[str, object],
            layer: Layer = flow.layers[name],
            found: list[Tensor] = found,
        ) -> None:
            x = layer_call(module, args, kwargs).input
            found.append((x if layer.kind == "linear" else x.movedim(1, -1)).flatten(0, -2).var(0, correction=0))

        handles.append(model.get_submodule(name).register_forward_pre_hook(watch, with_kwargs=True))
    try:
        for inputs in kinds:
            model(inputs.clone())
    finally:
        for handle in handles:
            handle.remove()
    # A layer that is called several times counts with the mean of its calls.
    return {name: trust_of(torch.stack(found).view(len(kinds), -1, found[0].numel()).mean(1)) for name, found in variances.items()}


def trust_of(variances: Tensor) -> Trust:
    """The trust in the channels of one layer, given their variances on each kind of pictures, (kinds, channels)."""
    kinds, channels = variances.shape
    variances = variances.clamp(min=TINY)
    level = variances.mean(1, keepdim=True)
    relative = variances / level
    common = _variation(level.sqrt())
    if channels == 1:
        return Trust(common=common)
    logs = relative.clamp(min=FLOOR).log() / 2
    logs = logs - logs.mean(1, keepdim=True)
    own = logs.mean(0)
    within = float((logs - own).square().sum()) / ((channels - 1) * (kinds - 1))
    between = max(0.0, float(own.var()) - within / kinds)
    share = between / (between + within) if within > 0 else 1.0
    return Trust(share, _variation(relative.sqrt()), common)


def expected_gram(gram: Gram, layer: Layer, trust: Trust) -> Gram:
    """The statistics to round with: H as it is expected on data; the mean stays.

    Differences between channels count as far as they are shared: amplitudes become powers of themselves, with exponent ``share``. Unknown
    gains then multiply what the taps of one channel have in common, mean included, and shift the whole patch along its mean:
    ``E[a_i a_j (H_ij + m_i m_j)] - m_i m_j`` with gains a of mean 1, up to a factor.
    """
    if trust == Trust():
        return gram
    blocks, n, _ = gram.cov.shape
    taps = math.prod(layer.kernel) if layer.kind == "conv" else 1
    taps = taps if n % taps == 0 else 1  # a very wide covariance is cut into blocks, between the taps of a channel perhaps
    variance = gram.cov.diagonal(dim1=1, dim2=2).reshape(blocks, -1, taps).mean(2)
    floored = variance.clamp(min=max(TINY, FLOOR * float(variance.mean())))
    factor = (floored / floored.log().mean().exp()) ** ((trust.share - 1) / 2)
    per_patch = factor.repeat_interleave(taps, 1)
    cov = gram.cov * per_patch[:, :, None]
    cov *= per_patch[:, None]
    cov.diagonal(dim1=1, dim2=2).add_(((floored - variance) * factor.square()).repeat_interleave(taps, 1))
    mean = gram.mean.reshape(blocks, n) * per_patch
    by_channel = mean.view(blocks, -1, taps)
    within = cov.view(blocks, n // taps, taps, n // taps, taps).diagonal(dim1=1, dim2=3)  # (blocks, taps, taps, channels), a view
    within.mul_(1 + trust.gain).add_(trust.gain * torch.einsum("bcs,bct->bstc", by_channel, by_channel))
    return Gram(gram.mean, cov.baddbmm_(mean[:, :, None], mean[:, None], alpha=trust.common / (1 + trust.common)))


def _variation(values: Tensor) -> float:
    """Squared coefficient of variation over kinds, (kinds, channels), averaged over channels."""
    return float((values.var(0) / values.mean(0).square()).mean())
