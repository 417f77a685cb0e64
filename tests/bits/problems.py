"""Choices of bits to be made, drawn at random."""

import math
import random

WIDTHS = (2, 3, 4, 6, 8)
Table = dict[str, dict[int, float]]
Costs = dict[str, dict[int, int]]


def problem(layers: int, seed: int) -> tuple[Table, Costs]:
    """Layers of very different size and sensitivity; a lost quarter a bit, not quite."""
    draw = random.Random(seed)
    lost: Table = {}
    cost: Costs = {}
    for number in range(layers):
        name, weights, base = f"layer{number}", draw.randint(10, 3000), 10 ** draw.uniform(-3, 1)
        widths = sorted(draw.sample(WIDTHS, draw.randint(1, 5)))
        lost[name] = {bits: base * 4.0**-bits * draw.uniform(0.7, 1.4) for bits in widths}
        cost[name] = {bits: math.ceil(weights * bits / 8) + 40 for bits in widths}
    return lost, cost
