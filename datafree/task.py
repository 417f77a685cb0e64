"""What the network is for: the shape and range of its inputs, its classes, how to call it and where its answer is."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from datafree.errors import NetworkError
from datafree.outputs import answer_of


@dataclass(frozen=True, kw_only=True)
class Task:
    """Describes inputs and answer, so that networks of all kinds look alike.

    Args:
        shape: of one input, without the batch: (channels, height, width) for pictures.
        mean: per channel, subtracted from pixels in [0, 1]; one number serves all channels.
        std: per channel, divides what is left.
        classes: names of the classes, or how many; None if unknown.
        resize: pictures are resized to this short side before the centre is cropped to ``shape``; None: to ``shape``'s own.
        output: which part of the network's return value is the answer, where it returns several: the
            position in a tuple or list, the key of a mapping, the field of a dataclass; see ``datafree.outputs``.
    """

    shape: tuple[int, ...] = (3, 224, 224)
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    classes: int | tuple[str, ...] | None = None
    resize: int | None = None
    output: int | str | None = None

    def __post_init__(self) -> None:
        if not self.shape or any(size <= 0 for size in self.shape):
            raise NetworkError(f"Task.shape {self.shape} must be positive sizes such as (3, 32, 32)")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.shape[0]):
                raise NetworkError(f"Task.{name} has {len(values)} values for {self.shape[0]} channels: give 1 or {self.shape[0]}")
        if any(value <= 0 for value in self.std):
            raise NetworkError(f"Task.std must be positive, not {self.std}")

    def normalise(self, pixels: Tensor) -> Tensor:
        """From pixels in [0, 1] to what the network expects. pixels: (n, *shape)."""
        sizes = (-1,) + (1,) * (len(self.shape) - 1)
        mean = torch.tensor(self.mean, dtype=pixels.dtype, device=pixels.device).view(sizes)
        std = torch.tensor(self.std, dtype=pixels.dtype, device=pixels.device).view(sizes)
        return (pixels - mean) / std

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        """Standard normal inputs, (n, *shape): the simplest source of inputs there is."""
        return torch.randn(n, *self.shape, generator=generator, device=generator.device)

    def run(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """The network's answer to ``inputs``. Raises NetworkError where no tensor stands at ``output``."""
        return self.answer(model(inputs))

    def answer(self, result: object) -> Tensor:
        """Pick the answer out of what the network returned, see :func:`datafree.outputs.answer_of`."""
        return answer_of(result, self.output)
