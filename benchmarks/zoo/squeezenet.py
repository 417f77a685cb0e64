"""SqueezeNet 1.1 for ImageNet (Iandola et al., arXiv 1602.07360, as revised by its authors): no norms at all.

The weights of torchvision fit: ``../shared/data/weights/imagenet_squeezenet1_1.safetensors``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datafree.task import Task


class Fire(nn.Module):
    """A 1x1 convolution to few channels, and from these a 1x1 and a 3x3 convolution whose outputs are joined."""

    def __init__(self, inputs: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))], 1)


class SqueezeNet(nn.Module):
    """A strided stem, eight fire modules with max pooling between, a 1x1 convolution to the classes, average pooling."""

    def __init__(self) -> None:
        super().__init__()
        pool = [nn.MaxPool2d(3, 2, ceil_mode=True) for _ in range(3)]
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 64, 3, 2), nn.ReLU(), pool[0], Fire(64, 16, 64), Fire(128, 16, 64), pool[1]),
            *(Fire(128, 32, 128), Fire(256, 32, 128), pool[2], Fire(256, 48, 192), Fire(384, 48, 192)),
            *(Fire(384, 64, 256), Fire(512, 64, 256)),
        )
        self.classifier = nn.Sequential(nn.Identity(), nn.Conv2d(512, 1000, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.classifier(self.features(x)).mean((2, 3))
        return answer


def squeezenet1_1() -> tuple[nn.Module, Task]:
    """SqueezeNet 1.1 at 224 pixels; weights ``imagenet_squeezenet1_1.safetensors``: 52.0 % of ``imagenet_val_500``."""
    task = Task(shape=(3, 224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), classes=1000, resize=256)
    return SqueezeNet(), task
