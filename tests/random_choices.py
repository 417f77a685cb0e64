"""The choices that random networks are made of, each with how often it is taken, and how one is taken."""

import random

from torch import nn

# Every group of choices, each with how often it is taken.
SHAPES = {"square": 4, "wide": 2, "grey": 1, "sequence": 2, "features": 1, "volume": 1}
INPUTS = {"usual": 2, "half": 1, "unit": 2, "bytes": 2}
PREPARED = {"as it is": 3, "normalised": 1, "normalised in place": 1, "activated in place": 1}
BLOCKS = {
    "layer": 12, "residual": 4, "concat": 2, "gate": 2, "pool": 3, "up": 5, "twice": 2, "keyword": 2, "bare": 1, "weight norm": 1,
    "old weight norm": 1, "attention": 2, "multihead": 2, "lstm": 2, "gru": 2,
}  # fmt: skip
CONV_KINDS = {
    "plain": 4, "strided": 4, "pointwise": 2, "grouped": 2, "depthwise": 2, "dilated": 1, "transposed": 3, "same": 1, "reflect": 1,
    "replicate": 1, "same in forward": 2, "left in forward": 1, "channels last": 1,
}  # fmt: skip
NORM_PLACES = {"behind": 4, "none": 2, "before": 1, "behind activation": 1}
NORM_KINDS = {"batch": 6, "group": 1, "layer": 1, "instance": 1}
AFFINE = {"affine": 4, "not affine": 1}
ACTIVATIONS = {
    "relu": 4, "relu6": 1, "leaky relu": 1, "prelu": 1, "silu": 1, "gelu": 1, "hardswish": 1, "tanh": 1, "sigmoid gate": 1, "identity": 1,
}  # fmt: skip
FORMS = {"module": 2, "shared module": 1, "function": 1, "in place": 2}
POOLS = {"max": 1, "overlapping max": 1, "average": 1, "adaptive": 1, "function": 1}
UPS = {"nearest": 1, "linear": 1, "module": 1, "pixel shuffle": 6}
ENDS = {"mean": 2, "pool and flatten": 2, "flatten": 1, "map": 1}
ANSWERS = {"tensor": 4, "tuple": 1, "dict": 1, "dataclass": 1}
GROUPS = {
    "shape": SHAPES, "input": INPUTS, "prepared": PREPARED, "block": BLOCKS, "conv": CONV_KINDS, "norm": NORM_PLACES,
    "norm kind": NORM_KINDS,
    "affine": AFFINE, "activation": ACTIVATIONS, "form": FORMS, "pool": POOLS, "up": UPS, "end": ENDS, "answer": ANSWERS,
}  # fmt: skip


class Draw:
    """Choices from one seed; ``kinds`` keeps what was chosen."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.kinds: set[str] = set()
        self.activations: dict[str, nn.Module] = {}

    def one(self, group: str, *but: str) -> str:
        """One of the choices of a group, apart from some."""
        choices = {choice: share for choice, share in GROUPS[group].items() if choice not in but}
        chosen = self.random.choices(list(choices), list(choices.values()))[0]
        self.kinds.add(f"{group} {chosen}")
        return chosen

    def chance(self, share: float) -> bool:
        """True so often."""
        return self.random.random() < share
