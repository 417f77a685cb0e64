"""The embedded convolutional network: handwritten digits of 8x8 pixels, trained in full precision by ``benchmarks/zoo/train_digits.py``.

The pictures are the "Optical Recognition of Handwritten Digits" set (E. Alpaydin, C. Kaynak, UCI Machine Learning
Repository, 1998, CC BY 4.0) as scikit-learn ships it; a stratified fifth of them was held out and is shipped for measuring.
"""

import io
from importlib.resources import files

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor, nn

from datafree.task import Task

TASK = Task(shape=(1, 8, 8), mean=(0.305,), std=(0.376,), classes=tuple("0123456789"))
BRIGHTEST = 16  # pixels are stored as integers 0..16


class _Block(nn.Module):
    """Two 3x3 convolutions around a shortcut, as in ResNet (arXiv 1512.03385)."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or channels != width:
            self.downsample = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        out: Tensor = self.relu2(y + self.downsample(x))
        return out


class DigitsNet(nn.Module):
    """A residual network of 14 layers on the main path: (n, 1, 8, 8) to 10 logits, (n, 10)."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64), blocks: int = 2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, widths[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        stages: list[nn.Module] = []
        channels = widths[0]
        for index, width in enumerate(widths):
            first = _Block(channels, width, stride=1 if index == 0 else 2)
            stages.append(nn.Sequential(first, *(_Block(width, width, stride=1) for _ in range(blocks - 1))))
            channels = width
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.relu(self.bn(self.conv(x))))
        logits: Tensor = self.fc(self.pool(x).flatten(1))
        return logits


def digits() -> tuple[nn.Module, Task]:
    """The trained network in eval mode, and its task. Reads a file of the package: no download, no pickle."""
    model = DigitsNet()
    model.load_state_dict(load(shipped("digits.safetensors")))
    return model.eval(), TASK


def held_out() -> tuple[Tensor, Tensor]:
    """Held-out digits for measuring only, never for quantizing: normalised inputs (360, 1, 8, 8) and labels (360,)."""
    with np.load(io.BytesIO(shipped("digits_test.npz")), allow_pickle=False) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    pixels = torch.from_numpy(images).float().div(BRIGHTEST).unsqueeze(1)
    return TASK.normalise(pixels), torch.from_numpy(labels).long()


def shipped(name: str) -> bytes:
    """What the file ``name`` of this folder holds."""
    return files("datafree.zoo").joinpath(name).read_bytes()
