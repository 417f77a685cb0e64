"""What the network is for: the shape and range of its inputs, its classes, how to call it and where its answer is."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from datafree.errors import NetworkError
from datafree.outputs import answer_of

# Mean and standard deviation of the pixels of photographs, black is 0 and white is 1.
PHOTOGRAPHS = (0.45, 0.25)
_OF_DATA = ((0.05, 0.95), (0.1, 0.4))  # a mean and a standard deviation within these may be those of a data set


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
        mean, std = (self._per_channel(values, pixels) for values in (self.mean, self.std))
        return (pixels - mean) / std

    @property
    def limits(self) -> tuple[float, float]:
        """The least and the largest value that an input may hold: black and white, normalised."""
        ends = [(end - mean) / std for mean, std in zip(*_paired(self.mean, self.std), strict=True) for end in (0.0, 1.0)]
        return min(ends), max(ends)

    @property
    def pixel_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of synthetic pixels, in [0, 1], for each channel or for all.

        The task's own where they may be those of a data set, as ImageNet's are. Values such as mean 0.5 with std 0.5, or mean 0 with
        std 1/255, only set the range of the inputs: then those of photographs.
        """
        (lowest, highest), (least, most) = _OF_DATA
        known = all(lowest <= mean <= highest for mean in self.mean) and all(least <= std <= most for std in self.std)
        return (self.mean, self.std) if known else ((PHOTOGRAPHS[0],), (PHOTOGRAPHS[1],))

    @property
    def input_moments(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of synthetic inputs, that is of normalised pixels, for each channel or for all."""
        rows = list(zip(*_paired(self.mean, self.std, *self.pixel_statistics), strict=True))
        return tuple((of - mean) / std for mean, std, of, _ in rows), tuple(spread / std for _, std, _, spread in rows)

    def scaled(self, standard: Tensor) -> Tensor:
        """Inputs with the mean and spread of :attr:`input_moments` from values with mean 0 and variance 1, (n, *shape)."""
        mean, std = (self._per_channel(values, standard) for values in self.input_moments)
        return mean + std * standard

    def pictured(self, standard: Tensor) -> Tensor:
        """Inputs made of pixels between black and white from values with mean 0 and variance 1, (n, *shape)."""
        mean, std = (self._per_channel(values, standard) for values in self.pixel_statistics)
        return self.normalise((mean + std * standard).clamp(0, 1))

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        """Inputs of independent normal pixels, (n, *shape): the simplest source of inputs there is."""
        return self.pictured(torch.randn(n, *self.shape, generator=generator, device=generator.device))

    def run(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """The network's answer to ``inputs``, of which it gets a copy: some networks change their input in place.

        Raises NetworkError where no tensor stands at ``output``.
        """
        return self.answer(model(inputs.clone()))

    def _per_channel(self, values: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, *(1 for _ in self.shape[1:]))

    def answer(self, result: object) -> Tensor:
        """Pick the answer out of what the network returned, see :func:`datafree.outputs.answer_of`."""
        return answer_of(result, self.output)


def _paired(*values: tuple[float, ...]) -> list[tuple[float, ...]]:
    """The tuples at equal length: one value stands for all channels."""
    length = max(map(len, values))
    return [each * length if len(each) == 1 else each for each in values]
