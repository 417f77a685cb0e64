"""Mixed precision: the widths that lose least within a budget of bytes, an exact multiple-choice knapsack."""

from collections.abc import Callable, Mapping

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import nn

from datafree.bits.allocate import EDGE_BITS, make_plan
from datafree.bits.cost import plan_bytes
from datafree.bits.sensitivity import per_output
from datafree.context import Ctx
from datafree.errors import TargetError
from datafree.graph.flow import Flow, Layer
from datafree.plan import LayerPlan, Plan, QSpec, Target

FRAGILE_BITS = 4  # depthwise, first and last layers get no fewer, unless nothing else was asked for


def is_mixed(target: Target) -> bool:
    """Whether ``target`` leaves the width of each layer to a search: more than two widths and a budget."""
    return target.plan is None and target.max_bytes is not None and len(target.widths) > 2


def allowed(flow: Flow, target: Target) -> dict[str, tuple[int, ...]]:
    """Widths that each layer may get, rising; kept layers are absent.

    Depthwise, first and last layers get 4 bits at least, unless the target names no such width; in the protocol ``deploy``
    first and last layers get 8.
    """
    wide = tuple(bits for bits in target.widths if bits >= FRAGILE_BITS) or target.widths
    found = {}
    for name, layer in flow.layers.items():
        if name not in target.keep:
            edge = layer.first or layer.last
            found[name] = (EDGE_BITS,) if edge and target.protocol == "deploy" else wide if edge or layer.depthwise else target.widths
    return found


def choose(distortion: Mapping[str, Mapping[int, float]], cost: Mapping[str, Mapping[int, int]], max_bytes: int) -> dict[str, int]:
    """The width of each layer with the least sum of distortions at a cost of ``max_bytes`` at most.

    Exact up to the tolerances of HiGHS (a millionth of the largest distortion). distortion and cost: by layer, then by
    width; the widths of a layer in ``cost`` are those it may get. Raises TargetError where even the smallest costs more.
    """
    options = [(name, bits) for name, costs in cost.items() for bits in costs]
    bytes_of = np.array([cost[name][bits] for name, bits in options])
    lost = np.array([distortion[name][bits] for name, bits in options])
    smallest = sum(min(costs.values()) for costs in cost.values())
    if smallest > max_bytes:
        raise TargetError(f"max_bytes = {max_bytes} is out of reach: with these widths the smallest possible size is {smallest} bytes")
    if not np.isfinite(lost).all():
        name, bits = options[int(np.flatnonzero(~np.isfinite(lost))[0])]
        raise TargetError(f"the distortion of {name} at {bits} bits is {distortion[name][bits]}, expected a finite number")
    if not options:
        return {}
    one_each = np.array([[float(each == name) for each, _ in options] for name in cost])
    base = np.array([min(cost[name].values()) for name, _ in options])
    unit = int(np.gcd.reduce(bytes_of - base)) or 1
    steps = (bytes_of - base) // unit  # whole numbers, as small as they get
    room = (max_bytes - smallest) // unit
    worst = lost.max()
    while True:
        result = milp(
            lost * (1e4 / worst if worst > 0 else 1.0),  # well above the solver's absolute tolerances
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(steps[None].astype(float), -np.inf, float(room))],
            integrality=np.ones(len(options)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0},
        )
        if result.x is None:
            raise TargetError(f"the search for widths failed ({result.message}): give fewer widths or another max_bytes")
        taken = result.x > 0.5
        if (total := int(bytes_of[taken].sum())) <= max_bytes:
            return {name: bits for (name, bits), take in zip(options, taken, strict=True) if take}
        room -= max(1, (total - max_bytes) // unit)  # a violation within the solver's tolerance


def mixed_widths(
    flow: Flow,
    teacher: nn.Module,
    target: Target,
    distortion: Mapping[str, Mapping[int, float]],
    weight_spec: Callable[[Layer, int], QSpec] = per_output,
) -> dict[str, int]:
    """The width of each layer for ``target``, whose ``max_bytes`` the whole network meets as :func:`plan_bytes` counts.

    distortion: of each layer at each width that :func:`allowed` gives. Raises TargetError where the budget cannot be met.
    """
    return choose(distortion, costs(flow, teacher, target, weight_spec), budget(target))


def budget(target: Target) -> int:
    """The bytes that ``target`` allows. Raises TargetError where it does not say."""
    if target.max_bytes is None:
        raise TargetError("a search for widths needs a budget: set max_bytes")
    return target.max_bytes


def costs(
    flow: Flow, teacher: nn.Module, target: Target, weight_spec: Callable[[Layer, int], QSpec] = per_output
) -> dict[str, dict[int, int]]:
    """Bytes of each layer at each width that :func:`allowed` gives; one of each layer sum up to those of the whole network."""
    choices = allowed(flow, target)
    start = {name: widths[0] for name, widths in choices.items()}
    alone = {
        name: {bits: plan_bytes(teacher, Plan({name: LayerPlan(weight_spec(flow.layers[name], bits))})) for bits in widths}
        for name, widths in choices.items()
    }
    plan = make_plan(flow, teacher, target, weight_spec, Ctx.create(), start)
    fixed = plan_bytes(teacher, plan) - sum(alone[name][bits] for name, bits in start.items())
    # the fixed part is counted once, with the first layer, so that messages speak of the whole network
    first = next(iter(alone), None)
    return {name: {bits: size + (fixed if name == first else 0) for bits, size in sizes.items()} for name, sizes in alone.items()}
