"""Tiny networks with one layer, ``low``, that DF-MPC gives fewer bits, and a choice of what stands behind it."""

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from datafree.bits.allocate import make_plan
from datafree.graph.chains import Role
from datafree.graph.flow import Flow
from datafree.methods.dfmpc import DFMPC
from datafree.task import Task

TASK = Task(shape=(3, 10, 10))
Change = Callable[[nn.Module], object]


def conv(groups: int = 1, bias: bool = False, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(8, 8, kernel, padding=kernel // 2, groups=groups, bias=bias)


class Plain(nn.Module):
    """stem, low, high, fc: a chain in which ``low`` is the layer that gets fewer bits."""

    def __init__(self, low: nn.Module | None = None, norm: nn.Module | None = None, act: nn.Module | None = None) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.low, self.norm, self.act = low or conv(), norm or nn.BatchNorm2d(8), act or nn.ReLU()
        self.high, self.high_norm, self.fc = conv(), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def features(self, x: Tensor) -> Tensor:
        return torch.relu(self.stem_norm(self.stem(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.low(self.features(x))))
        return self.fc(torch.relu(self.high_norm(self.high(x))).mean((2, 3)))


class Residual(Plain):
    """The low layer is followed by an addition; its other consumer is another branch."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = torch.relu(x + self.norm(self.low(x)))
        return self.fc((torch.relu(self.high_norm(self.high(x))) + x).mean((2, 3)))


class Concat(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.low(self.features(x))))
        return self.fc(torch.cat([x, torch.relu(self.high_norm(self.high(x)))], 1).mean((2, 3)))


class Shared(Plain):
    """Two low layers behind one batch norm; the second is the same layer if ``twins``."""

    def __init__(self, twins: bool) -> None:
        super().__init__()
        self.other = conv()
        if twins:
            self.other.load_state_dict(self.low.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = torch.relu(self.norm(self.low(x))) + torch.relu(self.norm(self.other(x)))
        return self.fc(torch.relu(self.high_norm(self.high(x))).mean((2, 3)))


def settled(make: Callable[[], nn.Module], change: Change | None = None) -> nn.Module:
    """A network whose batch norms look trained; then ``change``."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0.0, 0.3)
        with torch.no_grad():
            for _ in range(30):
                model(torch.randn(16, *TASK.shape))
            if change is not None:
                change(model)
    return model.eval()


def make_low(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Give these layers the lower width, whatever the pairing says."""

    def roles(flow: Flow) -> dict[str, Role]:
        return {name: "low" if name in names else "high" for name in flow.layers}

    for user in (DFMPC.__module__, make_plan.__module__):
        monkeypatch.setattr(sys.modules[user], "roles", roles)
