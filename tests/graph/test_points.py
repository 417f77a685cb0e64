"""Points: marking what passes them shows that they serve all consumers, and no others."""

import copy
from collections.abc import Callable, Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datafree.bits.allocate import activation_points
from datafree.graph.flow import MOVES, Flow, flow
from datafree.graph.points import points
from datafree.plan import Plan, QSpec, Target
from datafree.quant.insert import insert
from networks import NAMES, build
from networks import Scripted as Net

MARK = "nan_to_num"  # an operation that no network here uses, and that changes nothing


def noise(*shape: int) -> Tensor:
    return torch.randn(2, *(shape or (3, 8, 8)), generator=torch.Generator().manual_seed(0))


def net(run: Callable[..., object], **parts: nn.Module) -> nn.Module:
    convs = {name: nn.Conv2d(3, 3, 3, padding=1) for name in "abc"}
    return Net(run, **convs, **parts).eval()


class Block(nn.Module):
    def __init__(self, run: Callable[..., object]):
        super().__init__()
        self.run, self.conv = run, nn.Conv2d(3, 3, 1)

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.run(self, *args, **kwargs)


class Marker(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nan_to_num(x)


def marked(model: nn.Module, x: Tensor, where: Iterable[str]) -> Flow:
    """The flow of a copy in which all quantizers of the points have become marks."""
    student = insert(copy.deepcopy(model), Plan({}, {point: QSpec(8) for point in where}))
    for point in where:
        name, _, side = point.rpartition(":")
        setattr(student.get_submodule(name), f"{side}_quantizer", Marker())
    return flow(student, x)


def uses_of_marks(model: nn.Module, x: Tensor, where: Iterable[str]) -> set[tuple[int, int]]:
    """(source, consumer) of every value that is read through a mark, as nodes of the network without marks."""
    found = marked(model, x, where)
    plain: dict[int, int] = {}
    for node in found.nodes:
        if node.op != MARK:
            plain[node.index] = len(plain)

    def behind(index: int) -> int:
        return behind(found.nodes[index].inputs[0]) if found.nodes[index].op == MARK else plain[index]

    return {
        (behind(each), plain[node.index]) for node in found.nodes if node.op != MARK for each in node.inputs if found.nodes[each].op == MARK
    }


@pytest.mark.parametrize("name", NAMES)
def test_points_serve_exactly_the_consumers_they_claim(name: str) -> None:
    model, task = build(name)
    x = noise(*task.shape)
    found, modules = flow(model, x), dict(model.named_modules())
    for node in found.nodes:
        where, missed = points(found, modules, node.index)
        uses = uses_of_marks(model, x, where) if where else set()
        expected = {(node.index, use) for use in found.consumers[node.index] if use not in missed}
        assert {pair for pair in uses if pair[0] == node.index and pair[1] in found.consumers[node.index]} == expected, (node, where)
        shared = any(len(found.calls_of[point.rpartition(":")[0]]) > 1 for point in where)
        assert shared or {source for source, _ in uses} <= {node.index}, (node, where)


@pytest.mark.parametrize("protocol", ["deploy", "paper"])
@pytest.mark.parametrize("name", NAMES)
def test_the_points_of_a_protocol_serve_every_layer_or_say_so(name: str, protocol: str) -> None:
    model, task = build(name)
    x = noise(*task.shape)
    found = flow(model, x)
    acts = activation_points(found, model, Target(4, act_bits=4, protocol=protocol))
    where = [*(f"{layer}:input" for layer in acts.at_layers), *acts.elsewhere]
    uses = uses_of_marks(model, x, where)

    def quantized(index: int, use: int) -> bool:
        """Whether the value arrives marked, at once or before it was moved."""
        node = found.nodes[index]
        return (index, use) in uses or (node.op in MOVES and len(node.inputs) == 1 and quantized(node.inputs[0], index))

    if protocol == "deploy":
        for layer in found.layers.values():
            assert all(quantized(source, call) for source, call in zip(found.data(layer.name), layer.calls, strict=True)), layer.name
    else:
        first = next(iter(found.layers.values()))
        assert not quantized(found.data(first.name)[0], first.calls[0])


def cover(model: nn.Module, op: str) -> tuple[tuple[str, ...], list[str]]:
    """Points for the first node made by ``op``, and the operations left uncovered; checked with marks."""
    x = noise()
    found, modules = flow(model, x), dict(model.named_modules())
    index = next(node.index for node in found.nodes if node.op == op)
    where, missed = points(found, modules, index)
    uses = uses_of_marks(model, x, where) if where else set()
    assert {use for source, use in uses if source == index} == set(found.consumers[index]) - set(missed)
    return where, [found.nodes[each].op for each in missed]


def test_a_tensor_that_only_layers_read_is_quantized_at_their_inputs() -> None:
    assert cover(net(lambda self, x: self.b(h := self.a(x).relu()) + self.c(h)), "relu") == (("b:input", "c:input"), [])


def test_a_tensor_that_others_read_too_is_quantized_where_it_is_made() -> None:
    assert cover(net(lambda self, x: self.b(h := self.act(self.a(x))) + h, act=nn.ReLU()), "relu") == (("act:output",), [])


def test_a_nameless_tensor_is_quantized_where_it_enters_or_is_reported() -> None:
    block = Block(lambda self, h: self.conv(h) + h)
    assert cover(net(lambda self, x: self.b(self.block(self.a(x).relu())), block=block), "relu") == (("block:input",), [])
    assert cover(net(lambda self, x: self.b(h := self.a(x).relu()) + h), "relu") == (("b:input",), ["add"])


def test_a_trunk_behind_dropout_is_not_made_by_the_dropout() -> None:
    model = net(lambda self, x: self.b(self.drop(h := self.a(x).relu())) + h, drop=nn.Dropout())
    assert cover(model, "relu") == (("b:input",), ["add"])


def test_a_module_that_reads_what_it_returns_does_not_serve_itself() -> None:
    block = Block(lambda self, x: (h := F.silu(self.conv(x)), h.mean()))
    model = net(lambda self, x: self.b((y := self.block(self.a(x)))[0]) * y[1], block=block)
    assert cover(model, "silu") == (("b:input",), ["mean"])


def test_a_module_that_hands_its_argument_on_did_not_make_it() -> None:
    block = Block(lambda self, h: h)
    model = net(lambda self, x: self.b(self.block(h=(t := self.a(x).relu()))) + t, block=block)
    assert cover(model, "relu") == (("b:input",), ["add"])


@pytest.mark.parametrize(
    "block",
    [
        Block(lambda self, x: [self.conv(x).relu()]),  # hooks quantize tensors and tuples only
        Block(lambda self, x: {0: self.conv(x).relu()}),
        Block(lambda self, x: (h := self.conv(x).relu(), h)[::-1]),  # the second of the two would stay float
    ],
)
def test_answers_that_no_quantizer_can_hold(block: nn.Module) -> None:
    model = net(lambda self, x: self.b((y := self.block(x))[0]) + y[len(y) - 1], block=block)
    assert cover(model, "relu") == (("b:input",), ["add"])


def test_layers_called_by_keyword_have_no_input_point() -> None:
    assert cover(net(lambda self, x: self.b(input=self.act(self.a(x))), act=nn.ReLU()), "relu") == (("act:output",), [])
    assert cover(net(lambda self, x: self.b(input=self.a(x).relu())), "relu") == ((), ["conv"])


def test_a_tensor_handed_over_twice() -> None:
    pair = Block(lambda self, x, y: self.conv(x) + y)
    assert cover(net(lambda self, x: self.pair(h := self.a(x).relu(), h), pair=pair), "relu") == (("pair.conv:input",), ["add"])


def test_modules_called_twice_and_containers_carry_nothing() -> None:
    twice = net(lambda self, x: self.b(h := self.act(self.a(x))) + h + self.act(x), act=nn.ReLU())
    assert cover(twice, "relu") == (("b:input",), ["add"])
    inside = net(lambda self, x: self.b(h := self.part(x)) + h, part=nn.Sequential(nn.Conv2d(3, 3, 1), Block(lambda self, x: x.relu())))
    assert cover(inside, "relu") == (("part.1:output",), [])
