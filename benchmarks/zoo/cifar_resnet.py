"""ResNet-20 and ResNet-56 for CIFAR-10 (He et al., arXiv 1512.03385, section 4.2, shortcuts without weights).

The weights of akamaster/pytorch_resnet_cifar10 fit: ``../shared/data/weights/cifar10_resnet20.safetensors`` and
``cifar10_resnet56.safetensors``.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from datafree.task import Task

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut; where the shape changes, every second pixel and channels of zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.pad = (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """A stem, three stages of ``depth`` blocks with 16, 32 and 64 channels, average pooling, a classifier."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = stage(16, 16, 1, depth)
        self.layer2 = stage(16, 32, 2, depth)
        self.layer3 = stage(32, 64, 2, depth)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        answer: Tensor = self.linear(x.mean((2, 3)))
        return answer


def stage(inputs: int, outputs: int, stride: int, depth: int) -> nn.Sequential:
    """``depth`` blocks, of which the first strides."""
    first = Block(inputs, outputs, stride)
    return nn.Sequential(first, *(Block(outputs, outputs, 1) for _ in range(depth - 1)))


def task() -> Task:
    """Pictures of 32 x 32 pixels, normalised with the figures of ImageNet, as these weights were trained."""
    return Task(shape=(3, 32, 32), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), classes=CLASSES)


def resnet20() -> tuple[nn.Module, Task]:
    """ResNet-20, 0.27 million parameters; weights ``cifar10_resnet20.safetensors``: 91.73 % top-1."""
    return CifarResNet(3), task()


def resnet56() -> tuple[nn.Module, Task]:
    """ResNet-56, 0.85 million parameters; weights ``cifar10_resnet56.safetensors``: 93.39 % top-1."""
    return CifarResNet(9), task()
