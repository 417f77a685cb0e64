"""Who feeds whom: the layers of a network, what follows each of them, and where the network branches and joins."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from datafree.context import Ctx
from datafree.errors import FlowError, NetworkError
from datafree.graph.tape import ModuleCall, Name, Node, Ref, Tape, record
from datafree.task import Task

Kind = Literal["conv", "conv_transpose", "linear"]

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (*CONVS, *TRANSPOSED, nn.Linear)

ACTIVATIONS = frozenset(
    "relu relu6 hardtanh clamp prelu rrelu leaky_relu elu selu celu silu gelu mish hardswish "
    "sigmoid hardsigmoid tanh softplus softsign logsigmoid".split()
)
# One tensor in, the same values out, only arranged otherwise or picked: quantizing before or after is the same.
MOVES = frozenset(
    "item view reshape flatten unflatten permute transpose t T mT squeeze unsqueeze expand expand_as repeat contiguous getitem "
    "chunk split tensor_split unbind roll flip dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout clone detach "
    "to float type_as movedim swapaxes pixel_shuffle pixel_unshuffle channel_shuffle unfold max_pool adaptive_max_pool pad "
    "view_as reshape_as".split()
)
POOLS = frozenset("avg_pool adaptive_avg_pool mean max_pool adaptive_max_pool interpolate".split())
ADDS = frozenset(("add", "sub"))


@dataclass(frozen=True)
class Layer:
    """A conv or linear layer and its surroundings.

    Args:
        name: of the module.
        kind: ``conv``, ``conv_transpose`` or ``linear``.
        weight_shape: (out, in / groups, *kernel), transposed convolutions (in, out / groups, *kernel).
        groups: 1 for linear layers.
        depthwise: every channel is a group of its own.
        calls: nodes of the tape, one a call.
        norm: the batch norm that alone follows it in every call (it may serve several layers).
        activation: the operation that alone follows it or its norm in every call, if that is an activation.
        first: in one of its calls no layer stands between the input and it.
        last: in one of its calls no layer stands between it and the output.
    """

    name: str
    kind: Kind
    weight_shape: tuple[int, ...]
    groups: int
    depthwise: bool
    calls: tuple[int, ...]
    norm: str | None
    activation: str | None
    first: bool
    last: bool

    @property
    def kernel(self) -> tuple[int, ...]:
        """Sizes of the kernel, () for a linear layer."""
        return self.weight_shape[2:]

    @property
    def out_axis(self) -> int:
        """The axis of the weight that holds the output channels (of one group, if transposed)."""
        return 1 if self.kind == "conv_transpose" else 0

    @property
    def scale_per_output(self) -> bool:
        """Whether a scale for each slice of ``out_axis`` is one for each output channel (not in grouped transposed layers)."""
        return self.kind != "conv_transpose" or self.groups == 1


@dataclass(frozen=True)
class Flow:
    """A network read: its layers in execution order, and the tape they were read from.

    Args:
        nodes: all values of the forward pass, in order.
        module_calls: all calls of modules, in the order in which they ended.
        outputs: the nodes that the network returns.
        layers: the layers that can be quantized, by name.
        floats: layers that cannot, each with the reason.
        input_moments: mean and standard deviation of synthetic inputs, for each channel or for all; see ``Task.input_moments``.
    """

    nodes: tuple[Node, ...]
    module_calls: tuple[ModuleCall, ...]
    outputs: tuple[int, ...]
    layers: Mapping[str, Layer]
    floats: Mapping[str, str]
    input_moments: tuple[tuple[float, ...], tuple[float, ...]] = ((0.0,), (1.0,))

    @cached_property
    def consumers(self) -> tuple[tuple[int, ...], ...]:
        """For each node the nodes that consume it on the way to an output, or out of the tape (``escape``)."""
        return _consumers(self.nodes, self.outputs)

    @cached_property
    def layer_at(self) -> Mapping[int, str]:
        """From the node of a call to the name of its layer."""
        return MappingProxyType({call: layer.name for layer in self.layers.values() for call in layer.calls})

    @cached_property
    def calls_of(self) -> Mapping[str, tuple[ModuleCall, ...]]:
        """The calls of each module that was called."""
        calls: dict[str, list[ModuleCall]] = {}
        for call in self.module_calls:
            calls.setdefault(call.module, []).append(call)
        return MappingProxyType({name: tuple(each) for name, each in calls.items()})

    @cached_property
    def shared_norms(self) -> frozenset[str]:
        """Batch norms that are called more than once: no single batch has the statistics that they have stored."""
        served = Counter(node.module for node in self.nodes if node.op == "batch_norm")
        return frozenset(name for name, count in served.items() if count > 1)

    def data(self, name: str) -> tuple[int, ...]:
        """The nodes that a layer takes as input, one a call."""
        return tuple(self.nodes[call].inputs[0] for call in self.layers[name].calls)

    def origin(self, index: int) -> int:
        """The node whose values the node ``index`` holds, arranged otherwise."""
        while self.nodes[index].op in MOVES and len(self.nodes[index].inputs) == 1:
            index = self.nodes[index].inputs[0]
        return index


def read(model: nn.Module, task: Task, ctx: Ctx) -> Flow:
    """:func:`flow` on noise of the task's shape, always the same."""
    return replace(flow(model, task.noise(2, torch.Generator(ctx.device).manual_seed(0))), input_moments=task.input_moments)


