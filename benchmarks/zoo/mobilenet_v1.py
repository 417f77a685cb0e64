"""MobileNetV1 for ImageNet (Howard et al., arXiv 1704.04861, table 1), at a quarter of the width.

The weights of Keras applications fit: ``../shared/data/weights/imagenet_mobilenetv1_025.safetensors``.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from datafree.task import Task

WIDTHS = (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)


class ConvBnRelu6(nn.Module):
    """A convolution that keeps the size or, with stride 2, halves it: then it pads on the right and the bottom only."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        padding = kernel // 2 if stride == 1 else 0
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        if self.conv.stride[0] == 2:
            x = F.pad(x, (0, 1, 0, 1))
        return F.relu6(self.bn(self.conv(x)))


class MobileNetV1(nn.Module):
    """A 3x3 stem, thirteen pairs of a depthwise and a pointwise convolution, average pooling, a classifier."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        channels = int(32 * factor)
        layers = [ConvBnRelu6(3, channels, 3, stride=2)]
        for width, stride in zip(WIDTHS, STRIDES, strict=True):
            outputs = int(width * factor)
            layers.append(ConvBnRelu6(channels, channels, 3, stride, groups=channels))
            layers.append(ConvBnRelu6(channels, outputs, 1))
            channels = outputs
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        answer: Tensor = self.classifier(x.mean((2, 3)))
        return answer


def mobilenet_v1_025() -> tuple[nn.Module, Task]:
    """MobileNetV1-0.25 at 224 pixels; weights ``imagenet_mobilenetv1_025.safetensors``: 51.60 % of ``imagenet_val_500``."""
    return MobileNetV1(0.25), Task(shape=(3, 224, 224), mean=(0.5,), std=(0.5,), classes=1000, resize=256)
