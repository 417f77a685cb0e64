"""What a layer loses at each bit width: from its weights and the moments of its inputs, or from the answers to inputs without data.

    D_l(b) = sum_j E_j(W - Q_b(W)) gamma_j^2 / sigma_j^2  /  sum_j gamma_j^2

is the noise-to-signal ratio behind the layer's batch norm, E_j being the energy that an error of the weight puts into
output j, ``dw_j^T Hv dw_j`` from batch-norm statistics or the same with a measured Gram matrix. Biases take care of the
mean, so only the variance part counts. Layers without a norm are measured against the energy of their own output. It takes no forward
pass, and :func:`answer_divergence` one for every layer and width.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from datafree.closed.moments import RHO, Moments, variance_form
from datafree.closed.regress import distance
from datafree.graph.flow import Flow, Layer
from datafree.graph.fold import by_outputs, norm_vectors
from datafree.plan import QSpec
from datafree.quant.grid import fake_quantize
from datafree.quant.ranges import TINY, mse
from datafree.task import Task

Energy = Callable[[str, Tensor], Tensor]
Rounded = Callable[[Layer, Tensor, QSpec], Tensor]


def per_output(layer: Layer, bits: int) -> QSpec:
    """A symmetric grid with a scale for each output channel."""
    return QSpec(bits, axis=layer.out_axis)


def moments_energy(flow: Flow, inputs: Mapping[str, Moments], rho: float = RHO) -> Energy:
    """Energy of each output, (out,), of a weight of the layer called so and in that layer's shape: w_j^T Hv w_j.

    inputs: of every layer, as ``closed.propagate.layer_inputs`` gives them; where nothing is known all channels count alike.
    """

    def energy(name: str, weight: Tensor) -> Tensor:
        rows = by_outputs(weight, flow.layers[name])
        return variance_form(rows, rows, inputs[name].var, rho)

    return energy


def nearest(layer: Layer, weight: Tensor, spec: QSpec) -> Tensor:
    """The weight rounded to nearest, scales of least squared error."""
    return fake_quantize(weight, *mse(weight, spec), spec)


@torch.no_grad()
def distortions(
    flow: Flow,
    teacher: nn.Module,
    choices: Mapping[str, Sequence[int]],
    energy: Energy,
    weight_spec: Callable[[Layer, int], QSpec] = per_output,
    rounded: Rounded = nearest,
) -> dict[str, dict[int, float]]:
    """D_l(b) of every layer in ``choices`` at each of its widths.

    Args:
        flow: of ``teacher``.
        teacher: the float network.
        choices: bits to try, by layer.
        energy: what an error of a weight costs at each output, such as :func:`moments_energy`.
        weight_spec: the grid of a layer at so many bits.
        rounded: the weight of a layer as it would become.
    """
    found: dict[str, dict[int, float]] = {}
    for name, widths in choices.items():
        layer = flow.layers[name]
        weight = teacher.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        if layer.norm is None:
            gain, signal = torch.ones(()), energy(name, weight).sum()
        else:
            norm = norm_vectors(teacher.get_submodule(layer.norm))
            gain, signal = (norm.gamma / norm.sigma).square(), norm.gamma.square().sum()
        found[name] = {}
        for bits in widths:
            error = weight - rounded(layer, weight, weight_spec(layer, bits))
            found[name][bits] = float((energy(name, error) * gain.to(weight)).sum() / signal.clamp(min=TINY))
    return found


def answer_divergence(
    flow: Flow,
    teacher: nn.Module,
    task: Task,
    inputs: Tensor,
    weight_spec: Callable[[Layer, int], QSpec] = per_output,
    rounded: Rounded = nearest,
) -> Callable[[Mapping[str, int]], float]:
    """A function from bits by layer to what the answers to ``inputs`` lose when exactly these layers are rounded (ZeroQ's Omega).

    The loss is the mean KL divergence from the teacher's answers in nats, see ``closed.regress.distance``.
    """
    rows = torch.split(inputs, 64)
    known: dict[tuple[str, int], Tensor] = {}

    def weight(name: str, bits: int) -> Tensor:
        if (name, bits) not in known:
            layer, full = flow.layers[name], teacher.get_submodule(name).weight
            assert isinstance(full, Tensor)
            known[name, bits] = rounded(layer, full, weight_spec(layer, bits))
        return known[name, bits]

    @torch.no_grad()
    def answers(weights: dict[str, Tensor]) -> Tensor:
        return torch.cat([task.answer(functional_call(teacher, weights, (part,))) for part in rows])

    reference = answers({})

    def lost(widths: Mapping[str, int]) -> float:
        return distance(reference, answers({f"{name}.weight": weight(name, bits) for name, bits in widths.items()}))

    return lost
