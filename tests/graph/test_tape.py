"""The recorded forward pass: what it holds can be run again, and what it cannot hold is refused by name."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datafree.errors import FlowError
from datafree.graph.tape import Name, Ref, Tape, record, repeat, tensors_in
from networks import NAMES, build
from networks import Scripted as Net

Forward = Callable[["Net", Tensor], object]


def net(run: Callable[..., object], **parts: nn.Module) -> Net:
    """``run`` with two convolutions a (3 to 4 channels) and b (4 to 2), and ``parts``."""
    torch.manual_seed(0)
    return Net(run, a=nn.Conv2d(3, 4, 3, padding=1), b=nn.Conv2d(4, 2, 1), **parts).eval()


def noise(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 3, 8, 8)), generator=torch.Generator().manual_seed(0))


def replay(model: nn.Module, tape: Tape, x: Tensor) -> list[object]:
    values: list[object] = []

    def resolve(symbol: object) -> object:
        if isinstance(symbol, Ref):
            value = values[symbol.index]
            return value.clone() if isinstance(value, Tensor) else value  # an in-place call must not reach an earlier node
        if isinstance(symbol, Name):
            path, _, name = symbol.name.rpartition(".")
            return getattr(model.get_submodule(path), name)
        return symbol

    with torch.no_grad():
        for node in tape.nodes:
            values.append(x if node.call is None else repeat(node.call, resolve))
    return [values[index] for index in tape.outputs]


def assert_replays(model: nn.Module, x: Tensor) -> Tape:
    """On other values than those recorded."""
    tape = record(model, x.clone())
    other = x.flip(0) * 0.7
    assert [node.op for node in tape.nodes if node.call is None] == ["input"]
    with torch.no_grad():
        expected = list(tensors_in(model(other.clone())))
    torch.testing.assert_close(replay(model, tape, other), expected)
    return tape


def ops(tape: Tape) -> list[str]:
    return [node.op for node in tape.nodes]


@pytest.mark.parametrize("name", NAMES)
def test_every_tiny_network_replays(name: str) -> None:
    model, task = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    tape = assert_replays(model, noise(2, *task.shape))
    for index, node in enumerate(tape.nodes):
        assert node.index == index and all(each < index for each in node.inputs)
    assert len(tape.outputs) == 1 and tape.nodes[tape.outputs[0]].shape == (2, 5)
    assert tape.module_calls[-1].module == "" and tape.module_calls[-1].output == tape.outputs[0]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def in_place(self: Net, x: Tensor) -> Tensor:
    h = self.a(x)
    h += 1
    h.mul_(0.5).relu_()
    return F.relu(self.b(h), inplace=True)


def disjoint_chunks(self: Net, x: Tensor) -> Tensor:
    left, right = self.a(x).chunk(2, 1)
    right.relu_()  # the other half is untouched
    return self.b(torch.cat([left, right], 1))


def into_empty(self: Net, x: Tensor) -> Tensor:
    h = self.a(x)
    kept = torch.empty(h.shape)
    kept.copy_(h)
    return self.b(torch.add(kept, 1, out=torch.empty(h.shape)))


def many(self: Net, x: Tensor) -> object:
    h = self.a(x).relu()
    top, where = h.max(1, keepdim=True)
    return {"logits": self.b(h), "rest": (top, [h.mean(), where.float()])}


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * x


def custom(self: Net, x: Tensor) -> Tensor:
    answer: Tensor = self.b(Square.apply(self.a(x)))
    return answer


def unpacked(self: Net, x: Tensor) -> Tensor:
    one, two = self.a(x)
    answer: Tensor = self.b(one[None] + two[None])
    return answer


@pytest.mark.parametrize("run", [in_place, disjoint_chunks, into_empty, many, custom, unpacked])
def test_it_replays(run: Callable[..., object]) -> None:
    assert_replays(net(run), noise())


def test_modules_of_torch_replay() -> None:
    def tokens(self: Net, x: Tensor) -> Tensor:
        t = self.a(x).flatten(2).transpose(1, 2)
        t = t + self.mix(t, t, t, need_weights=False)[0]
        t = self.memory(self.encoder(t))[0]
        return self.cell(t.mean(1))

    parts = {
        "mix": nn.MultiheadAttention(4, 2, batch_first=True),
        "encoder": nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
        "memory": nn.LSTM(4, 5, batch_first=True),
        "cell": nn.GRUCell(5, 3),
    }
    assert_replays(net(tokens, **parts), noise())


def test_double_precision() -> None:
    assert_replays(net(in_place).double(), noise().double())


@pytest.mark.parametrize(
    "write",
    [
        lambda kept, h: kept.__setitem__((slice(None), slice(0, 4)), h),
        lambda kept, h: kept.index_copy_(1, torch.arange(4), h),
        lambda kept, h: setattr(kept, "data", h),
    ],
)
def test_what_is_written_into_a_constant_is_followed(write: Callable[[Tensor, Tensor], object]) -> None:
    def run(self: Net, x: Tensor) -> Tensor:
        kept = torch.zeros(2, 4, 8, 8)
        write(kept, self.a(x))
        return self.b(kept)

    tape = record(net(run), noise())
    conv_a, conv_b = (node for node in tape.nodes if node.op == "conv")
    assert conv_a.index in tape.nodes[conv_b.inputs[0]].inputs


def test_a_value_written_to_depends_on_both() -> None:
    def run(self: Net, x: Tensor) -> Tensor:
        h = self.a(x)
        h[:, 0] = x[:, 0]
        return self.b(h)

    tape = record(net(run), noise())
    written = next(node for node in tape.nodes if node.op == "setitem")
    assert written.call is None and [tape.nodes[each].op for each in written.inputs] == ["conv", "getitem"]
    assert next(node for node in tape.nodes if node.module == "b").inputs == (written.index,)


def test_an_argument_handed_back_is_no_operation() -> None:
    """Else a residual trunk would seem to come out of the dropout behind which it branches off."""

    def run(self: Net, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(self.drop(h).contiguous().float()) + self.b(h)

    assert ops(record(net(run, drop=nn.Dropout()), noise())) == ["input", "conv", "conv", "conv", "add"]


@pytest.mark.parametrize("take", [lambda h: h.mean().item(), lambda h: float(h.sum()), lambda h: h.numpy(), lambda h: h.tolist()])
def test_what_leaves_for_python_is_an_escape(take: Callable[[Tensor], object]) -> None:
    def run(self: Net, x: Tensor) -> Tensor:
        h = self.a(x)
        take(h)
        return self.b(h) if h.mean() < 9 and h.size(0) == 2 and h.dim() == 4 else h

    assert ops(record(net(run), noise())).count("escape") == 1


def test_the_training_mode_comes_back() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(), nn.Conv2d(4, 2, 1)).train()
    model[1].eval()
    assert ops(record(model, noise())) == ["input", "conv", "batch_norm", "conv"]
    assert [module.training for module in model.modules()] == [True, True, False, True, True]
    assert torch.equal(model.get_buffer("1.running_mean"), torch.zeros(4))


def test_hooks_of_the_user_are_seen_and_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    model[0].register_forward_hook(lambda module, args, result: result * 2)
    model[2].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    tape = assert_replays(model.eval(), noise())
    assert ops(tape) == ["input", "conv", "mul", "relu", "add", "conv"]
    assert [call.output for call in tape.module_calls] == [2, 3, 5, 5] and tape.module_calls[2].input == 4
    assert len(model[0]._forward_hooks) == 1 and len(model[2]._forward_pre_hooks) == 1


def test_a_tensor_handed_over_twice_is_neither_input_nor_output() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            out = x + y
            return out, out

    model = net(lambda self, x: self.b(self.pair(h := self.a(x), h)[1]), pair=Pair())
    call = next(each for each in record(model, noise()).module_calls if each.module == "pair")
    assert call.input is None and call.output is None


def test_an_exception_that_the_network_catches() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("no")

    def run(self: Net, x: Tensor) -> Tensor:
        try:
            h = self.broken(x)
        except ValueError:
            h = self.a(x)
        return self.b(h)

    tape = assert_replays(net(run, broken=Broken()), noise())
    assert [(node.op, node.module) for node in tape.nodes] == [("input", ""), ("conv", "a"), ("conv", "b")]
    assert [call.module for call in tape.module_calls] == ["a", "b", ""]


def test_unseen_code_is_opaque_and_depends_on_all_arguments() -> None:
    class Unseen(nn.Module):
        def forward(self, *, x: Tensor) -> Tensor:
            return torch.from_numpy(x.numpy() * 2)

    tape = record(net(lambda self, x: self.b(self.unseen(x=self.a(x))), unseen=Unseen()), noise())
    assert ops(tape) == ["input", "conv", "escape", "opaque", "conv"]
    assert tape.nodes[3].inputs == (1,) and tape.nodes[3].call is None and tape.nodes[3].shape == (2, 4, 8, 8)


def through_a_view(self: Net, x: Tensor) -> object:
    h = self.a(x)
    h[:, :2].mul_(2)
    return self.b(h)


def through_data(self: Net, x: Tensor) -> object:
    h = self.a(x)
    h.data.mul_(2)
    return self.b(h)


def changed_under_a_view(self: Net, x: Tensor) -> object:
    h = self.a(x)
    flat = h.flatten(1)
    h.relu_()
    return self.b(h), flat.mean()


def inferring(self: Net, x: Tensor) -> object:
    with torch.inference_mode():
        return self.b(self.a(x))


def failing(self: Net, x: Tensor) -> object:
    return self.a(x) / (1 // 0)


def exhausted(self: Net, x: Tensor) -> object:
    return next(each for each in self.parameters() if each is None)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (through_a_view, r"module 'b' \(.*test_tape.py:\d+\) reads a tensor that the operation 'mul' in the network's own forward"),
        (through_data, r"module 'b' .* changed in place through a view"),
        (changed_under_a_view, r"the network's own forward \(.*test_tape.py:\d+\) reads a tensor that the operation 'relu'"),
        (inferring, "runs in inference mode"),
        (failing, r"refused an input of shape \(2, 3, 8, 8\) in the network's own forward \(.*test_tape.py:\d+\): ZeroDivisionError"),
        (exhausted, "StopIteration"),
        (lambda self, x: self.b(x), r"in module 'b' \(.*test_tape.py:\d+\): RuntimeError.*Check the shape of the task"),
        (lambda self, x: self.missing(x), "AttributeError.*'missing'"),
        (lambda self, x: None, "a NoneType, holds no tensor"),
        (lambda self, x: self.a(x).numpy(), "a ndarray, holds no tensor"),
        (lambda self, x: self.a.weight, "a Parameter, holds no tensor"),
    ],
)
def test_refusals(run: Callable[..., object], message: str) -> None:
    model = net(run)
    with pytest.raises(FlowError, match=f"(?s){message}"):
        record(model, noise())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("shape", [(2, 3), (2, 4, 8, 8), (2, 3, 0, 8)])
def test_a_wrong_shape_is_refused_with_the_module(shape: tuple[int, ...]) -> None:
    with pytest.raises(FlowError, match=r"refused an input of shape .* in module 'a'"):
        record(net(in_place), torch.zeros(shape))


def test_a_second_argument_is_refused() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    with pytest.raises(FlowError, match="'y'.*that the network runs on one tensor"):
        record(Two(), noise())


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_compiled_networks_are_refused() -> None:
    with pytest.raises(FlowError, match="module 'part' is a TorchScript module"):
        record(net(in_place, part=torch.jit.script(nn.ReLU())), noise())
    with pytest.raises(FlowError, match="the network's own forward is compiled"):
        compiled = net(in_place)
        compiled.compile(backend="eager")
        record(compiled, noise())