def flow(model: nn.Module, example: Tensor) -> Flow:
    """Read ``model`` by running it once on ``example``, (n, *shape).

    Raises:
        FlowError: the network refuses the input, or what a layer computes cannot be followed to the output.
        NetworkError: there is no layer to quantize.
    """
    tape = record(model, example)
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    consumers = _consumers(tape.nodes, tape.outputs)
    calls: dict[str, list[int]] = {}
    floats: dict[str, str] = {}
    for node in tape.nodes:
        if node.op in get_args(Kind) and isinstance(modules[node.module], LAYERS):
            if reason := _unfit(node, modules[node.module], parameters):
                floats[node.module] = reason
            else:
                calls.setdefault(node.module, []).append(node.index)
    _check_followed(tape, calls)
    for name, module in modules.items():
        if isinstance(module, LAYERS) and name not in calls and name not in floats:
            floats[name] = _unseen(name, module, tape, parameters)
    layer_nodes = {node.index for node in tape.nodes if node.op in get_args(Kind)}  # those that stay in float stand between others, too
    below, above = _below_a_layer(tape, layer_nodes), _above_a_layer(tape, layer_nodes, consumers)
    sole = {index: uses[0] for index, uses in enumerate(consumers) if len(uses) == 1 and index not in tape.outputs}
    layers = {
        name: _layer(name, modules, tuple(found), tape.nodes, sole, (below, above)) for name, found in calls.items() if name not in floats
    }
    if not layers:
        reasons = "".join(f"; {name}: {reason}" for name, reason in floats.items())
        raise NetworkError(f"the network has no convolution or linear layer that can be quantized{reasons}")
    return Flow(tape.nodes, tape.module_calls, tape.outputs, MappingProxyType(layers), MappingProxyType(floats))


