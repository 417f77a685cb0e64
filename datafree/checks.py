"""What a network must be like to be quantized, checked before any work is done, and what a student must be like after it."""

import math
from collections.abc import Iterator
from itertools import chain
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from datafree.bits.cost import packed_bytes
from datafree.errors import DatafreeError, MethodError, NetworkError, TargetError
from datafree.graph.swap import frozen_copy, unwrapped, wrappers
from datafree.plan import Plan, QSpec, Target
from datafree.quant.insert import plan_of, quantizers
from datafree.task import Task
from datafree.user_code import USER_ERRORS, described_error

_NORM_STATISTICS = ("running_mean", "running_var")
_SAME = 1e-4  # of the largest answer: what two runs on one input may differ by, as sums on a GPU do
_INDEPENDENT = 1e-3  # of the largest answer: what an answer may change by when the batch changes
_REPEATS = 8  # runs on one input where random numbers are drawn: stochastic depth drops a block once in ten runs
_BLOCK = 1 << 20  # values that are looked at together
_INDEPENDENCE = (
    "where frames of a clip lie in the batch axis, take the clip as one input, Task.shape=(frames, channels, height, width), and flatten "
    "it inside the forward; where the forward has a batch size written in, as in view(1, -1), write flatten(1) instead"
)
_DRAWS = (
    "It draws random numbers in eval mode: F.dropout without training=self.training, or a sample (torch.randn_like) in the forward. "
    "Pass training=self.training to F.dropout; in place of a sample take the mean where self.training is False"
)
_KEEPS_STATE = (
    "It keeps something from call to call, such as the features of the frame before or a counter, or it draws random numbers outside "
    "torch. Leave that out in eval mode, or make it an input and an output of the forward"
)


def check_network(model: nn.Module, task: Task) -> tuple[str, ...]:
    """Refuse a network that cannot be quantized sensibly, after four runs of a copy; ``model`` is not changed.

    Parameters and the statistics of norms must be finite. Other buffers may hold anything, such as a mask of minus infinity: what is
    wrong with one of them shows in the answer, which must be finite.

    Returns:
        Notes for the user: wrappers that are taken off, an answer that depends on the other inputs of the batch.

    Raises:
        NetworkError: a TorchScript or torch.export module; no parameters, or some without values; NaN, infinity or a negative variance
            among parameters and statistics; an attribute that cannot be copied; a forward that fails on a batch of 1 or of 2, answers
            the same input differently or without a batch axis; an answer that is not finite or has another number of classes than
            the task.
    """
    notes = [f"{wrapper} is taken off" for wrapper in wrappers(model)]
    model = unwrapped(model)
    if next(model.parameters(), None) is None:
        raise NetworkError(f"{type(model).__name__} has no parameters: there is nothing to quantize")
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        _check_values(name, tensor)
    for name, tensor in chain(model.named_parameters(), _norm_statistics(model)):
        _check_finite(name, tensor)
    probe = _Probe(model, task)
    first, both, second = probe.answers()
    _check_answer(first, model, task)
    axis = _batch_axis(first, second, both)
    change = _difference(torch.cat([first, second], axis), both)
    if change > _INDEPENDENT:
        notes.append(
            f"the answer to an input depends on the other inputs of the batch: it changes by {100 * change:.3g} % of the largest value "
            "when another input stands beside it (a norm without running statistics, for example); figures depend on the batches"
        )
    return tuple(notes)


def example_inputs(task: Task, n: int, device: torch.device) -> Tensor:
    """Pixels drawn uniformly from [0, 1] and normalised, so that they lie in the range that the task states: (n, *shape)."""
    generator = torch.Generator().manual_seed(0)
    return task.normalise(torch.rand(n, *task.shape, generator=generator)).to(device)


