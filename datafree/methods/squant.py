"""SQuant: rounding on the fly, ranges from noise (Guo et al., ICLR 2022, arXiv 2202.07471)."""

from typing import Literal

import torch
from torch import Tensor, nn

from datafree.bits.allocate import make_plan
from datafree.closed.squant import Stages, squant
from datafree.context import Ctx
from datafree.errors import NetworkError
from datafree.graph.flow import Flow, Layer, read
from datafree.graph.fold import by_outputs, from_outputs
from datafree.graph.memory import inputs_within
from datafree.method import Method, method, option
from datafree.plan import Plan, QSpec, Target
from datafree.quant.grid import broadcast
from datafree.quant.insert import assign, insert, latent_weight, quantizers
from datafree.quant.observe import watch
from datafree.quant.precision import float64
from datafree.quant.ranges import fit, from_range
from datafree.task import Task

_NOISE, _BATCH = 256, 32  # pictures, and how many at a time
_WIDTHS = ((4, 12.0), (6, 14.0), (8, 25.0))  # bits, and the range in standard deviations
_SIGNED = 1.25  # divides the range on either side of 0
_CAPPED = 6  # from so many bits on the range may exceed what was seen


@method("squant")
class SQuant(Method):
    """Weights rounded so that their errors cancel in each kernel and each output channel; activation ranges from uniform noise.

    Reconstructed: the algorithm follows a reading of the authors' program, not of the whole paper.

    Differs: bits and quantized activations follow the protocol of the target. Widths other than 4, 6 and 8 interpolate the
    authors' ranges of 12, 14 and 25 standard deviations. The authors' uniform noise, 0 to 1, is scaled to the inputs of the task. Where the
    input of a first layer is quantized, which the authors leave in float, its range is that of pictures.
    """

    weight_range: Literal["minmax", "mse"] = option("minmax", "range of the weights: min-max as published, or least squared error")
    symmetric: bool = option(False, "symmetric grid for weights (zero point 0)")
    stages: Stages = option("ekc", "errors cancel in kernels and channels (ekc), in kernels (ek) or in channels alone (ec)")

    def run(self, teacher: nn.Module, task: Task, target: Target, ctx: Ctx) -> nn.Module:
        """Make the student: plan, range the activations on the float network, then round."""
        flow = read(teacher, task, ctx)
        plan = make_plan(flow, teacher, target, lambda layer, bits: QSpec(bits, self.symmetric, layer.out_axis), ctx)
        student = insert(teacher, plan)
        _range(student, teacher, flow, task, ctx)
        for step, (name, layer_plan) in enumerate(plan.layers.items(), 1):
            self._round(student.get_submodule(name), flow.layers[name], layer_plan.weight)
            ctx.progress("round", step, len(plan.layers))
        return student

    def _round(self, module: nn.Module, layer: Layer, spec: QSpec) -> None:
        weight = latent_weight(module).detach()
        scale, zero = fit(weight, spec, self.weight_range)
        rows = by_outputs(weight, layer)
        per_row = [by_outputs(broadcast(each, spec, weight).expand_as(weight), layer).flatten(1)[:, 0] for each in (scale, zero)]
        codes = squant(rows.reshape(*rows.shape[:2], -1), per_row[0], per_row[1], spec, self.stages)
        assign(module, from_outputs(codes.view_as(rows), layer), scale, zero)


def _range(student: nn.Module, teacher: nn.Module, flow: Flow, task: Task, ctx: Ctx) -> None:
    """Set the activation ranges of ``student`` from uniform noise that runs through the float network."""
    points = quantizers(student)
    if not points:
        return
    probe = insert(teacher, Plan({}, {point: quantizer.spec for point, quantizer in points.items()}))
    seen = {point: _Spread() for point in points}
    batch = inputs_within(flow, _BATCH)
    noise = (task.scaled(torch.rand(batch, *task.shape, generator=ctx.generator, device=ctx.device)) for _ in range(_NOISE // _BATCH))
    watch(probe, noise, {point: each.watch for point, each in seen.items()}, task.run)
    at_first = {f"{layer.name}:input" for layer in flow.layers.values() if layer.first}
    for point, quantizer in points.items():
        low, high = map(torch.tensor, task.limits) if point in at_first else seen[point].ends(point, quantizer.spec.bits)
        quantizer.set(*from_range(low, high, quantizer.spec))


class _Spread:
    """Extremes of what passed a point, and the spread of its positive part."""

    def __init__(self) -> None:
        self.low = self.high = 0.0
        self.sums = torch.zeros(3, dtype=torch.float64)  # count, sum and sum of squares of positive values

    def watch(self, module: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> Tensor:
        """Forward hook of the quantizer: note its input and let that pass."""
        x = float64(args[0])
        positive = x.clamp(min=0)
        self.low, self.high = min(self.low, float(x.min())), max(self.high, float(x.max()))
        self.sums += torch.stack([(x > 0).sum(), positive.sum(), positive.square().sum()]).cpu()
        return args[0]

    def ends(self, point: str, bits: int) -> tuple[Tensor, Tensor]:
        """The range, [0, alpha] or [-alpha, alpha]. Raises NetworkError on values that are not finite."""
        if not torch.isfinite(self.sums).all():
            raise NetworkError(f"{point}: uniform noise gives NaN or infinity there, and no range: check the weights of the network")
        count, first, second = self.sums.tolist()
        spread = max(0.0, second / count - (first / count) ** 2) ** 0.5 if count else 0.0
        largest, signed = max(self.high, -self.low), self.low < 0
        alpha = deviations(bits) / (_SIGNED if signed else 1.0) * spread
        if bits < _CAPPED or alpha == 0:  # of a point with one value nothing but that is known
            alpha = min(alpha, largest) or largest
        return torch.tensor(-alpha if signed else 0.0), torch.tensor(alpha)


def deviations(bits: int) -> float:
    """How many standard deviations a range of so many bits takes: 12, 14 and 25 at 4, 6 and 8 bits, on straight lines between."""
    (low, at_low), (high, at_high) = _WIDTHS[:2] if bits <= _WIDTHS[1][0] else _WIDTHS[1:]
    return at_low + (at_high - at_low) * (bits - low) / (high - low)
