"""Layer after layer with the student's own inputs: each makes good what those before it have lost.

Legend: x_t and x_s the input patches of a layer in the teacher and in the student, centred; W its float weight, H = E[x_s x_s^T],
C = E[W x_t x_s^T]. The weight that comes nearest to the teacher's outputs is ``C H^-1``. Pictures are not the data, so it is
drawn to W by a ridge: ``W + (C - W H) (H + ridge mean(diag H) I)^-1``. Then it is rounded as ever.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from datafree.closed.absorb import own_norms, shift_output
from datafree.closed.gram import Gram, Places, Sums, from_rows, output_mean, patches, places_of, rows_of, sampled_outputs
from datafree.graph.calls import layer_call
from datafree.graph.flow import Flow, Layer
from datafree.quant.insert import effective_weight, quantizers

RIDGE = 1.0


@contextmanager
def successive(
    teacher: nn.Module,
    student: nn.Module,
    flow: Flow,
    names: Iterable[str],
    rewrite: Callable[[str, Tensor, Gram], None],
    generator: torch.Generator,
    ridge: float = RIDGE,
) -> Iterator[None]:
    """While the context lasts, a run of the teacher is recorded, and a run of the student on the same inputs rewrites layers ``names``.

    ``rewrite(name, weight, gram)`` is called before each layer with the weight wanted, in the layer's shape, and the statistics of its
    inputs. Layers without a batch norm of their own then get the bias that keeps the mean of their outputs. Activations
    stay in float meanwhile: their rounding noise is nothing that weights should follow. What is not :func:`followed`,
    layers called more than once and transposed ones, is left alone.
    """
    norms = own_norms(student, flow)
    seen: dict[str, tuple[Places, Tensor]] = {}
    handles = []
    for name in names:
        layer = flow.layers[name]
        if not followed(layer):
            continue

        def record(module: nn.Module, args: tuple[object, ...], result: Tensor, layer: Layer = layer) -> None:
            places = places_of(result, layer, generator)
            seen[layer.name] = places, sampled_outputs(result, layer, places)

        def follow(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], layer: Layer = layer) -> None:
            places, outputs = seen.pop(layer.name)
            inputs = patches(layer_call(module, args, kwargs), layer, places)
            full = teacher.get_submodule(layer.name).weight
            assert isinstance(full, Tensor)
            wanted, gram = wanted_weight(full, inputs, outputs, layer, ridge)
            rewrite(layer.name, wanted, gram)
            if layer.name not in norms:
                bias = module.bias if isinstance(module.bias, Tensor) else 0.0
                reached = output_mean(effective_weight(module), gram, layer) + bias
                shift_output(student, layer, reached - outputs.mean(1).flatten(), None)

        handles.append(teacher.get_submodule(name).register_forward_hook(record))
        handles.append(student.get_submodule(name).register_forward_pre_hook(follow, with_kwargs=True))
    handles += [each.register_forward_hook(lambda module, args, result: args[0]) for each in quantizers(student).values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def followed(layer: Layer) -> bool:
    """Whether :func:`successive` rewrites this layer."""
    return len(layer.calls) == 1 and layer.kind != "conv_transpose"


def wanted_weight(full: Tensor, inputs: Tensor, outputs: Tensor, layer: Layer, ridge: float) -> tuple[Tensor, Gram]:
    """The weight, in the layer's shape, that brings ``inputs`` near to ``outputs``, and the statistics of ``inputs``.

    inputs: the student's patches, (groups, samples, n); outputs: of the teacher at the same places, (groups, samples, out / groups).
    """
    sums = Sums()
    sums.add(inputs)
    gram = sums.gram()
    rows, samples = rows_of(full.detach(), layer), inputs.shape[1]
    seen = inputs - gram.mean[:, None]
    missing = outputs - outputs.mean(1, keepdim=True) - seen @ rows.transpose(1, 2)
    mean = seen.square().mean((1, 2))
    penalty = samples * torch.where(mean > 0, ridge * mean, 1.0)
    if samples < inputs.shape[2]:  # (S' S + p I)^-1 S' = S' (S S' + p I)^-1: the smaller system is solved
        change = seen.transpose(1, 2) @ _solve(seen @ seen.transpose(1, 2), penalty, missing)
    else:
        change = _solve(samples * gram.cov, penalty, seen.transpose(1, 2) @ missing)
    return from_rows(rows + change.transpose(1, 2), layer), gram


def _solve(matrix: Tensor, penalty: Tensor, wanted: Tensor) -> Tensor:
    """(matrix + penalty I)^-1 wanted, for each group; matrix: (groups, n, n), changed in place, penalty: (groups,)."""
    matrix.diagonal(dim1=1, dim2=2).add_(penalty[:, None])
    return torch.cholesky_solve(wanted, torch.linalg.cholesky(matrix))
