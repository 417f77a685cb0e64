"""A compact convolutional transformer for CIFAR-10 (Hassani et al., arXiv 2104.05704): a convolution makes the tokens, no batch norms.

The weights ``../shared/data/weights/cifar10_cct.safetensors`` fit.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datafree.task import Task

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
WIDTH, HEADS, DEPTH, TOKENS = 128, 4, 4, 256


class Tokenizer(nn.Module):
    """A 3x3 convolution, ReLU and max pooling that halves the sides: (n, 3, 32, 32) to (n, 256 tokens, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer_layers = nn.Sequential(nn.Conv2d(3, WIDTH, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(3, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.tokenizer_layers(x).flatten(2).transpose(1, 2)
        return tokens


class Attention(nn.Module):
    """Multi-head self-attention: (n, tokens, width) to the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.in_proj(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(3)
        out: Tensor = self.out_proj((weights @ v).transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Attention and a perceptron, each behind a norm and around a shortcut. Dropout is left out; the keys of the file count it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_pre_norm, self.mlp_pre_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Identity(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_pre_norm(x))
        out: Tensor = x + self.mlp(self.mlp_pre_norm(x))
        return out


class SequencePool(nn.Module):
    """The mean of the tokens, each weighted by what a linear layer makes of it: (n, tokens, width) to (n, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_pool = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (F.softmax(self.attention_pool(x), dim=1) * x).sum(1)


class CompactTransformer(nn.Module):
    """Tokens with learned positions, four blocks, a norm, pooling over the tokens, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = Tokenizer()
        self.positional_embeddings = nn.Parameter(torch.zeros(1, TOKENS, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(WIDTH)
        self.pool = SequencePool()
        self.fc = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokenizer(x) + self.positional_embeddings
        answer: Tensor = self.fc(self.pool(self.norm(self.blocks(x))))
        return answer


def cct() -> tuple[nn.Module, Task]:
    """The transformer, 0.57 million parameters; weights ``cifar10_cct.safetensors``: 84.5 % top-1."""
    task = Task(shape=(3, 32, 32), mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), classes=CLASSES)
    return CompactTransformer(), task
