"""Tiny networks of every shape that the package must read: each builder gives (network, task), always the same."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datafree.task import Task

PICTURE = Task(shape=(3, 16, 16), mean=(0.5,), std=(0.25,), classes=5)


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs)]


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two networks of one shape hold the same numbers."""
    return all(torch.equal(each, other.state_dict()[name]) for name, each in one.state_dict().items())


class Scripted(nn.Module):
    """A network whose forward pass is a function of it and its input, for tests that need one odd operation."""

    def __init__(self, run: Callable[..., object], **parts: nn.Module):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> object:
        return self.run(self, x)


class LambdaBlock(nn.Module):
    """A CIFAR block: functional ReLU, a shortcut of slicing and padding without weights."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv_bn(inputs, outputs, stride=stride)
        self.conv2, self.bn2 = conv_bn(outputs, outputs)
        self.extra = outputs - inputs
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        half = self.extra // 2
        out += F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.extra - half))
        return F.relu(out)


class CifarResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(3, 8)
        self.layer1 = nn.Sequential(LambdaBlock(8, 8, 1), LambdaBlock(8, 8, 1))
        self.layer2 = nn.Sequential(LambdaBlock(8, 16, 2))
        self.linear = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))
        return self.linear(F.avg_pool2d(x, x.size(3)).view(x.size(0), -1))


class Basic(nn.Module):
    """torchvision's basic block: one in-place ReLU module called twice, a convolution on the shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv_bn(inputs, outputs, stride=stride)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv_bn(outputs, outputs)
        self.downsample = nn.Sequential(*conv_bn(inputs, outputs, 1, stride)) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.conv1, self.bn1 = conv_bn(inputs, width, 1)
        self.conv2, self.bn2 = conv_bn(width, width, 3)
        self.conv3, self.bn3 = conv_bn(width, 4 * width, 1)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(*conv_bn(inputs, 4 * width, 1))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(self.bn3(self.conv3(out)) + self.downsample(x))


class ResNet(nn.Module):
    def __init__(self, *blocks: nn.Module, width: int):
        super().__init__()
        self.conv1, self.bn1 = conv_bn(3, 8, 3, 2)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layers = nn.Sequential(*blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class DenseLayer(nn.Module):
    """Pre-activation; the 3x3 has no batch norm of its own before the concat."""

    def __init__(self, inputs: int, growth: int):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1, self.norm2 = conv_bn(inputs, 2 * growth, 1)
        self.conv2 = nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.conv1(F.relu(self.norm1(torch.cat(features, 1))))
        return self.conv2(F.relu(self.norm2(x)))


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.norm0 = conv_bn(3, 8)
        self.block = nn.ModuleList([DenseLayer(8, 4), DenseLayer(12, 4)])
        self.norm1 = nn.BatchNorm2d(16)
        self.transition = nn.Conv2d(16, 8, 1, bias=False)
        self.norm5 = nn.BatchNorm2d(8)
        self.classifier = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [F.relu(self.norm0(self.conv0(x)))]
        for layer in self.block:
            features.append(layer(features))
        x = F.avg_pool2d(self.transition(F.relu(self.norm1(torch.cat(features, 1)))), 2)
        return self.classifier(F.adaptive_avg_pool2d(F.relu(self.norm5(x)), 1).flatten(1))


class Inverted(nn.Module):
    """MobileNetV2's block: expand, depthwise, linear projection, added where the shape allows."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        hidden = 2 * inputs
        self.conv = nn.Sequential(
            nn.Sequential(*conv_bn(inputs, hidden, 1), nn.ReLU6(inplace=True)),
            nn.Sequential(*conv_bn(hidden, hidden, 3, groups=hidden), nn.ReLU6(inplace=True)),
            *conv_bn(hidden, outputs, 1),
        )
        self.add = inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.add else self.conv(x)


def mobilenet() -> nn.Module:
    return nn.Sequential(
        nn.Sequential(*conv_bn(3, 8, stride=2), nn.ReLU6()), Inverted(8, 8), Inverted(8, 8), Inverted(8, 12),
        nn.Sequential(*conv_bn(12, 24, 1), nn.ReLU6()), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(24, 5),
    )  # fmt: skip


def vgg() -> nn.Module:
    return nn.Sequential(
        *conv_bn(3, 8), nn.ReLU(inplace=True), *conv_bn(8, 8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        *conv_bn(8, 16), nn.PReLU(16), *conv_bn(16, 16), nn.LeakyReLU(0.1), nn.MaxPool2d(4),
        nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 5),
    )  # fmt: skip


class Twice(nn.Module):
    """One convolution and its batch norm called twice, and one batch norm shared by two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_bn = conv_bn(3, 8, stride=2)
        self.conv, self.bn = conv_bn(8, 8)
        self.left, self.shared = conv_bn(8, 8, 1)
        self.right = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_bn(self.stem(x)))
        for _ in range(2):
            x = F.relu(self.bn(self.conv(x)))
        x = F.relu(self.shared(self.left(x))) + F.relu(self.shared(self.right(x)))
        return self.fc(x.mean((2, 3)))


