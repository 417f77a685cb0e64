"""Names in exported files by which layers and activations are found again."""

CODES = ".codes"


def codes_name(point: str, call: int = 1) -> str:
    """The tensor in the file that holds the codes of a point; the second call of its module has its own, and so on."""
    return f"{point}{'' if call == 1 else f'.{call}'}{CODES}"


def node_name(layer: str, call: int = 1) -> str:
    """The node in the file that a call of a layer becomes: names of modules have no colons."""
    return layer if call == 1 else f"{layer}:{call}"


def layer_name(node: str) -> str:
    """The layer of such a node."""
    return node.partition(":")[0]
