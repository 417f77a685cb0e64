"""Batches are bounded by the bytes of activations, and what cannot fit is refused before the work."""

import pytest
import torch
from torch import nn

import datafree
from datafree import Ctx, Target, Task
from datafree.closed import gram
from datafree.errors import NetworkError
from datafree.graph import memory
from datafree.graph.flow import read
from datafree.graph.memory import bytes_per_input, inputs_within
from datafree.graph.swap import frozen_copy
from field import realistic_sqnr


def test_bytes_of_a_chain_by_hand() -> None:
    task = Task(shape=(4, 16, 16))
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(1024, 2)).eval()
    found = bytes_per_input(read(model, task, Ctx.create()))
    plane = 4 * 16 * 16  # bytes of a channel
    assert found == (8 + 8) * plane + 3 * 8 * plane  # a convolution's output and its activation, and copies of the largest


def test_a_skip_connection_is_alive_until_it_is_added() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.a, self.b, self.leave = (nn.Conv2d(4, 4, 1) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.enter(x)
            return self.leave(x + self.b(self.a(x)))

    chain = nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(4)))
    task = Task(shape=(4, 8, 8))
    sizes = [bytes_per_input(read(model.eval(), task, Ctx.create())) for model in (chain, Skip())]
    assert sizes[1] - sizes[0] == 4 * 4 * 64


def test_fewer_inputs_where_memory_is_short_and_an_error_where_not_two_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task(shape=(4, 16, 16))
    flow = read(nn.Conv2d(4, 8, 3, padding=1).eval(), task, Ctx.create())
    each = bytes_per_input(flow)
    assert inputs_within(flow, 64) == 64
    monkeypatch.setattr(memory, "BUDGET", 10 * each)
    assert inputs_within(flow, 64) == 10 and inputs_within(flow, 4) == 4
    monkeypatch.setattr(memory, "_memory", lambda: 2 * each)
    assert inputs_within(flow, 64) == 2
    monkeypatch.setattr(memory, "_memory", lambda: each)
    with pytest.raises(NetworkError, match=r"inputs of shape \(4, 16, 16\) take .* GB of activations each .* this machine has"):
        inputs_within(flow, 64)


@pytest.mark.parametrize("method", ["rtn", "anchor", "dfmpc", "squant"])
def test_methods_refuse_before_the_work(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_memory", lambda: 1000)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()
    with pytest.raises(NetworkError, match="give smaller inputs"):
        datafree.quantize(model, Task(shape=(3, 16, 16)), method=method, target=Target(weight_bits=4, act_bits=8))


def test_a_large_picture_never_passes_with_more_than_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 pictures would pass at once otherwise: no batch of the method's is larger than the budget allows."""
    layers = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 3)
    model = nn.Sequential(layers[0], nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), layers[1]).eval()
    task, ctx, seen = Task(shape=(3, 96, 96), mean=(0.5,), std=(0.5,)), Ctx.create(), list[int]()
    monkeypatch.setattr(memory, "BUDGET", 5 * bytes_per_input(read(model, task, ctx)))
    model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    datafree.methods()["anchor"]().run(frozen_copy(model), task, Target(weight_bits=4, act_bits=4), ctx)
    assert max(seen) == 5


def test_a_wide_layer_has_a_covariance_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers wider than WIDEST are rounded nearly as well as with the whole covariance."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 64, 16), nn.ReLU(), nn.Linear(16, 5)).eval()
    task = Task(shape=(3, 16, 16), mean=(0.5,), std=(0.25,))
    target, found = Target(weight_bits=3, protocol="paper"), {}
    for widest in (6000, 200):
        monkeypatch.setattr(gram, "WIDEST", widest)
        found[widest] = realistic_sqnr(model, datafree.quantize(model, task, target=target).student, task)
    assert found[200] > found[6000] - 3
