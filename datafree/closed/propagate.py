"""Moments of every activation of a network, from its batch norms on: the recorded forward pass run on means and variances.

A batch norm makes its output N(beta, gamma^2) whatever stands before it, so only what stands between norms is computed,
and only on demand. Every value is a pair of maps, means and variances, of the shape of the activation. What is assumed:

- the network's input has the moments of synthetic pictures; what a norm gives is normal and its channels are independent;
- the two sides of an addition (unless told otherwise) or a product are independent (unless they are the same value);
- averaging over positions keeps the variance, as if the pixels of a channel were one (an upper bound);
- a layer sees the average variance of each input channel, and neighbouring pixels correlate by ``RHO``;
- what is not listed in ``_RULES`` (softmax, matrix products, ...) gives unknown moments, and so does all that depends on
  it up to the next norm.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datafree.closed.moments import Moments, clip, elementwise, outputs_first, variance_form, window_maximum
from datafree.errors import NetworkError
from datafree.graph.flow import ACTIVATIONS, MOVES, Flow
from datafree.graph.tape import Call, Name, Node, Ref, repeat, tensors_in

Value = Moments | tuple[Moments, ...]  # a tuple where the operation gives several tensors
# Where a norm's function takes its weight and its bias.
_NORMS: Mapping[Callable[..., object], tuple[int, int]] = MappingProxyType(
    {F.batch_norm: (3, 4), F.instance_norm: (3, 4), F.layer_norm: (2, 3), F.group_norm: (2, 3)}
)
_SIGNS = MappingProxyType({"add": (1.0, 1.0), "sub": (1.0, -1.0), "rsub": (-1.0, 1.0), "neg": (-1.0,)})


@torch.no_grad()
def layer_inputs(flow: Flow, model: nn.Module) -> dict[str, Moments]:
    """Moments of the input of every layer, by name: vectors (in_channels,), averaged over batch, positions and calls.

    ``model`` is the network that ``flow`` was read from, or a copy of it with other weights under the same names.
    """
    places = {layer.name: (flow.data(layer.name), -1 - len(layer.kernel)) for layer in flow.layers.values()}
    found: dict[str, list[Moments]] = {name: [] for name in places}
    for index, value in _evaluate(flow, model, {each for data, _ in places.values() for each in data}):
        for name, (data, axis) in places.items():
            if index in data:
                seen = Moments(_per_channel(value.mean, axis), _per_channel(value.var, axis), value.known)
                found[name] += [seen] * data.count(index)
    return {name: _average(seen) for name, seen in found.items()}


@torch.no_grad()
def node_moments(flow: Flow, model: nn.Module, indices: Iterable[int], correlation: float = 0.0) -> dict[int, Moments]:
    """Moments of nodes, in the shape of their values; ``correlation``: of the sides of sums. Raises NetworkError for a tuple of tensors."""
    return dict(_evaluate(flow, model, set(indices), correlation))


def _average(seen: list[Moments]) -> Moments:
    if not all(each.known for each in seen):
        return Moments(torch.zeros_like(seen[0].mean), torch.ones_like(seen[0].var), known=False)
    return Moments(torch.stack([each.mean for each in seen]).mean(0), torch.stack([each.var for each in seen]).mean(0))


def _evaluate(flow: Flow, model: nn.Module, wanted: set[int], correlation: float = 0.0) -> Iterator[tuple[int, Moments]]:
    """The wanted nodes in order; a map lives only until its last use."""
    needed = set(wanted)
    for node in reversed(flow.nodes):
        if node.index in needed:
            needed.update(_sources(flow, node))
    uses = Counter(each for index in needed for each in set(_sources(flow, flow.nodes[index])))
    values: dict[int, Value] = {}
    for index in sorted(needed):
        value = _value(_Step(flow, flow.nodes[index], model, values, correlation))
        if index in wanted:
            if not isinstance(value, Moments):
                raise NetworkError(f"node {index} ({flow.nodes[index].op}) is a tuple of tensors: ask for the items it is taken apart into")
            yield index, value
        values[index] = value
        for each in set(_sources(flow, flow.nodes[index])):
            uses[each] -= 1
        for each in [each for each in values if not uses[each]]:
            del values[each]


def _sources(flow: Flow, node: Node) -> tuple[int, ...]:
    """The nodes on whose moments those of ``node`` depend."""
    if node.call is None or node.call.function in _NORMS:
        return ()
    if node.op in ("max_pool", "adaptive_max_pool") and _bounds(flow.nodes[node.inputs[0]]) is not None:
        return flow.nodes[node.inputs[0]].inputs  # the maximum of clipped values is the clipped maximum, of normal values
    return node.inputs


def _value(step: "_Step") -> Value:
    node = step.node
    if node.op == "input":
        mean, deviation = (torch.tensor(each).to(step.zero).view(-1, *(1,) * len(node.shape[2:])) for each in step.flow.input_moments)
        return Moments(mean.expand(node.shape), deviation.square().expand(node.shape))
    if node.call is None:
        return step.unknown()
    if node.call.function in _NORMS:
        return _norm(step)
    sources = [step.values[each] for each in step.sources]
    if node.op not in _RULES or any(isinstance(each, Moments) and not each.known for each in sources):
        return step.unknown()
    return _RULES[node.op](step)


@dataclass(frozen=True)
class _Step:
    """One node to be evaluated, and the values so far."""

    flow: Flow
    node: Node
    model: nn.Module
    values: Mapping[int, Value]
    correlation: float

    @property
    def call(self) -> Call:
        assert self.node.call is not None
        return self.node.call

    @property
    def sources(self) -> tuple[int, ...]:
        return _sources(self.flow, self.node)

    @property
    def zero(self) -> Tensor:
        like = next((each for each in self.model.parameters() if each.is_floating_point()), torch.zeros(()))
        return torch.zeros((), dtype=like.dtype, device=like.device)

    def unknown(self) -> Moments:
        return Moments(self.zero.expand(self.node.shape), (self.zero + 1).expand(self.node.shape), known=False)

    def moments(self, index: int) -> Moments:
        value = self.values[index]
        assert isinstance(value, Moments)
        return value

    def constant(self, symbol: object) -> object:
        """A parameter or buffer by its name, as the model holds it now; anything else as it is."""
        if not isinstance(symbol, Name):
            return symbol
        path, _, name = symbol.name.rpartition(".")
        return getattr(self.model.get_submodule(path), name)

    def argument(self, place: int, name: str, default: object = None) -> object:
        args = self.call.args
        return self.constant(args[place] if place < len(args) else self.call.kwargs.get(name, default))

    def run(self, value: Tensor) -> Tensor:
        """The recorded call with its only input replaced."""
        out = repeat(self.call, lambda symbol: value if isinstance(symbol, Ref) else self.constant(symbol))
        assert isinstance(out, Tensor)
        return out


# Maps that are constant along an axis are expanded, with stride 0, and computed only once along it.


def _narrowed(maps: Sequence[Tensor], shape: tuple[int, ...], keep: int) -> list[Tensor]:
    """The maps, expanded to ``shape``, cut to one entry along the axes (but ``keep``) on which all are constant."""
    maps = [each.expand(shape) for each in maps]
    for axis in range(len(shape)):
        if axis != keep % len(shape) and all(each.stride(axis) == 0 for each in maps):
            maps = [each.narrow(axis, 0, 1) for each in maps]
    return maps


def _pointwise(step: _Step, function: Callable[..., tuple[Tensor, Tensor]], *maps: Tensor) -> Moments:
    """``function`` of maps, entry by entry; axis 1 stays whole for functions with a parameter per channel."""
    shape = step.node.shape
    mean, var = function(*_narrowed(maps, shape, keep=1))
    if not (torch.isfinite(mean).all() and torch.isfinite(var).all()):
        return step.unknown()  # a root or a logarithm of normal values has no moments
    return Moments(mean.expand(shape), var.expand(shape))


def _per_channel(values: Tensor, axis: int) -> Tensor:
    return values.movedim(axis, 0).flatten(1).mean(1) if values.dim() > 1 else values


def _norm(step: _Step) -> Moments:
    """Mean beta and variance gamma^2 per channel; of tokens (layer norm) this holds on average only."""
    shape = step.node.shape
    places = _NORMS[step.call.function]
    weight, bias = step.argument(places[0], "weight"), step.argument(places[1], "bias")
    mean = bias if isinstance(bias, Tensor) else step.zero
    var = weight.square() if isinstance(weight, Tensor) else step.zero + 1
    if step.call.function is F.batch_norm:
        stored, eps = step.argument(2, "running_var"), step.argument(7, "eps", 1e-5)
        if isinstance(stored, Tensor) and isinstance(eps, float):
            var = var * stored / (stored + eps)  # a channel that never moved has no variance, whatever its gamma
    if step.call.function is not F.layer_norm:
        mean, var = (each.view(-1, *(1,) * (len(shape) - 2)) for each in (mean, var))
    return Moments(mean.expand(shape), var.expand(shape))


def _identity(step: _Step) -> Value:
    return step.values[step.sources[0]]


def _moved(step: _Step) -> Value:
    """The very same call on the means and on the variances."""
    if len(step.sources) > 1 and step.node.op not in _SEVERAL:
        return step.unknown()  # values pick the places of values
    if step.node.op in ("view", "unflatten"):  # these refuse expanded maps

        def source(each: Tensor) -> Tensor:
            return each.contiguous()
    else:

        def source(each: Tensor) -> Tensor:
            return each.view(each.shape)  # in-place forms (unsqueeze_) change the shape of this alias only

    def of_mean(symbol: object) -> object:
        return source(step.moments(symbol.index).mean) if isinstance(symbol, Ref) else step.constant(symbol)

    def of_var(symbol: object) -> object:
        if isinstance(symbol, Ref):
            return source(step.moments(symbol.index).var)
        constant = step.constant(symbol)
        return torch.zeros_like(constant) if isinstance(constant, Tensor) and constant.is_floating_point() else constant

    for_var = step.call
    if step.node.op == "pad":  # a padding constant has no variance
        kwargs = {name: each for name, each in for_var.kwargs.items() if name != "value"}
        for_var = Call(for_var.function, for_var.args[:3], kwargs)
    mean, var = repeat(step.call, of_mean), repeat(for_var, of_var)
    if isinstance(mean, Tensor) and isinstance(var, Tensor):
        return Moments(mean, var) if mean.is_floating_point() else step.unknown()
    return tuple(Moments(*each) for each in zip(tensors_in(mean), tensors_in(var), strict=True))


def _item(step: _Step) -> Value:
    value, place = step.values[step.sources[0]], step.call.args[1]
    assert isinstance(value, tuple) and isinstance(place, int)
    return value[place]


def _filled(step: _Step) -> Moments:
    """Zeros, ones or a constant in the shape of a value."""
    mean = step.run(step.moments(step.sources[0]).mean)
    return Moments(mean, torch.zeros_like(mean))


def _averaged(step: _Step) -> Moments:
    given = step.moments(step.sources[0])
    return Moments(step.run(given.mean), step.run(given.var))


def _bounds(node: Node) -> tuple[float, float] | None:
    """Between what ``node`` clips its only input, if it does and the bounds are numbers."""
    if node.call is None or len(node.inputs) != 1:
        return None
    args, kwargs = node.call.args, node.call.kwargs
    match node.op:
        case "relu":
            return 0.0, math.inf
        case "relu6":
            return 0.0, 6.0
        case "hardtanh":
            low, high = (args[i] if i < len(args) else kwargs.get(name, d) for i, name, d in ((1, "min_val", -1.0), (2, "max_val", 1.0)))
        case "clamp":
            low, high = (args[i] if i < len(args) else kwargs.get(name) for i, name in ((1, "min"), (2, "max")))
            low, high = -math.inf if low is None else low, math.inf if high is None else high
        case _:
            return None
    return (float(low), float(high)) if isinstance(low, (int, float)) and isinstance(high, (int, float)) else None


def _activation(step: _Step) -> Moments:
    if len(step.sources) > 1:
        return step.unknown()
    given, bounds = step.moments(step.sources[0]), _bounds(step.node)
    if bounds is not None:
        return _pointwise(step, lambda mean, var: clip(mean, var.sqrt(), *bounds), given.mean, given.var)
    return _pointwise(step, lambda mean, var: elementwise(step.run, mean, var.sqrt()), given.mean, given.var)


def _operands(step: _Step) -> list[object]:
    return [step.argument(0, "input"), *([] if step.node.op == "neg" else [step.argument(1, "other")])]


def _sum(step: _Step) -> Moments:
    """Of values with the given correlation, 0 by default, and of a value with itself."""
    signs, rho = list(_SIGNS[step.node.op]), step.correlation
    alpha = step.call.kwargs.get("alpha", 1)
    assert isinstance(alpha, (int, float))
    signs[0 if step.node.op == "rsub" else -1] *= alpha
    factors: dict[int, float] = {}
    offset = step.zero
    for operand, sign in zip(_operands(step), signs, strict=True):
        if isinstance(operand, Ref):
            factors[operand.index] = factors.get(operand.index, 0.0) + sign
        elif isinstance(operand, (int, float, Tensor)):
            offset = offset + sign * operand
        else:
            return step.unknown()

    def combine(offset: Tensor, *maps: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = offset, torch.zeros_like(offset)
        for factor, each_mean, each_var in zip(factors.values(), maps[::2], maps[1::2], strict=True):
            mean, var = mean + factor * each_mean, var + factor**2 * each_var + 2 * rho * abs(factor) * (var * each_var).sqrt()
        return mean, var

    maps = [each for index in factors for each in (step.moments(index).mean, step.moments(index).var)]
    return _pointwise(step, combine, offset, *maps)


def _product(step: _Step) -> Moments:
    """With a constant, of independent values, or the square of a normal value."""
    first, second = _operands(step)
    if step.node.op == "div" and (isinstance(second, Ref) or step.call.kwargs.get("rounding_mode") is not None):
        return step.unknown()
    if isinstance(first, Ref) and isinstance(second, Ref):
        one, two = step.moments(first.index), step.moments(second.index)
        if first.index == second.index:
            return _pointwise(step, lambda m, v: (m.square() + v, 2 * v.square() + 4 * m.square() * v), one.mean, one.var)

        def times(m1: Tensor, v1: Tensor, m2: Tensor, v2: Tensor) -> tuple[Tensor, Tensor]:
            return m1 * m2, v1 * v2 + v1 * m2.square() + v2 * m1.square()

        return _pointwise(step, times, one.mean, one.var, two.mean, two.var)
    reference, factor = (first, second) if isinstance(first, Ref) else (second, first)
    if not isinstance(reference, Ref) or not isinstance(factor, (int, float, Tensor)):
        return step.unknown()
    given = step.moments(reference.index)
    scale = step.zero + (1 / factor if step.node.op == "div" else factor)
    return _pointwise(step, lambda mean, var, by: (mean * by, var * by.square()), given.mean, given.var, scale)


def _maximum(step: _Step) -> Moments:
    """The largest of a window of normal values; clipping comes after it, see ``_sources``."""
    shape = step.node.shape
    if len(shape) < 3:  # with the places of the maxima, or without a batch
        return step.unknown()
    given, bounds = step.moments(step.sources[0]), _bounds(step.flow.nodes[step.node.inputs[0]])
    spatial = len(shape) - 2
    size = step.argument(1, "kernel_size")
    if step.node.op == "adaptive_max_pool":
        kernel = tuple(-(-before // after) for before, after in zip(given.mean.shape[2:], shape[2:], strict=True))
    else:
        kernel = tuple(size) * (spatial // len(size)) if isinstance(size, (tuple, list)) else (int(str(size)),) * spatial
    mean, var = window_maximum(step.run(given.mean), step.run(given.var).sqrt(), kernel)
    return Moments(mean, var) if bounds is None else Moments(*clip(mean, var.sqrt(), *bounds))


def _layer(step: _Step) -> Moments:
    """A layer without a norm: the exact mean, and per output channel the variance that T3 gives."""
    weight, shape = step.argument(1, "weight"), step.node.shape
    if len(step.sources) > 1 or not isinstance(weight, Tensor):
        return step.unknown()  # weights that depend on the input
    given, axis = step.moments(step.sources[0]), 1 - weight.dim()
    var_in = _per_channel(given.var, axis)
    if step.node.op == "linear":
        (mean,) = _narrowed([given.mean], tuple(given.mean.shape), keep=-1)
        return Moments(step.run(mean).expand(shape), variance_form(weight, weight, var_in).expand(shape))
    var = _transposed_variance(step, weight, var_in) if step.node.op == "conv_transpose" else variance_form(weight, weight, var_in)
    return Moments(step.run(given.mean), var.view(-1, *(1,) * (-1 - axis)).expand(shape))


def _transposed_variance(step: _Step, weight: Tensor, var_in: Tensor) -> Tensor:
    """On average over the output positions, of which each sees every stride-th tap."""
    groups, stride = step.argument(6, "groups", 1), step.argument(3, "stride", 1)
    assert isinstance(groups, int) and isinstance(stride, (int, tuple, list))
    weight = outputs_first(weight, groups)
    spatial = weight.dim() - 2
    strides = (stride,) * spatial if isinstance(stride, int) else tuple(stride) * (spatial // len(stride))
    total = step.zero
    for phase in itertools.product(*([slice(start, None, size) for start in range(size)] for size in strides)):
        taps = weight[(slice(None), slice(None), *phase)]
        if taps.numel():
            total = total + variance_form(taps, taps, var_in)
    return total / math.prod(strides)


_SAME = tuple("dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout contiguous clone detach data".split())
_SEVERAL = frozenset("cat stack hstack vstack dstack column_stack to type_as expand_as view_as reshape_as".split())
_MORE_MOVES = tuple("index_select repeat_interleave tile moveaxis swapdims ravel real zero_pad2d hsplit vsplit dsplit".split())
_MORE_ACTIVATIONS = tuple("abs square pow exp erf sin cos threshold softshrink hardshrink tanhshrink clamp_min clamp_max".split())
_FILLS = tuple("zeros_like ones_like full_like new_zeros new_ones new_full".split())

_RULES: Mapping[str, Callable[[_Step], Value]] = MappingProxyType(
    {
        **dict.fromkeys((*MOVES, *_MORE_MOVES, *_SEVERAL), _moved),
        **dict.fromkeys(_SAME, _identity),
        **dict.fromkeys((*ACTIVATIONS, *_MORE_ACTIVATIONS), _activation),
        **dict.fromkeys(_SIGNS, _sum),
        **dict.fromkeys(("mul", "div"), _product),
        **dict.fromkeys(("avg_pool", "adaptive_avg_pool", "mean", "interpolate"), _averaged),
        **dict.fromkeys(("max_pool", "adaptive_max_pool"), _maximum),
        **dict.fromkeys(("conv", "conv_transpose", "linear"), _layer),
        **dict.fromkeys(_FILLS, _filled),
        "item": _item,
    }
)