class Branching(nn.Module):
    """A branch that depends on the data, and operations in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn_a = conv_bn(3, 8, stride=2)
        self.b, self.bn_b = conv_bn(8, 8)
        self.unused = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn_a(self.a(x)).relu_()
        x = self.unused(x) if x.mean() < -1 else x
        x = F.silu(self.bn_b(self.b(x)), inplace=True)
        x.mul_(0.5).add_(0.1)
        return self.fc(x.mean((2, 3)))


class Grouped(nn.Module):
    """Grouped, depthwise and transposed convolutions, biases, a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=True), nn.BatchNorm2d(8), nn.Hardswish())
        self.grouped = nn.Sequential(*conv_bn(8, 16, 3, groups=4), nn.ReLU())
        self.depthwise = nn.Sequential(*conv_bn(16, 16, 5, groups=16), nn.ReLU())
        self.up = nn.Sequential(nn.ConvTranspose2d(16, 8, 2, 2, groups=2, bias=False), nn.BatchNorm2d(8), nn.GELU())
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Sigmoid())
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.depthwise(self.grouped(self.stem(x))))
        return self.head(x * self.gate(x)).mean((2, 3))


def sequence() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(4, 8, 5, padding=2, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 8, 3, 2, 1), nn.BatchNorm1d(8), nn.ELU(),
        nn.Conv1d(8, 8, 3, padding=1, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


def without_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 1, 1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 5),
    )


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.act, self.fc2 = nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(-2, -1) * (width // self.heads) ** -0.5).softmax(-1) @ v
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.position = nn.Parameter(torch.randn(1, 16, 16) * 0.02)
        self.blocks = nn.Sequential(Attention(16, 2), Attention(16, 2))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


_BUILDERS: tuple[tuple[str, Callable[[], nn.Module], Task], ...] = (
    ("cifar_resnet", CifarResNet, PICTURE),
    ("resnet_basic", lambda: ResNet(Basic(8, 8, 1), Basic(8, 16, 2), width=16), PICTURE),
    ("resnet_bottleneck", lambda: ResNet(Bottleneck(8, 4), Bottleneck(16, 8), width=32), PICTURE),
    ("densenet", DenseNet, PICTURE),
    ("mobilenet", mobilenet, PICTURE),
    ("vgg", vgg, PICTURE),
    ("twice", Twice, PICTURE),
    ("branching", Branching, PICTURE),
    ("grouped", Grouped, PICTURE),
    ("sequence", sequence, Task(shape=(4, 32), mean=(0.5,), std=(0.25,), classes=5)),
    ("without_norm", without_norm, PICTURE),
    ("transformer", Transformer, PICTURE),
)
NAMES = tuple(name for name, _, _ in _BUILDERS)


def build(name: str) -> tuple[nn.Module, Task]:
    """The network called ``name`` in eval mode, its batch norms with statistics and affine parts as training leaves them."""
    builder, task = next((builder, task) for each, builder, task in _BUILDERS if each == name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = builder()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0.0, 0.3)
        model.train()
        with torch.no_grad():
            for _ in range(20):
                model(task.noise(16, torch.default_generator))
    return model.eval(), task
