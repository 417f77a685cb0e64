"""Which plan to take: for any method, the Pareto frontier of bytes and expected loss over the bits of all layers."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, final

import torch
from torch import Tensor, nn

from datafree.api import student_of
from datafree.bits.cost import packed_bytes_table
from datafree.bits.pareto import Point, frontier
from datafree.bits.sensitivity import distortions
from datafree.checks import check_network
from datafree.closed.gram import grams, output_energy
from datafree.closed.regress import answers, distance
from datafree.context import Ctx, Made
from datafree.errors import MethodError, TargetError
from datafree.graph import swap
from datafree.graph.flow import Flow, Layer, read
from datafree.graph.fold import foldable
from datafree.graph.plain import teacher_of
from datafree.graph.taps import anchored
from datafree.method import Method, find_method
from datafree.plan import Plan, QSpec, Target
from datafree.quant.insert import plan_of
from datafree.synth.noise import Pictures, source_of
from datafree.task import Task

WIDTHS = (2, 3, 4, 5, 6, 8)
Measure = Literal["kl", "closed"]


@final
@dataclass(frozen=True)
class Frontier:
    """What no other choice of bits beats in both bytes and expected loss.

    Args:
        points: from small to large; ``size`` counts the packed network, ``loss`` is what ``unit`` says.
        unit: of the loss.
        students: the network at each width alone, of which every student on the frontier is put together.
        norms: the batch norm that is a layer's own, by layer.
    """

    points: tuple[Point, ...]
    unit: str
    students: Mapping[int, nn.Module]
    norms: Mapping[str, str]

    def within(self, max_bytes: int) -> Point:
        """The point that loses least in so many bytes. Raises TargetError where all are larger."""
        found = [point for point in self.points if point.size <= max_bytes]
        if not found:
            raise TargetError(
                f"max_bytes = {max_bytes} is out of reach: with these widths the smallest size is {self.points[0].size} bytes"
            )
        return found[-1]

    def losing(self, max_drop: float) -> Point:
        """The smallest point that is expected to lose so much at most. Raises TargetError where all lose more."""
        found = [point for point in self.points if point.loss <= max_drop]
        if not found:
            least = self.points[-1].loss
            raise TargetError(
                f"max_drop = {max_drop:g} is out of reach: with these widths the least expected loss is {least:.3g} {self.unit}"
            )
        return found[0]

    def plan(self, point: Point) -> Plan:
        """The plan of a point, which ``Target(plan=...)`` takes."""
        plans = {bits: plan_of(student) for bits, student in self.students.items()}
        widest = plans[max(plans)]
        chosen = {name: _spec(plans, name, bits) for name, bits in point.widths.items()}
        return Plan({name: replace(layer, weight=chosen[name]) for name, layer in widest.layers.items()}, widest.tensors)

    def student(self, widths: Mapping[str, int]) -> nn.Module:
        """The network with each layer, and the batch norm that is its own, as it is in the student of its width.

        Layers that are not named are as wide as possible. The method itself, given the plan, may do better, as it knows the other layers.
        """
        student = copy.deepcopy(self.students[max(self.students)])
        for name, bits in widths.items():
            found = next(each for each in self.students.values() if plan_of(each).layers[name].weight.bits == bits)
            for part in filter(None, (name, self.norms.get(name))):
                swap.replace(student, part, copy.deepcopy(found.get_submodule(part)))
        return student


def search(
    model: nn.Module,
    task: Task,
    ctx: Ctx,
    *,
    method: str | Method = "anchor",
    target: Target | None = None,
    widths: tuple[int, ...] = WIDTHS,
    by: Measure = "kl",
    inputs: Pictures = "mix",
) -> Frontier:
    """The frontier of bytes and expected loss over the bits of all layers, for a method. The model is not changed.

    The method quantizes the network at each width alone; every layer is then tried in each of these forms. Layers whose width the
    protocol of the target fixes keep it. Losses of layers are taken to add up, as in ZeroQ (arXiv 2001.00281).

    Args:
        model: a trained network that takes one tensor.
        task: the shape and range of its inputs.
        ctx: device, randomness, progress.
        method: a name of ``datafree.methods()``, or a method with fields of your own choice.
        target: activations, protocol and exceptions; its ``weight_bits`` and ``max_bytes`` play no part.
        widths: bits that a layer may get.
        by: ``kl``, the KL divergence of the answers to pictures, with one layer at the width and the others as wide as possible;
            ``closed``, the noise-to-signal ratio behind each layer from the covariance of its inputs (``bits.sensitivity``), with
            weights rounded to nearest in the method's grids: no forward pass for each layer and width.
        inputs: the pictures that either is taken on.

    Raises:
        TargetError: fewer than two widths, or a target with a plan.
        DatafreeError: as :func:`datafree.quantize` does.
    """
    target = Target() if target is None else target
    chosen = find_method(method)() if isinstance(method, str) else method
    if not isinstance(chosen, Method):
        raise MethodError(f"method must be a name or a Method, not {chosen!r}; datafree.methods() lists them")
    chosen.check()
    if len(set(widths)) < 2 or target.plan is not None:
        raise TargetError(f"a search takes two widths at least and a target without a plan, not {widths} and {target.plan}")
    for note in check_network(model, task):
        ctx.note(note)
    teacher = teacher_of(model, task, ctx.device)
    flow = read(teacher, task, replace(ctx, on_event=lambda event: None))
    uniform = [replace(target, weight_bits=bits, max_bytes=None) for bits in sorted(set(widths))]
    students = _students(chosen, teacher, task, uniform, ctx)
    norms = {layer.name: layer.norm for layer in foldable(flow) if layer.norm}
    base = Frontier((), _unit(by, task, teacher), students, norms)
    sizes = {bits: packed_bytes_table(student) for bits, student in students.items()}
    plans = {bits: plan_of(student) for bits, student in students.items()}
    cost = {name: {plan.layers[name].weight.bits: sizes[bits][name] for bits, plan in plans.items()} for name in plans[max(plans)].layers}
    fixed = sum(size for name, size in sizes[max(sizes)].items() if name not in cost)
    pictures = source_of(inputs, teacher, task, ctx).sample(_count(task)).inputs
    if by == "kl":
        start, lost = _divergences(base, teacher, task, pictures, cost, ctx)
    else:
        start, lost = 0.0, _distortions(flow, teacher, plans, pictures, cost, ctx)
    points = [Point(point.size + fixed, point.loss + start, point.widths) for point in frontier(lost, cost)]
    return replace(base, points=tuple(points))


Table = dict[str, dict[int, float]]
Costs = Mapping[str, Mapping[int, int]]


def _students(method: Method, teacher: nn.Module, task: Task, targets: list[Target], ctx: Ctx) -> dict[int, nn.Module]:
    """The student at each width, all from the same random draws; pictures are optimised once for all of them, and notes told once."""
    state, pictures = ctx.generator.get_state(), Made[Tensor]()
    found = {}
    for number, target in enumerate(targets, 1):
        generator = torch.Generator(ctx.device).manual_seed(0)
        generator.set_state(state)
        listen = ctx.on_event if number == 1 else lambda event: None if event.name == "note" else ctx.on_event(event)
        own = replace(ctx, generator=generator, folder=None, pictures=pictures, on_event=listen)
        found[target.widths[0]] = student_of(method, teacher, task, target, own)
        ctx.progress("widths", number, len(targets))
    return found


@torch.no_grad()
def _divergences(base: Frontier, teacher: nn.Module, task: Task, inputs: Tensor, cost: Costs, ctx: Ctx) -> tuple[float, Table]:
    """What is lost with every layer as wide as possible, and what each layer at each width adds to that."""
    reference = answers(teacher, task, inputs)

    def distant(widths: Mapping[str, int]) -> float:
        return distance(reference, answers(base.student(widths), task, inputs))

    start = distant({})
    lost: Table = {}
    for number, (name, sizes) in enumerate(cost.items(), 1):
        added = {bits: distant({name: bits}) - start for bits in sizes}
        lost[name] = {bits: 0.0 if bits == max(sizes) else max(0.0, value) for bits, value in added.items()}
        ctx.progress("sensitivity", number, len(cost))
    return start, lost


def _distortions(flow: Flow, teacher: nn.Module, plans: Mapping[int, Plan], inputs: Tensor, cost: Costs, ctx: Ctx) -> Table:
    """The noise-to-signal ratio of each layer at each width."""
    with anchored(teacher, flow.shared_norms):
        statistics = grams(teacher, flow, cost, inputs, ctx.generator)

    def energy(name: str, weight: Tensor) -> Tensor:
        return output_energy(weight, statistics[name], flow.layers[name])

    def spec(layer: Layer, bits: int) -> QSpec:
        return _spec(plans, layer.name, bits)

    return distortions(flow, teacher, {name: tuple(sizes) for name, sizes in cost.items()}, energy, spec)


def _spec(plans: Mapping[int, Plan], name: str, bits: int) -> QSpec:
    """How the method quantizes the layer to so many bits."""
    return next(plan.layers[name].weight for plan in plans.values() if plan.layers[name].weight.bits == bits)


@torch.no_grad()
def _unit(by: Measure, task: Task, teacher: nn.Module) -> str:
    if by == "closed":
        return "noise-to-signal ratio, added up over layers"
    answer = task.run(teacher, torch.zeros(1, *task.shape, device=next(teacher.parameters()).device))
    return "nats of KL per input" if answer.dim() == 2 and answer.shape[1] > 1 else "relative squared error of the answers"


def _count(task: Task) -> int:
    """64 pictures of 32 px, 16 of 224 px."""
    return 64 if max(task.shape[1:], default=1) <= 64 else 16
