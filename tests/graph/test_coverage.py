"""What share of a network is quantized, and the name of every weight that is not."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import datafree
from datafree import Ctx, Target, Task
from datafree.graph.coverage import Coverage, coverage
from datafree.graph.flow import read
from datafree.graph.plain import teacher_of
from networks import NAMES, build

TASK = Task(shape=(3, 8, 8), mean=(0.5,), std=(0.25,))


def covered(model: nn.Module, task: Task = TASK, kept: tuple[str, ...] = ()) -> Coverage:
    teacher = teacher_of(model.eval(), task)
    flow = read(teacher, task, Ctx.create())
    return coverage(flow, teacher, [name for name in flow.layers if name not in kept])


def test_shares_of_a_plain_network_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1, groups=2), nn.Flatten(), nn.Linear(64, 5)
    )
    found = covered(model)
    assert found.parameters == 4 * 27 + 4 + 8 + 4 * 18 + 4 + 5 * 64 + 5
    assert found.quantized_parameters == 4 * 27 + 4 * 18 + 5 * 64
    assert found.macs == found.quantized_macs == 64 * 4 * 27 + 16 * 4 * 18 + 5 * 64
    assert found.floats == {}


def test_a_kept_layer_is_named_and_counts_as_float() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(256, 5))
    found = covered(model, kept=("2",))
    assert found.floats == {"2": "to be kept in float"}
    assert (found.macs, found.quantized_macs) == (64 * 12 + 1280, 64 * 12)


class Mixed(nn.Module):
    """Attention, a recurrent layer, a raw product, a position and a fixed filter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, 2)
        self.register_buffer("blur", torch.ones(8, 1, 3, 3) / 9)
        self.position = nn.Parameter(torch.randn(1, 16, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.rnn = nn.LSTM(8, 6, batch_first=True)
        self.matrix = nn.Parameter(torch.randn(5, 6))
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(self.stem(x), self.blur, padding=1, groups=8).flatten(2).transpose(1, 2) + self.position
        x, _ = self.attention(x, x, x)
        x, _ = self.rnn(x)
        return F.linear(x[:, -1], self.matrix)


def test_all_that_stays_in_float_is_named() -> None:
    found = covered(Mixed())
    assert set(found.floats) == {
        "position", "attention.in_proj_weight", "attention.in_proj_bias", "attention.out_proj", "rnn", "matrix", "unused", "blur",
    }  # fmt: skip
    assert "lstm" in found.floats["rnn"] and "multi_head_attention" in found.floats["attention.in_proj_weight"]
    assert found.floats["matrix"] == "used by linear, which is not quantized"
    assert found.quantized_parameters == 8 * 12
    recurrent = 16 * 4 * 6 * (8 + 6)
    attention = 16 * (3 * 64 + 64) + 2 * 16 * 16 * 8
    assert found.quantized_macs == 16 * 8 * 12
    assert found.macs == found.quantized_macs + 16 * 8 * 9 + attention + recurrent + 30


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_quantized_small_or_named(name: str) -> None:
    model, task = build(name)
    result = datafree.quantize(model, task, method="rtn", target=Target(weight_bits=8))
    told = result.run["coverage"]
    assert isinstance(told, dict)
    assert told["parameters"] == sum(each.numel() for each in model.parameters())
    unnamed = 0
    for path, parameter in model.named_parameters():
        module = path.rpartition(".")[0]
        if path in told["floats"] or module in told["floats"]:
            continue
        small = parameter.dim() == 1
        assert small or module in result.plan.layers, path
        unnamed += 0 if small else parameter.numel()
    assert unnamed == told["quantized_parameters"]
    noted = [note for note in result.run["notes"] if note.startswith("stay in float: ")]
    assert all(any(each in note for note in noted) for each in told["floats"])
