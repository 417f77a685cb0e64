"""A quantized weight as a runtime wants it: signed integers with zero point 0, a scale for each output channel.

``value = scale * (factor * code + offset)`` with signed codes of ``bits`` bits: the codes are what a file stores, ``factor * code +
offset`` is what a kernel multiplies. A symmetric grid has factor 1 and offset 0, DoReFa's has 2 and 1, an asymmetric one an offset
for each channel.
"""

from dataclasses import dataclass, replace

import numpy as np

from datafree.quant.freeze import Frozen

Array = np.ndarray


@dataclass(frozen=True, eq=False)
class Integers:
    """The weight of one layer.

    Args:
        codes: int16, in the layout of the node that takes the weight, from -2^(bits-1) to 2^(bits-1) - 1.
        bits: stored bits of a code.
        symmetric: the codes are what a kernel multiplies: factor 1, offset 0, and -2^(bits-1) does not occur.
        factor: 1, or 2 on a grid without 0.
        offset: int16, (channels,).
        scale: float32, (channels,).
        axis: of the channels in ``codes``.
    """

    codes: Array
    bits: int
    symmetric: bool
    factor: int
    offset: Array
    scale: Array
    axis: int

    def along(self, values: Array) -> Array:
        """Values of the channels, (channels,), shaped to broadcast with ``codes``."""
        return values.reshape([-1 if axis == self.axis else 1 for axis in range(self.codes.ndim)])

    def multiplied(self) -> Array:
        """The integers that a kernel multiplies, int16."""
        return np.asarray(self.factor * self.codes + self.along(self.offset))

    @property
    def fits(self) -> bool:
        """Whether these fit int8; the 8 bits of a grid that is not symmetric do not."""
        integers = self.multiplied()
        return bool(integers.size == 0 or integers.min() >= -128 and integers.max() <= 127)

    def values(self) -> Array:
        """The weight in float32."""
        return (self.along(self.scale) * self.multiplied().astype(np.float32)).astype(np.float32)

    def scaled(self, factor: Array) -> "Integers":
        """The weight times ``factor``, (channels,): of either sign; a scale that becomes 0 makes codes and offset 0."""
        scale = (self.scale * np.abs(factor)).astype(np.float32)
        flip = factor < 0
        # -(factor * code + offset) = factor * (-code - 1) + (factor - offset), and -code - 1 has as many bits as code
        flipped, moved = (-self.codes, -self.offset) if self.symmetric else (-self.codes - 1, self.factor - self.offset)
        codes = np.where(self.along(flip), flipped, self.codes) * self.along(scale > 0)
        offset = np.where(flip, moved, self.offset) * (scale > 0)
        return replace(self, codes=codes.astype(np.int16), offset=offset.astype(np.int16), scale=scale)

    def transposed(self, order: tuple[int, ...]) -> "Integers":
        """The axes in another order."""
        return replace(self, codes=self.codes.transpose(order), axis=order.index(self.axis))


def integers(frozen: Frozen, out_axis: int) -> Integers:
    """From the codes of the student; ``out_axis`` is the axis of channels where the weight has one scale for all."""
    spec, codes = frozen.spec, frozen.codes.cpu().numpy()
    axis = out_axis if spec.axis is None else spec.axis % codes.ndim
    scale, zero = (np.broadcast_to(each.cpu().numpy(), (codes.shape[axis],)).copy() for each in (frozen.scale, frozen.zero))
    half = 2 ** (spec.bits - 1)
    if spec.symmetric and spec.grid != "dorefa":
        return Integers(codes, spec.bits, True, 1, np.zeros(len(scale), np.int16), scale, axis)
    factor = 2 if spec.grid == "dorefa" else 1
    offset = (factor * (half - zero)).astype(np.int16)
    return Integers((codes - half).astype(np.int16), spec.bits, False, factor, offset, (scale / factor).astype(np.float32), axis)
