"""A network cut into the units that are reconstructed one after another: residual blocks, and single layers between them."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor, nn

from datafree.errors import NetworkError
from datafree.graph.flow import ACTIVATIONS, ADDS, Flow, Layer
from datafree.graph.tape import ModuleCall, tensors_in

_NOTHING: Mapping[str, object] = MappingProxyType({})


@dataclass(frozen=True)
class Unit:
    """A part of a network that can be run by itself: it makes one tensor of one tensor.

    Args:
        modules: their names, called one after another: a block, or a layer with the norm and the activation behind it, where these are
            modules.
        layers: that only this unit calls, by name, in execution order.
    """

    modules: tuple[str, ...]
    layers: tuple[str, ...]

    def run(self, model: nn.Module, x: Tensor, others: tuple[object, ...] = (), named: Mapping[str, object] = _NOTHING) -> Tensor:
        """What the unit of ``model`` makes of ``x``; ``others`` and ``named`` are what its first module is handed beside it."""
        result = _first(self.modules[0], model.get_submodule(self.modules[0])(x, *others, **named))
        for name in self.modules[1:]:
            result = _first(name, model.get_submodule(name)(result))
        return result


def _first(name: str, result: object) -> Tensor:
    tensor = next(tensors_in(result), None)
    if tensor is None:
        raise NetworkError(f"{name} returned a {type(result).__name__} this time, with no tensor in it: it cannot be run by itself")
    return tensor


def units(flow: Flow) -> tuple[Unit, ...]:
    """The units of a network, in execution order.

    A block is the smallest module around a residual sum that holds a layer, is called once, and takes one tensor; where such blocks
    contain one another, the inner ones count. Every other layer is a unit by itself. Layers that several units call are in none.
    """
    blocks = _blocks(flow)
    chains = [
        _chain(flow, layer)
        for layer in flow.layers.values()
        if len(layer.calls) == 1 and not any(block.start <= layer.calls[0] < block.stop for block in blocks)
    ]
    found = [(block.start, Unit((block.module,), _layers_in(flow, block))) for block in blocks]
    found += [(flow.layers[unit.layers[0]].calls[0], unit) for unit in chains if unit is not None]
    return tuple(unit for _, unit in sorted(found, key=lambda each: each[0]) if unit.layers)


def _blocks(flow: Flow) -> list[ModuleCall]:
    found = {}
    for node in flow.nodes:
        if node.op in ADDS and len(set(node.inputs)) == 2:
            around = (call for call in flow.module_calls if call.start <= node.index < call.stop)  # inner ones end first
            block = next((call for call in around if _alone(flow, call) and any(_calls_within(flow, call))), None)
            if block is not None:
                found[block.module] = block
    return [each for each in found.values() if not any(_contains(each, other) for other in found.values())]


def _alone(flow: Flow, call: ModuleCall) -> bool:
    """Whether the module is called once, and what it does depends on its first tensor only."""
    if not call.module or len(flow.calls_of[call.module]) > 1 or call.input is None or call.output is None:
        return False
    from_outside = {each for node in flow.nodes[call.start : call.stop] for each in node.inputs if each < call.start}
    return from_outside == {call.input}


def _contains(outer: ModuleCall, inner: ModuleCall) -> bool:
    return outer.module != inner.module and outer.start <= inner.start and inner.stop <= outer.stop


def _calls_within(flow: Flow, call: ModuleCall) -> Iterable[str]:
    return (name for index, name in flow.layer_at.items() if call.start <= index < call.stop)


def _layers_in(flow: Flow, block: ModuleCall) -> tuple[str, ...]:
    """Layers that are called within the block, and nowhere else."""
    names = dict.fromkeys(_calls_within(flow, block))
    return tuple(name for name in names if all(block.start <= call < block.stop for call in flow.layers[name].calls))


def _chain(flow: Flow, layer: Layer) -> Unit | None:
    """The layer, and behind it its norm and its activation, as far as they are modules."""
    call = next((each for each in flow.calls_of[layer.name] if each.start <= layer.calls[0] < each.stop), None)
    if call is None or call.input is None or call.output is None:
        return None
    return Unit((layer.name, *_behind(flow, call)), (layer.name,))


def _behind(flow: Flow, call: ModuleCall) -> Iterator[str]:
    """The norm and the activation modules that alone take what the module returns, one after another."""
    index = call.output
    while index is not None and index not in flow.outputs and len(flow.consumers[index]) == 1:
        use = flow.nodes[flow.consumers[index][0]]
        if use.op not in ACTIVATIONS and use.op != "batch_norm":
            return
        behind = next((each for each in flow.module_calls if each.module == use.module and each.start <= use.index < each.stop), None)
        if behind is None or behind.input != index or behind.output != use.index:
            return
        yield behind.module
        index = behind.output