def check_student(teacher: nn.Module, student: nn.Module, task: Task, target: Target) -> None:
    """Refuse a student that lacks what every method owes: ranges, finite answers of the old shape, the asked-for bits and size.

    Raises:
        MethodError: activations without a range, or other bits than those of a given plan.
        NetworkError: an answer of another shape than the teacher's, or one that is not finite.
        TargetError: more bytes than asked for.
    """
    if target.plan is not None and _specs(plan_of(student)) != _specs(target.plan):
        raise MethodError("this method does not keep to a plan that is given: take another method, or give it widths")
    unset = [point for point, quantizer in quantizers(student).items() if not quantizer.ready]
    if unset:
        raise MethodError(f"the method left the ranges of {', '.join(unset[:5])} unset")
    inputs = example_inputs(task, 2, next(student.parameters()).device)
    with torch.no_grad():
        before, after = task.run(teacher, inputs), task.run(student, inputs)
    if before.shape != after.shape:
        raise NetworkError(f"the student answers in shape {tuple(after.shape)}, the network in {tuple(before.shape)}")
    if not torch.isfinite(after).all():
        raise NetworkError(
            "the student answers pixels drawn at random with NaN or infinity: the network's statistics may be damaged; try method 'rtn'"
        )
    if target.max_bytes is not None and (size := packed_bytes(student)) > target.max_bytes:
        raise TargetError(f"the student takes {size} bytes, more than max_bytes = {target.max_bytes}: choose fewer bits")


