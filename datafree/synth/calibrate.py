"""Activation ranges from synthetic inputs."""

from torch import nn

from datafree.graph.flow import Flow
from datafree.graph.memory import inputs_within
from datafree.graph.points import averaged
from datafree.graph.taps import anchored
from datafree.quant.insert import quantizers
from datafree.quant.observe import observe
from datafree.quant.ranges import Rule
from datafree.synth.source import Source
from datafree.task import Task

CALIBRATION = (32, 256)  # inputs that tell ranges: large pictures, and small ones or vectors, which have fewer positions
LARGE = 64  # from this side on pictures are large


def calibrate(student: nn.Module, flow: Flow, task: Task, source: Source, rule: Rule) -> None:
    """Set every activation range of ``student``, in place, on CALIBRATION inputs of ``source``, batch norms normalising by the batch.

    Without that, inputs unlike the training data would leave deeper layers far from the values they usually have. A batch holds as many
    inputs as fit into memory.
    """
    if quantizers(student):
        wanted = CALIBRATION[max(task.shape[1:], default=1) <= LARGE]
        size = inputs_within(flow, wanted)
        batches = (source.sample(size).inputs for _ in range(wanted // size))
        with anchored(student, flow.shared_norms):
            observe(student, batches, rule, task.run, averaged(flow, quantizers(student)))
