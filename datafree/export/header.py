"""What the metadata of a file say of where it came from: JSON, the plan compressed in it, which would take more than small networks."""

import base64
import json
import zlib
from collections.abc import Mapping
from importlib.metadata import version

from datafree.plan import Plan


def header(
    plan: Plan, float_kernels: bool, made_by: Mapping[str, object] | None = None, float_layers: Mapping[str, str] | None = None
) -> str:
    """The text; ``made_by``: method, target, seed, hash of the source weights; ``float_layers``: why layers compute in float."""
    packed = base64.b85encode(zlib.compress(json.dumps(plan.to_json()).encode(), 9)).decode()
    found = {"version": version("datafree"), "float_kernels": float_kernels, **(made_by or {}), "plan": packed}
    return json.dumps(found if not float_layers else {**found, "float_layers": dict(float_layers)})


def read_header(text: str) -> dict[str, object]:
    """The inverse, the plan as its JSON form; what another program wrote, or nothing, gives an empty dictionary."""
    try:
        found = json.loads(text)
        plan = json.loads(zlib.decompress(base64.b85decode(found["plan"])))
    except (ValueError, TypeError, KeyError, zlib.error):
        return {}
    return {**found, "plan": plan}
