"""The embedded transformer: the digits of ``datafree.zoo.digits`` once more, for a network without batch norms.

Trained in full precision by ``benchmarks/zoo/train_digits.py``, on the same pictures and measured on the same held-out ones.
"""

import torch
from safetensors.torch import load
from torch import Tensor, nn

from datafree.task import Task
from datafree.zoo.digits import TASK, shipped


class _Attention(nn.Module):
    """Multi-head self-attention (arXiv 1706.03762): (n, tokens, width) to the same shape."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (n, heads, tokens, width / heads)
        weights = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(3)
        out: Tensor = self.proj((weights @ v).transpose(1, 2).flatten(2))
        return out


class _Block(nn.Module):
    """Attention and a perceptron, each behind a norm and around a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = _Attention(width, heads)
        self.fc1, self.gelu, self.fc2 = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.fc2(self.gelu(self.fc1(self.norm2(x))))
        return out


class DigitsVit(nn.Module):
    """A vision transformer (arXiv 2010.11929) on patches of 2x2 pixels, without a class token: (n, 1, 8, 8) to 10 logits, (n, 10)."""

    def __init__(self, width: int = 48, heads: int = 4, depth: int = 3) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, stride=2)
        self.position = nn.Parameter(torch.zeros(1, 16, width))
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.norm(self.blocks(x)).mean(1))
        return logits


def digits_vit() -> tuple[nn.Module, Task]:
    """The trained network in eval mode, and its task. Reads a file of the package: no download, no pickle."""
    model = DigitsVit()
    model.load_state_dict(load(shipped("digits_vit.safetensors")))
    return model.eval(), TASK
