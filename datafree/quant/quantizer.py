"""The module that carries a scale and rounds what passes: one class for weights and activations."""

from typing import final

import torch
from torch import Tensor, nn

from datafree.errors import NetworkError
from datafree.plan import QSpec
from datafree.quant.grid import fake_quantize, has_zero_points


@final
class Quantizer(nn.Module):
    """Rounds its input to the grid of ``spec``; NaN comes out until :meth:`set` has been called.

    Args:
        spec: the grid.
        channels: the size of ``spec.axis``; None if it is known only when the range is set.
        device: where scale and zero live.

    Buffers ``scale`` and ``zero``: float32, (channels,), or () where ``spec.axis`` is None.
    """

    scale: Tensor
    zero: Tensor

    def __init__(self, spec: QSpec, channels: int | None = None, device: torch.device | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.channels = channels
        shape = () if spec.axis is None else (channels or 1,)
        self.register_buffer("scale", torch.full(shape, torch.nan, dtype=torch.float32, device=device))
        self.register_buffer("zero", torch.full(shape, torch.nan, dtype=torch.float32, device=device))

    @property
    def ready(self) -> bool:
        """Whether the range has been set."""
        return bool(torch.isfinite(self.scale).all())

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize ``x`` with a straight-through gradient."""
        return fake_quantize(x, self.scale, self.zero, self.spec)

    @torch.no_grad()
    def set(self, scale: Tensor, zero: Tensor | None = None, check: bool = True) -> None:
        """Take over scale and zero; a zero of None is the one the grid implies.

        Raises NetworkError on a wrong shape, a scale that is not finite and positive, or a zero that is not on the grid. Without ``check``
        the values are not looked at, so a GPU is not waited for.
        """
        scale = scale.detach().to(self.scale.device, torch.float32, copy=True)
        expected = self._shape(scale.shape)
        if tuple(scale.shape) != expected:
            raise NetworkError(f"{self}: the scale has shape {tuple(scale.shape)}, expected {expected}")
        if check and not bool((torch.isfinite(scale) & (scale > 0)).all()):
            worst = scale[~(torch.isfinite(scale) & (scale > 0))].flatten()[0].item()
            raise NetworkError(f"{self}: a scale is {worst}, expected finite values above 0")
        if zero is None:
            if self._implied is None:
                raise NetworkError(f"{self}: an asymmetric grid needs a zero point as well as a scale")
            zero = torch.full_like(scale, self._implied)
        zero = zero.detach().to(self.scale.device, torch.float32, copy=True)
        if zero.shape != scale.shape:
            raise NetworkError(f"{self}: zero has shape {tuple(zero.shape)}, expected that of the scale, {tuple(scale.shape)}")
        if check:
            self._check_zero(zero)
        self.scale, self.zero = scale, zero

    @property
    def _implied(self) -> float | None:
        """The only zero that the grid allows; None where there are many."""
        if has_zero_points(self.spec):
            return None
        return self.spec.levels[1] / 2 if self.spec.grid == "dorefa" else 0.0

    def _check_zero(self, zero: Tensor) -> None:
        low, high = self.spec.levels
        if self._implied is None:
            wrong, expected = ~((zero == zero.round()) & (zero >= low) & (zero <= high)), f"integers from {low} to {high}"
        else:
            wrong, expected = zero != self._implied, f"{self._implied}"
        if bool(wrong.any()):
            raise NetworkError(f"{self}: a zero point is {zero[wrong].flatten()[0].item()}, expected {expected}")

    def _shape(self, given: torch.Size) -> tuple[int, ...]:
        if self.spec.axis is None:
            return ()
        return (self.channels if self.channels is not None else given[0] if len(given) == 1 else 1,)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, object],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Make room for as many channels as the file has, where they were not known before."""
        saved = state_dict.get(prefix + "scale")
        if saved is not None and self.channels is None and tuple(saved.shape) == self._shape(saved.shape):
            self.scale = torch.full_like(self.scale, torch.nan).expand(saved.shape).clone()
            self.zero = torch.full_like(self.scale, torch.nan)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def extra_repr(self) -> str:
        """Bits, grid and axis, and whether there is a range yet."""
        kind = self.spec.grid if self.spec.grid != "uniform" else "symmetric" if self.spec.symmetric else "asymmetric"
        axis = "whole tensor" if self.spec.axis is None else f"axis {self.spec.axis}, {self.channels or 'any'} channels"
        return f"{self.spec.bits} bits, {kind}, {axis}{'' if self.ready else ', no range yet'}"
