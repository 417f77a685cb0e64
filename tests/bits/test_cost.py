"""Bytes counted by hand, and the same before and after insertion."""

import pytest
import torch
from torch import Tensor, nn

from datafree.bits.cost import float_bytes, packed_bytes, packed_bytes_table, plan_bytes
from datafree.errors import NetworkError, TargetError
from datafree.export.pack import pack
from datafree.plan import LayerPlan, Plan, QSpec
from datafree.quant.freeze import freeze
from datafree.quant.insert import insert
from datafree.quant.observe import observe

A8 = QSpec(8, symmetric=False)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, bias=False),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Conv2d(5, 7, 1),
        nn.LayerNorm((7, 2, 2)),
        nn.Flatten(),
        nn.Linear(28, 3),
    ).eval()


PLAN = Plan(
    {
        "0": LayerPlan(QSpec(3, axis=0), A8),
        "3": LayerPlan(QSpec(2, axis=0, grid="ternary")),
        "6": LayerPlan(QSpec(5, symmetric=False), QSpec(8)),
    },
    {"2:output": A8},
)


def test_by_hand() -> None:
    student = insert(network(), PLAN)
    by_hand = {
        "0": (5 * 27 * 3 + 7) // 8 + 5 * 4 + 8,
        "1": 5 * 8,
        "2": 8,
        "3": (35 * 2 + 7) // 8 + 7 * 4 + 7 * 4,
        "4": 2 * 28 * 4,
        "6": (84 * 5 + 7) // 8 + 4 + 4 + 3 * 4 + 4,
    }
    assert packed_bytes_table(student) == by_hand
    assert packed_bytes(student) == plan_bytes(network(), PLAN) == sum(by_hand.values())


def test_codes_take_what_packing_takes() -> None:
    student = insert(network(), PLAN)
    packed = sum(pack(part.codes - part.spec.levels[0], part.spec.bits).numel() for part in freeze(student).values())
    bare = packed_bytes(student) - plan_bytes(network(), PLAN) + packed
    assert bare == sum((n * bits + 7) // 8 for n, bits in ((135, 3), (35, 2), (84, 5)))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_plan_and_student_agree(bits: int, axis: int | None) -> None:
    specs = [QSpec(bits, axis=axis), QSpec(bits, symmetric=False, axis=axis), QSpec(bits, axis=axis, grid="dorefa")]
    plan = Plan({name: LayerPlan(spec, A8) for name, spec in zip(("0", "3", "6"), specs, strict=True)})
    student = insert(network(), plan)
    assert plan_bytes(network(), plan) == packed_bytes(student) == plan_bytes(student, plan)
    assert packed_bytes(student) < float_bytes(network())
    assert float_bytes(student) == float_bytes(network()) == float_bytes(network().half())


def test_float_networks() -> None:
    floats = 135 * 4 + 5 * 8 + (35 + 7) * 4 + 2 * 28 * 4 + (84 + 3) * 4
    assert float_bytes(network()) == packed_bytes(network()) == plan_bytes(network(), Plan()) == floats
    assert float_bytes(nn.BatchNorm1d(4, affine=False)) == float_bytes(nn.BatchNorm1d(4)) == 32


def test_buffers_count_if_they_are_stored() -> None:
    model = nn.Module()
    model.register_buffer("table", torch.zeros(3, dtype=torch.int64))
    model.register_buffer("scratch", torch.zeros(100), persistent=False)
    assert packed_bytes(model) == float_bytes(model) == 24 and packed_bytes_table(model) == {"": 24}


class Shared(nn.Module):
    """One linear under two names, and one tied to an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4, bias=False)
        self.b = self.a
        self.c = nn.Linear(4, 4, bias=False)
        self.emb = nn.Embedding(4, 4)
        self.c.weight = self.emb.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.c(self.b(self.a(x)))) + self.emb.weight.sum()


def test_shared_weights() -> None:
    assert float_bytes(Shared()) == packed_bytes(Shared()) == 2 * 64
    plan = Plan({"b": LayerPlan(QSpec(4), A8), "c": LayerPlan(QSpec(4))})
    assert plan_bytes(Shared(), plan) == packed_bytes(insert(Shared(), plan)) == 2 * (8 + 4) + 8 + 64


def test_activations_by_channel_are_known_after_observing() -> None:
    plan = Plan({"0": LayerPlan(QSpec(4, axis=0), QSpec(8, symmetric=False, axis=1))})
    with pytest.raises(NetworkError, match="0:input has a scale for each slice of axis 1"):
        plan_bytes(network(), plan)
    student = insert(network(), plan)
    with pytest.raises(NetworkError, match="insert and observe first"):
        packed_bytes(student)
    observe(student, [torch.randn(2, 3, 4, 4)], "minmax", lambda model, batch: model(batch))
    assert packed_bytes(student) == plan_bytes(network(), Plan({"0": LayerPlan(QSpec(4, axis=0))})) + 3 * 8


def test_plans_that_do_not_fit() -> None:
    with pytest.raises(TargetError, match="no module '9'"):
        plan_bytes(network(), Plan({"9": LayerPlan(QSpec(4))}))
    with pytest.raises(NetworkError, match="2 is a ReLU"):
        plan_bytes(network(), Plan({"2": LayerPlan(QSpec(4))}))
    with pytest.raises(TargetError, match="no module 'x'"):
        plan_bytes(network(), Plan({}, {"x:input": A8}))
