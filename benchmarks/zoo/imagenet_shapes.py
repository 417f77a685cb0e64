"""MobileNetV2 and DenseNet-121 in ImageNet's shape, random weights and set batch-norm statistics: for time, size and exports only."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo.imagenet_resnet import randomized

from datafree.task import Task

# Expansion, channels, blocks and stride of each stage (arXiv 1801.04381, table 2).
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
DEPTHS, GROWTH = (6, 12, 24, 16), 32


def conv_bn_relu6(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True))


class Inverted(nn.Module):
    """Expand, depthwise, linear projection, added where the shape allows."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        expand = [] if expansion == 1 else [conv_bn_relu6(inputs, hidden, 1)]
        project = [nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.body = nn.Sequential(*expand, conv_bn_relu6(hidden, hidden, 3, stride, hidden), *project)
        self.added = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.body(x)
        return x + found if self.added else found


class MobileNetV2(nn.Module):
    """Stem, inverted residuals, a wide 1x1, classifier."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [conv_bn_relu6(3, 32, 3, 2)]
        channels = 32
        for expansion, outputs, blocks, stride in STAGES:
            for place in range(blocks):
                layers.append(Inverted(channels, outputs, expansion, 1 if place else stride))
                channels = outputs
        self.features = nn.Sequential(*layers, conv_bn_relu6(channels, 1280, 1))
        self.classifier = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.classifier(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))
        return answer


class Dense(nn.Module):
    """Norm, 1x1, norm, 3x3; what comes out is put beside what came in (arXiv 1608.06993)."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 4 * GROWTH, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * GROWTH), nn.Conv2d(4 * GROWTH, GROWTH, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        found = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return torch.cat([x, found], 1)


class DenseNet121(nn.Module):
    """Stem, four dense blocks with halving transitions between them, classifier."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        channels = 64
        for stage, depth in enumerate(DEPTHS):
            if stage:
                halved = nn.Conv2d(channels, channels // 2, 1, bias=False)
                layers += [nn.BatchNorm2d(channels), nn.ReLU(), halved, nn.AvgPool2d(2)]
                channels //= 2
            for _ in range(depth):
                layers.append(Dense(channels))
                channels += GROWTH
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(channels))
        self.classifier = nn.Linear(channels, 1000)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.classifier(F.adaptive_avg_pool2d(F.relu(self.features(x)), 1).flatten(1))
        return answer


def mobilenet_v2() -> tuple[nn.Module, Task]:
    """3.5 million parameters."""
    return randomized(MobileNetV2)


def densenet121() -> tuple[nn.Module, Task]:
    """8.0 million parameters."""
    return randomized(DenseNet121)
