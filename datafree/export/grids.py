"""The grids of activations, as a runtime has them."""

from dataclasses import dataclass

import numpy as np

from datafree.errors import ExportError
from datafree.quant.quantizer import Quantizer


@dataclass(frozen=True)
class Grid:
    """Codes of an activation, uint8 in a runtime: ``value = scale * (code - zero)``, codes from ``low`` to ``high``."""

    scale: float
    zero: int
    low: int
    high: int

    def value(self, code: int) -> np.float32:
        """The value of a code."""
        return np.float32(self.scale) * np.float32(code - self.zero)

    def code(self, value: float) -> int:
        """The code of a value, clipped to the grid."""
        steps = np.round(np.float32(value) / np.float32(self.scale)) + self.zero
        return int(np.clip(steps, self.low, self.high))


def grid(point: str, quantizer: Quantizer) -> Grid:
    """The grid of an activation. Raises ExportError where it has a scale for each channel, which no runtime takes."""
    spec = quantizer.spec
    if spec.axis is not None:
        raise ExportError(f"{point} has a scale for each slice of axis {spec.axis}: runtimes take one for the tensor; use axis None")
    if spec.grid != "uniform":
        raise ExportError(f"{point} is on a {spec.grid} grid: runtimes take uniform ones for activations")
    low, high = spec.levels
    shift = 128 if low < 0 else 0  # uint8 throughout: the fastest kernels multiply uint8 by int8
    return Grid(float(quantizer.scale), int(quantizer.zero) + shift, low + shift, high + shift)
