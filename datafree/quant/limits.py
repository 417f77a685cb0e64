"""Ranges of the network's input end where its task ends: no pixel lies beyond black and white."""

from torch import nn

from datafree.graph.flow import Flow
from datafree.quant.insert import quantizers
from datafree.quant.ranges import from_range
from datafree.task import Task


def limit_inputs(student: nn.Module, flow: Flow, task: Task) -> None:
    """Cut the ranges of quantizers that the network's input passes to ``task.limits``, in place."""
    lowest, highest = task.limits
    for point, quantizer in quantizers(student).items():
        name, _, side = point.rpartition(":")
        nodes = [call.input if side == "input" else call.output for call in flow.calls_of.get(name, ())]
        if not nodes or any(index is None or flow.nodes[flow.origin(index)].op != "input" for index in nodes) or not quantizer.ready:
            continue
        low, high = (quantizer.scale * (level - quantizer.zero) for level in quantizer.spec.levels)
        step = quantizer.scale  # zero is a whole code: so much further either end may lie
        if bool((low < min(lowest, 0) - step).any() | (high > max(highest, 0) + step).any()):
            quantizer.set(*from_range(low.clamp(min=lowest), high.clamp(max=highest), quantizer.spec))
