"""What synthetic inputs tell of activations: their ranges, and how far that can be trusted."""

from torch import Generator, Tensor, nn

from datafree.closed.ranges import closed_ranges
from datafree.closed.trust import Trust, channel_trust
from datafree.graph.flow import Flow
from datafree.graph.memory import inputs_within
from datafree.graph.points import averaged
from datafree.graph.taps import anchored
from datafree.plan import Plan
from datafree.quant.insert import insert, quantizers
from datafree.quant.observe import observe
from datafree.quant.ranges import Rule
from datafree.synth.prior import Family, pictures
from datafree.synth.source import Source
from datafree.task import Task

KINDS: tuple[Family, ...] = ("leaves", "pink", "white")

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


def range_activations(teacher: nn.Module, student: nn.Module, flow: Flow, task: Task, inputs: Tensor | None) -> None:
    """Set every activation range of ``student``, in place, to the clip of least squared error for the activations of ``teacher``.

    On ``inputs``, batch norms normalising by the batch, or in closed form where there are none.
    """
    points = {point: quantizer.spec for point, quantizer in quantizers(student).items()}
    if not points:
        return
    if inputs is None:
        found = closed_ranges(flow, teacher, points, task)
    else:
        probe = insert(teacher, Plan({}, points))
        with anchored(probe, flow.shared_norms):
            observe(probe, [inputs], "mse", task.run, averaged(flow, points))
        found = {point: (quantizer.scale, quantizer.zero) for point, quantizer in quantizers(probe).items()}
    for point, quantizer in quantizers(student).items():
        quantizer.set(*found[point])


def picture_trust(teacher: nn.Module, flow: Flow, task: Task, count: int, generator: Generator) -> dict[str, Trust]:
    """How far pictures of all KINDS, together no more than ``count`` (but two of each), agree on the inputs of each layer."""
    kinds = [pictures(kind, max(2, count // (1 + len(KINDS))), task, generator) for kind in KINDS]
    with anchored(teacher, flow.shared_norms):
        return channel_trust(teacher, flow, flow.layers, kinds)
