"""How much memory the activations of a network take, and how many inputs may pass it at once."""

import math
import os

from datafree.errors import NetworkError
from datafree.graph.flow import Flow

BUDGET = 3 << 30  # bytes that activations may take at once
_COPIES = 3  # of the largest activation, made while it is measured or quantized
_FLOAT = 4  # bytes
# Operations whose result shares the memory of their input.
_VIEWS = frozenset(
    "view reshape flatten unflatten permute transpose t T mT squeeze unsqueeze expand expand_as getitem chunk split tensor_split unbind "
    "movedim swapaxes detach item dropout dropout1d dropout2d dropout3d view_as reshape_as".split()
)


def bytes_per_input(flow: Flow) -> int:
    """Bytes of activations, all in float32, that are alive at once at most while one input passes, room to work on them included."""
    sizes = [0 if node.op in _VIEWS else _FLOAT * math.prod(node.shape) if node.shape else 0 for node in flow.nodes]
    owner = list(range(len(sizes)))
    last = list(range(len(sizes)))
    for node in flow.nodes:
        if node.op in _VIEWS and node.inputs:
            owner[node.index] = owner[node.inputs[0]]
        for each in node.inputs:
            last[owner[each]] = node.index
    for index in flow.outputs:
        last[owner[index]] = len(sizes)
    ending: dict[int, int] = {}
    for index, size in enumerate(sizes):
        ending[last[index]] = ending.get(last[index], 0) + size
    alive = peak = 0
    for index, size in enumerate(sizes):
        alive += size
        peak = max(peak, alive)
        alive -= ending.get(index, 0)
    batch = flow.nodes[0].shape[0]
    return (peak + _COPIES * max(sizes)) // batch


def inputs_within(flow: Flow, wanted: int) -> int:
    """How many of ``wanted`` inputs may pass the network at once, in BUDGET bytes or a third of the memory of this machine.

    Two at least where ``wanted`` is more than one: batch norms take statistics of a batch. Raises NetworkError, before anything is
    computed, where not even these fit into the memory.
    """
    each, memory = bytes_per_input(flow), _memory()
    least = min(wanted, 2)
    if least * each > memory:
        raise NetworkError(
            f"inputs of shape {flow.nodes[0].shape[1:]} take {each / 1e9:.1f} GB of activations each in this network, and "
            f"{least} must pass at once: this machine has {memory / 1e9:.1f} GB; give smaller inputs (Task.shape) or use a larger machine"
        )
    return max(least, min(wanted, min(BUDGET, memory // 3) // max(each, 1)))


def _memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
