"""ResNets of ImageNet's shape, random weights and set batch-norm statistics: for time and memory only."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from datafree.task import Task

TASK = Task(shape=(3, 224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), classes=1000, resize=256)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 around a shortcut (arXiv 1512.03385)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != 4 * width:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(self.bn3(self.conv3(out)) + self.downsample(x))


class Basic(nn.Module):
    """Two 3x3 around a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != width:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + self.downsample(x))


class ResNet(nn.Module):
    """Stem, four stages of blocks, pooling, classifier."""

    def __init__(self, depths: tuple[int, ...], block: type[Basic] | type[Bottleneck], expansion: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        blocks: list[nn.Module] = []
        inputs = 64
        for stage, depth in enumerate(depths):
            for place in range(depth):
                blocks.append(block(inputs, 64 << stage, 2 if stage and not place else 1))
                inputs = expansion * (64 << stage)
        self.layers = nn.Sequential(*blocks)
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(inputs, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def randomized(build: Callable[[], nn.Module]) -> tuple[nn.Module, Task]:
    """A network with weights and batch-norm statistics from seed 0, in eval mode, and its task."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0.0, 0.3)
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
    return model.eval(), TASK


def resnet18() -> tuple[nn.Module, Task]:
    """11.7 million parameters."""
    return randomized(lambda: ResNet((2, 2, 2, 2), Basic, 1))


def resnet50() -> tuple[nn.Module, Task]:
    """25.6 million parameters."""
    return randomized(lambda: ResNet((3, 4, 6, 3), Bottleneck, 4))


def resnet152() -> tuple[nn.Module, Task]:
    """60.2 million parameters."""
    return randomized(lambda: ResNet((3, 8, 36, 3), Bottleneck, 4))
