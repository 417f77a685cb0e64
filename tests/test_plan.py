"""What a user may ask for, and plans to and from JSON."""

import json
from dataclasses import FrozenInstanceError
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datafree.errors import TargetError
from datafree.plan import PROTOCOLS, WEIGHT_BITS, Grid, LayerPlan, Plan, QSpec, Target

REFUSED: tuple[tuple[dict[str, object], str], ...] = (
    ({"weight_bits": 1}, "weight_bits: 1 is not supported: choose from 2, 3, 4, 5, 6, 7, 8"),
    ({"weight_bits": 9}, "weight_bits: 9 is not supported: choose from 2, 3, 4, 5, 6, 7, 8"),
    ({"weight_bits": (2, 16)}, "weight_bits: 16 is not supported: choose from 2, 3, 4, 5, 6, 7, 8"),
    ({"weight_bits": "4"}, "weight_bits: '4' is not supported: choose from 2, 3, 4, 5, 6, 7, 8"),
    ({"weight_bits": 4.5}, "weight_bits: 4.5 is not supported: choose from 2, 3, 4, 5, 6, 7, 8"),
    ({"weight_bits": ()}, "weight_bits (): give one width or two (low, high)"),
    ({"weight_bits": (2, 4, 6)}, "weight_bits (2, 4, 6): give one width or two (low, high)"),
    ({"act_bits": 1}, "act_bits: 1 is not supported: choose None (float) or from 2, 3, 4, 5, 6, 7, 8"),
    ({"act_bits": "float"}, "act_bits: 'float' is not supported: choose None (float) or from 2, 3, 4, 5, 6, 7, 8"),
    ({"protocol": "gdfq"}, "unknown protocol 'gdfq': choose from deploy, paper, dfmpc"),
    ({"protocol": "dfmpc", "act_bits": 8}, "protocol dfmpc quantizes weights only, but act_bits is 8: use deploy or paper"),
    ({"max_bytes": 0}, "max_bytes must be positive, not 0"),
    ({"max_bytes": -5}, "max_bytes must be positive, not -5"),
)


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_a_target_that_makes_no_sense_is_told(values: dict[str, object], message: str) -> None:
    with pytest.raises(TargetError) as caught:
        Target(**values)  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_targets_that_make_sense() -> None:
    assert Target() == Target((2, 6), None, None, "deploy", ())
    assert Target(4).widths == (4,) and Target((6, 2)).widths == (2, 6)
    for protocol in PROTOCOLS:
        assert Target(8, None, 1, protocol).protocol == protocol
    with pytest.raises(FrozenInstanceError):
        Target().act_bits = 8  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 1}, "1 bits are not supported: choose from 2, 3, 4, 5, 6, 7, 8"),
        ({"bits": 2, "grid": "log"}, "unknown grid 'log': choose from uniform, ternary, dorefa"),
        ({"bits": 3, "grid": "ternary"}, "a ternary grid takes 2 bits a value, not 3"),
    ],
)
def test_a_spec_that_makes_no_sense_is_told(values: dict[str, object], message: str) -> None:
    with pytest.raises(TargetError) as caught:
        QSpec(**values)  # type: ignore[arg-type]
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("spec", "levels"),
    [
        (QSpec(2, grid="ternary"), (-1, 1)),
        (QSpec(4), (-7, 7)),
        (QSpec(4, symmetric=False), (0, 15)),
        (QSpec(3, grid="dorefa"), (0, 7)),
    ],
)
def test_levels(spec: QSpec, levels: tuple[int, int]) -> None:
    assert spec.levels == levels


def specs() -> st.SearchStrategy[QSpec]:
    grids = st.sampled_from(get_args(Grid))
    return st.builds(
        lambda bits, symmetric, axis, grid: QSpec(2 if grid == "ternary" else bits, symmetric, axis, grid),
        st.sampled_from(WEIGHT_BITS), st.booleans(), st.sampled_from([None, 0, 1, -1]), grids,
    )  # fmt: skip


plans = st.builds(
    Plan,
    st.dictionaries(st.text(max_size=8), st.builds(LayerPlan, specs(), st.none() | specs()), max_size=4),
    st.dictionaries(st.text(max_size=8), specs(), max_size=3),
)


@settings(max_examples=40)
@given(plans)
def test_json_and_back(plan: Plan) -> None:
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert list(again.layers) == list(plan.layers) and list(again.tensors) == list(plan.tensors), "the order of execution is lost"


SPEC = {"bits": 4, "symmetric": True, "axis": 0, "grid": "uniform"}


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"layers": {}},
        {"layers": [], "tensors": {}},
        {"layers": {"a": {"weight": SPEC}}, "tensors": {}},
        {"layers": {"a": {"weight": 4, "input": None}}, "tensors": {}},
        {"layers": {"a": {"weight": {**SPEC, "colour": 1}, "input": None}}, "tensors": {}},
        {"layers": {"a": None}, "tensors": {}},
    ],
)
def test_what_is_no_plan_is_told(data: dict[str, object]) -> None:
    with pytest.raises(TargetError, match="not a plan of datafree: .* expected what Plan.to_json gives"):
        Plan.from_json(data)


def test_a_plan_with_bits_that_do_not_exist_is_told() -> None:
    with pytest.raises(TargetError, match="16 bits are not supported"):
        Plan.from_json({"layers": {"a": {"weight": {**SPEC, "bits": 16}, "input": None}}, "tensors": {}})