@final
class _Probe:
    """A copy of the network that is run on the same two inputs, alone and in one batch."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        self.task = task
        self.model = frozen_copy(model)
        for module in self.model.modules():
            for name, buffer in module._buffers.items():  # shared with the user's network, and some forwards write into them
                module._buffers[name] = None if buffer is None else buffer.clone()
        self.device = next(self.model.parameters()).device
        self.inputs = example_inputs(task, 2, self.device)
        self.draws = False  # whether the forward draws random numbers

    def answers(self) -> tuple[Tensor, Tensor, Tensor]:
        """To the first input, to both in one batch, and to the second input.

        Raises NetworkError where the network fails on one of them, or no longer answers the first input as before.
        """
        devices = [] if self.device.type == "cpu" else [self.device]
        with torch.no_grad(), torch.random.fork_rng(devices):  # the caller's random state stays as it is
            (first, failure), (both, failure_of_both) = self._answer(self.inputs[:1]), self._answer(self.inputs)
            if first is None or both is None:
                raise NetworkError(_failed(self.task, failure, failure_of_both))
            second = self._answer_again(self.inputs[1:])
            repeats = [self._answer_again(self.inputs[:1]) for _ in range(_REPEATS if self.draws else 1)]
        change = max(_difference(first, again) for again in repeats)
        if change > _SAME:
            raise NetworkError(_unrepeatable(change, self.draws))
        return first, both, second

    def _answer(self, batch: Tensor) -> tuple[Tensor | None, str]:
        """The answer, or None and why there is none."""
        state = self._random_state()
        try:
            result = self.model(batch.clone())
        except DatafreeError:
            raise
        except USER_ERRORS as error:
            return None, described_error(error)
        self.draws = self.draws or not torch.equal(state, self._random_state())
        return self.task.answer(result).clone(), ""

    def _answer_again(self, batch: Tensor) -> Tensor:
        answer, failure = self._answer(batch)
        if answer is None:
            raise NetworkError(f"the network fails when it is called again on a batch of {len(batch)}: {failure}. {_KEEPS_STATE}")
        return answer

    def _random_state(self) -> Tensor:
        state = torch.get_rng_state()
        return torch.cat([state, torch.cuda.get_rng_state(self.device)]) if self.device.type == "cuda" else state


def _failed(task: Task, failure: str, failure_of_both: str) -> str:
    one, two = (f"an input of shape {(n, *task.shape)}" for n in (1, 2))
    if failure and failure_of_both:
        found = f"fails on {one}: {failure}; and on {two}: {failure_of_both}"
    elif failure:
        found = f"fails on {one}: {failure}; it runs on {two}"
    else:
        found = f"runs on {one}, but fails on {two}: {failure_of_both}"
    return (
        f"the network {found}. Batches of 1 and of 2 were tried: is the task's shape right? Inputs of a batch must be independent of each "
        f"other, in batches of any size: {_INDEPENDENCE}"
    )


def _unrepeatable(change: float, draws: bool) -> str:
    cause = _DRAWS if draws else _KEEPS_STATE
    return (
        f"the network answers the same input differently from call to call, by up to {100 * change:.3g} % of the largest value, so no "
        f"student can be compared with it. {cause}"
    )


def _batch_axis(one: Tensor, other: Tensor, two: Tensor) -> int:
    """The axis along which the answer to two inputs is twice as long as to one: the first, or the second of (steps, batch, classes)."""
    if one.shape != other.shape:
        raise NetworkError(
            f"the network answers two inputs of one shape with the shapes {tuple(one.shape)} and {tuple(other.shape)}: name a part of its "
            "answer whose shape is always the same with Task.output"
        )
    if one.ndim == two.ndim:
        longer = [axis for axis in range(one.ndim) if one.shape[axis] != two.shape[axis]]
        if len(longer) == 1 and two.shape[longer[0]] == 2 * one.shape[longer[0]]:
            return longer[0]
    raise NetworkError(
        f"the network answers one input with the shape {tuple(one.shape)} and two inputs with {tuple(two.shape)}: no axis is the batch. "
        "Likely causes: squeeze() without a dimension, which takes a batch of 1 away; a mean or sum over the batch; a reshape that mixes "
        f"the batch with other axes. Inputs of a batch must be independent of each other, in batches of any size: {_INDEPENDENCE}"
    )


def _check_answer(answer: Tensor, model: nn.Module, task: Task) -> None:
    if not torch.isfinite(answer).all():
        suspects = [name for name, buffer in model.named_buffers() if buffer.is_floating_point() and not _is_finite(buffer)]
        hint = f"; these buffers hold NaN or infinity: {', '.join(suspects[:5])}" if suspects else ": do its weights fit its inputs?"
        raise NetworkError(f"the network answers NaN or infinity to pixels drawn at random, shape {(1, *task.shape)}{hint}")
    classes = len(task.classes) if isinstance(task.classes, tuple) else task.classes
    if classes is not None and answer.ndim == 2 and answer.shape[1] != classes:
        raise NetworkError(f"the network answers with {answer.shape[1]} classes, the task names {classes}: correct the task's classes")


def _check_values(name: str, tensor: Tensor) -> None:
    if is_lazy(tensor) or tensor.is_meta:
        raise NetworkError(f"{name} has no values yet: initialise the network (run it once) or load its weights first")
    if name.rpartition(".")[2] == "running_var" and bool((tensor < 0).any()):
        count, least = int((tensor < 0).sum()), float(tensor.min())
        raise NetworkError(f"{name} has {count} negative variances, down to {least:.3g}: load sound weights")


def _check_finite(name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not _is_finite(tensor):
        wrong = sum(int((~torch.isfinite(part)).sum()) for part in _blocks(tensor))
        raise NetworkError(f"{name} {tuple(tensor.shape)} holds NaN or infinity ({wrong} of {tensor.numel()} values): load sound weights")


def _is_finite(tensor: Tensor) -> bool:
    return all(bool(torch.isfinite(part).all()) for part in _blocks(tensor))


def _blocks(tensor: Tensor) -> tuple[Tensor, ...]:
    """Parts of a million values: a mask of all values may be larger than the memory that is left."""
    return torch.split(tensor.detach().reshape(-1), _BLOCK)


def _norm_statistics(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, buffer) for name, buffer in model.named_buffers() if name.rpartition(".")[2] in _NORM_STATISTICS)


def _specs(plan: Plan) -> dict[str, QSpec]:
    return {**{name: layer.weight for name, layer in plan.layers.items()}, **plan.activations}


def _difference(reference: Tensor, other: Tensor) -> float:
    """The largest difference, as a share of the largest value; 1 where shapes, or places of NaN and infinity, differ."""
    if reference.shape != other.shape:
        return 1.0
    if reference.numel() == 0:
        return 0.0
    first, second = reference.double(), other.double()
    change = float((first - second).abs().max())
    largest = float(first.abs().max())
    if torch.allclose(first, second, rtol=0, atol=0, equal_nan=True):
        return 0.0
    return change / largest if largest and math.isfinite(change) else 1.0