def _consumers(nodes: tuple[Node, ...], outputs: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    alive = {*outputs, *(node.index for node in nodes if node.op == "escape")}
    consumers: list[list[int]] = [[] for _ in nodes]
    for node in reversed(nodes):
        if node.index in alive:
            for each in dict.fromkeys(node.inputs):
                alive.add(each)
                consumers[each].append(node.index)
    return tuple(tuple(reversed(each)) for each in consumers)


def _unfit(node: Node, module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> str | None:
    """Why the call of a layer module is not plain "its weight and bias on one input"; None if it is."""
    call = node.call
    if call is None or not call.args or not isinstance(call.args[0], Ref):
        return "its input does not depend on the network's input"
    weight, bias = (call.args[place] if len(call.args) > place else call.kwargs.get(name) for place, name in ((1, "weight"), (2, "bias")))
    if not isinstance(weight, Name) or parameters.get(weight.name) is not module.weight:
        return "its weight is computed on the fly (weight standardisation, weight norm or a parametrization) or no parameter"
    if (parameters.get(bias.name) if isinstance(bias, Name) else bias) is not module.bias:
        return "its forward does not use its bias as a bias"
    return None


def _unseen(name: str, module: nn.Module, tape: Tape, parameters: Mapping[str, nn.Parameter]) -> str:
    """Why the layer module ``name`` is on no node of the tape."""
    if any(call.module == name for call in tape.module_calls):
        return "its input does not depend on the network's input through operations that can be followed"
    names = {each for each, parameter in parameters.items() if parameter is module.weight}
    if any(isinstance(each, Name) and each.name in names for node in tape.nodes if node.call for each in node.call.args):
        return "another operation uses its weight (multi-head attention does)"
    return "its forward was not called"


def _check_followed(tape: Tape, calls: dict[str, list[int]]) -> None:
    reaching = set(tape.outputs)
    for node in reversed(tape.nodes):
        if node.index in reaching:
            reaching.update(node.inputs)
    for name, found in calls.items():
        if not any(each in reaching for each in found) and any(_seen_lost(tape, each) for each in found):
            raise FlowError(
                f"what layer {name!r} computes never reaches the output through operations that can be followed: a scripted function, "
                "numpy or an extension stands behind it. Wrap what it calls in an nn.Module, whose forward may hold anything"
            )


def _seen_lost(tape: Tape, index: int) -> bool:
    """Whether an opaque node runs after the node, so that its value may have gone through unseen code."""
    return any(node.op == "opaque" and index not in node.inputs for node in tape.nodes[index:])


def _below_a_layer(tape: Tape, layer_nodes: set[int]) -> set[int]:
    """Nodes that depend on the output of a layer."""
    found: set[int] = set()
    for node in tape.nodes:
        if any(each in found or each in layer_nodes for each in node.inputs):
            found.add(node.index)
    return found


def _above_a_layer(tape: Tape, layer_nodes: set[int], consumers: tuple[tuple[int, ...], ...]) -> set[int]:
    """Nodes on which the input of a layer depends."""
    found: set[int] = set()
    for node in reversed(tape.nodes):
        if any(each in found or each in layer_nodes for each in consumers[node.index]):
            found.add(node.index)
    return found


def _layer(
    name: str,
    modules: Mapping[str, nn.Module],
    calls: tuple[int, ...],
    nodes: tuple[Node, ...],
    sole: Mapping[int, int],
    around: tuple[set[int], set[int]],
) -> Layer:
    module = modules[name]
    assert isinstance(module, LAYERS)
    kind: Kind = "linear" if isinstance(module, nn.Linear) else "conv" if isinstance(module, CONVS) else "conv_transpose"
    groups, inputs = (1, module.in_features) if isinstance(module, nn.Linear) else (module.groups, module.in_channels)
    shape = tuple(module.weight.shape)
    norms = {_norm_after(nodes[call], nodes[sole[call]], modules, len(shape)) if call in sole else None for call in calls}
    norm = norms.pop() if len(norms) == 1 else None
    ends = [sole[call] if norm else call for call in calls]
    acts = {nodes[sole[end]].op if end in sole else "" for end in ends}
    activation = acts.pop() if len(acts) == 1 else ""
    below, above = around
    return Layer(
        name, kind, shape, groups, groups > 1 and groups == inputs, calls, norm, activation if activation in ACTIVATIONS else None,
        first=any(call not in below for call in calls), last=any(call not in above for call in calls),
    )  # fmt: skip


def _norm_after(node: Node, after: Node, modules: Mapping[str, nn.Module], dims: int) -> str | None:
    """The batch norm with stored statistics that ``after`` is, acting on the outputs of the layer call ``node``."""
    norm = modules[after.module]
    if after.op != "batch_norm" or not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_mean is None:
        return None
    return after.module if len(node.shape) == dims else None  # it acts on axis 1; the outputs of a linear layer with tokens are on the last
