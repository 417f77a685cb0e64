"""Metadata of files: what was written comes back, what is foreign is nothing."""

import pytest

from datafree.export.header import header, read_header
from datafree.plan import LayerPlan, Plan, QSpec

PLAN = Plan({f"layer.{number}": LayerPlan(QSpec(4, axis=0), QSpec(8, symmetric=False)) for number in range(50)})


def test_what_was_written_comes_back() -> None:
    found = read_header(header(PLAN, True, {"method": "rtn", "seed": 3}))
    assert found.pop("version")
    assert found == {"plan": PLAN.to_json(), "float_kernels": True, "method": "rtn", "seed": 3}


def test_a_plan_takes_few_bytes() -> None:
    assert len(header(PLAN, False)) < 20 * len(PLAN.layers)


@pytest.mark.parametrize("text", ["", "{}", "[1]", "null", '{"plan": 3}', '{"plan": "abc"}', "no JSON"])
def test_what_is_foreign_is_nothing(text: str) -> None:
    assert read_header(text) == {}
