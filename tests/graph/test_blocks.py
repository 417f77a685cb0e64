"""Units of reconstruction: residual blocks and layers, each a function of one tensor that can be run by itself."""

import pytest
import torch
from torch import Tensor, nn

from datafree.context import Ctx
from datafree.errors import NetworkError
from datafree.graph.blocks import Unit, units
from datafree.graph.flow import Flow, read
from datafree.task import Task
from networks import NAMES, Inverted, Scripted, build, conv_bn


def cut(model: nn.Module, task: Task) -> tuple[tuple[Unit, ...], Flow]:
    flow = read(model, task, Ctx.create(0))
    return units(flow), flow


@pytest.mark.parametrize(
    ("network", "modules"),
    (
        ("cifar_resnet", ["conv1 bn1", "layer1.0", "layer1.1", "layer2.0", "linear"]),
        ("resnet_basic", ["conv1 bn1 relu", "layers.0", "layers.1", "fc"]),
        ("mobilenet", ["0.0 0.1 0.2", "1", "2", "3.conv.0.0 3.conv.0.1 3.conv.0.2", "3.conv.1.0 3.conv.1.1 3.conv.1.2",
                       "3.conv.2 3.conv.3", "4.0 4.1 4.2", "8"]),
        ("vgg", ["0 1 2", "3 4 5", "7 8 9", "10 11 12", "15 16", "17"]),
        ("transformer", ["patch", "blocks.0", "blocks.1", "head"]),
        ("twice", ["stem stem_bn", "left shared", "right shared", "fc"]),
    ),
)  # fmt: skip
def test_blocks_where_there_are_sums_and_layers_elsewhere(network: str, modules: list[str]) -> None:
    found, _ = cut(*build(network))
    assert [" ".join(unit.modules) for unit in found] == modules


@pytest.mark.parametrize("network", NAMES)
def test_every_layer_that_is_called_once_is_in_one_unit(network: str) -> None:
    found, flow = cut(*build(network))
    names = [name for unit in found for name in unit.layers]
    assert len(set(names)) == len(names)
    assert set(names) == {name for name, layer in flow.layers.items() if len(layer.calls) == 1}


@pytest.mark.parametrize("network", NAMES)
def test_a_unit_run_by_itself_makes_what_it_makes_within_the_network(network: str) -> None:
    model, task = build(network)
    for unit in cut(model, task)[0]:
        if "shared" in unit.modules:  # a norm that others call as well
            continue
        x, y = passing(model, unit, task.noise(4, torch.Generator().manual_seed(0)))
        with torch.no_grad():
            assert torch.equal(unit.run(model, x), y)


def passing(model: nn.Module, unit: Unit, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """What enters the first module of the unit and leaves the last in a full pass."""
    seen: list[Tensor] = []
    first, last = (model.get_submodule(unit.modules[place]) for place in (0, -1))
    handles = [
        first.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone())),
        last.register_forward_hook(lambda module, args, result: seen.append(result.clone())),
    ]
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    return seen[0], seen[-1]


def test_of_blocks_within_one_another_the_inner_ones_count() -> None:
    task = Task(shape=(3, 8, 8))
    outer = Scripted(lambda self, x: x + self.tail(self.inner(x)), inner=Inverted(3, 3), tail=nn.Conv2d(3, 3, 1))
    found, _ = cut(nn.Sequential(outer, nn.Flatten(), nn.Linear(192, 4)).eval(), task)
    assert [unit.modules for unit in found] == [("0.inner",), ("0.tail",), ("2",)]


def test_a_block_that_takes_two_tensors_is_cut_further() -> None:
    task = Task(shape=(3, 8, 8))
    block = Scripted(lambda self, pair: pair[0] + self.conv(pair[1]), conv=nn.Conv2d(3, 3, 1))
    model = Scripted(
        lambda self, x: self.head(self.block((self.stem(x), x)).flatten(1)), stem=nn.Conv2d(3, 3, 1), block=block, head=nn.Linear(192, 4)
    )
    found, _ = cut(model.eval(), task)
    assert [unit.modules for unit in found] == [("stem",), ("block.conv",), ("head",)]


def test_layers_of_a_block_that_another_part_calls_as_well_are_not_its_own() -> None:
    shared = nn.Conv2d(3, 3, 1)
    parts = {name: Scripted(lambda self, x: x + self.shared(self.own(x)), own=nn.Conv2d(3, 3, 1), shared=shared) for name in ("one", "two")}
    model = Scripted(lambda self, x: self.two(self.one(x)).mean((2, 3)), **parts)
    found, _ = cut(model.eval(), Task(shape=(3, 8, 8)))
    assert [unit.layers for unit in found] == [("one.own",), ("two.own",)]


def test_what_returns_no_tensor_is_told() -> None:
    silent = nn.Sequential(Scripted(lambda self, x: "nothing"), *conv_bn(3, 3))
    with pytest.raises(NetworkError, match="0 returned a str this time"):
        Unit(("0",), ()).run(silent, torch.zeros(1))
