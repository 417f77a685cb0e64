"""What is refused or noted before the work: networks whose answers cannot be compared, wrappers, attributes that cannot be copied."""

import logging
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import datafree
from datafree.checks import check_network
from datafree.errors import NetworkError
from datafree.export.float_weights import weights_hash
from datafree.task import Task
from tests.field import trained
from tests.networks import Scripted

TASK = Task(shape=(3, 8, 8), mean=(0.5,), std=(0.25,), classes=5)


def body() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    return trained(nn.Sequential(*layers), TASK)


class Memory(nn.Module):
    """Mixes in the features of the call before, which lie in an attribute or in a buffer."""

    def __init__(self, buffer: bool) -> None:
        super().__init__()
        self.body, self.buffer = body(), buffer
        self.before: Tensor | None = None
        self.register_buffer("sum", torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        now = self.body(x)
        if self.buffer:
            self.sum += now.mean(0)
            return torch.as_tensor(now + self.sum)
        before = now if self.before is None or self.before.shape != now.shape else self.before
        self.before = now.detach()
        return torch.as_tensor(now + before)


def scripted(run: Callable[..., object]) -> nn.Module:
    return Scripted(run, body=body(), head=nn.Linear(5, 5)).eval()


RANDOM = {
    "dropout": lambda self, x: self.head(F.dropout(self.body(x), 0.3)),
    "sample": lambda self, x: self.body(x) + 0.1 * torch.randn(len(x), 5),
    "rare": lambda self, x: self.body(x) * (1 + (torch.rand(()) < 0.4)),
}


@pytest.mark.parametrize("name", RANDOM)
def test_a_random_forward_is_refused(name: str) -> None:
    model = scripted(RANDOM[name])
    state = torch.get_rng_state()
    with pytest.raises(NetworkError, match=r"answers the same input differently .* by up to [\d.]+ % .* draws random numbers .*F.dropout"):
        check_network(model, TASK)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random state has moved"


@pytest.mark.parametrize("buffer", [False, True])
def test_a_network_with_a_memory_is_refused_and_left_as_it_was(buffer: bool) -> None:
    model = Memory(buffer).eval()
    with pytest.raises(NetworkError, match="answers the same input differently .* keeps something from call to call"):
        check_network(model, TASK)
    assert not model.sum.any() and model.before is None


def test_dropout_that_is_off_and_random_numbers_without_effect_pass() -> None:
    model = scripted(lambda self, x: self.head(F.dropout(self.body(x), 0.3, self.training)) + 0 * torch.randn(5))
    assert check_network(model, TASK) == ()


def test_a_mask_of_infinity_passes_and_one_that_reaches_the_answer_is_named() -> None:
    model = scripted(lambda self, x: self.head((self.body(x) + self.mask).softmax(1)))
    model.register_buffer("mask", torch.tensor([0.0, 0.0, 0.0, 0.0, -torch.inf]))
    assert check_network(model, TASK) == ()
    model.mask.fill_(torch.nan)
    with pytest.raises(NetworkError, match="answers NaN or infinity .* these buffers hold NaN or infinity: mask"):
        check_network(model, TASK)


# ---------------------------------------------------------------- the batch


def test_clips_in_the_batch_axis_are_refused_with_both_tries() -> None:
    model = scripted(lambda self, x: self.body(x).view(len(x) // 4, 4, 5).mean(1).view(-1, 5) + 0 * self.body(x).view(-1, 4, 5)[:, 0])
    with pytest.raises(NetworkError, match=r"shape \(1, 3, 8, 8\).*\(2, 3, 8, 8\).*Batches of 1 and of 2 were tried.*independent.*clip"):
        check_network(model, TASK)


def test_a_batch_of_one_written_in_is_refused() -> None:
    model = scripted(lambda self, x: self.head(self.body(x).view(1, -1)))
    with pytest.raises(NetworkError, match=r"runs on an input of shape \(1, 3, 8, 8\), but fails on .*\(2, 3, 8, 8\): RuntimeError.*view"):
        check_network(model, TASK)


@pytest.mark.parametrize("run", [lambda self, x: self.body(x).mean(0, keepdim=True), lambda self, x: self.body(x).squeeze()])
def test_an_answer_without_a_batch_axis_is_refused(run: Callable[..., object]) -> None:
    with pytest.raises(NetworkError, match=r"answers one input with the shape .*5.* and two inputs with .*: no axis is the batch"):
        check_network(scripted(run), TASK)


def test_a_batch_in_the_second_axis_passes() -> None:
    assert check_network(scripted(lambda self, x: self.body(x)[None].expand(7, -1, -1)), TASK) == ()


def test_norms_of_the_batch_are_noted() -> None:
    model = scripted(lambda self, x: F.batch_norm(self.body(x).view(-1, 1, 5), None, None, training=True).view(-1, 5))
    (note,) = check_network(model, TASK)
    assert "depends on the other inputs of the batch" in note


def test_any_error_of_the_forward_is_reported_with_its_line() -> None:
    with pytest.raises(NetworkError, match=r"KeyError: 'absent' \(.*test_checks.py, line \d+, in <lambda>\)"):
        check_network(scripted(lambda self, x: {}["absent"]), TASK)


# ---------------------------------------------------------------- wrappers and what cannot be copied


class Inner(nn.Module):
    """A data-parallel backbone inside an ordinary network."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.DataParallel(body())

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.backbone(x))


@pytest.mark.parametrize(
    ("wrap", "note"),
    [
        (lambda model: nn.DataParallel(model), "DataParallel around the network is taken off"),
        (lambda model: torch.compile(model, backend="eager"), "torch.compile around the network is taken off"),
        (lambda model: torch.compile(nn.DataParallel(model), backend="eager"), "DataParallel around _orig_mod is taken off"),
    ],
)
def test_a_wrapper_is_taken_off(wrap: Callable[[nn.Module], nn.Module], note: str) -> None:
    model = body()
    target = datafree.Target(weight_bits=4, act_bits=8)
    result = datafree.quantize(wrap(model), TASK, method="rtn", target=target)
    plain = datafree.quantize(model, TASK, method="rtn", target=target)
    notes = result.run["notes"]
    assert isinstance(notes, list) and note in notes and result.run["weights_hash"] == plain.run["weights_hash"]
    assert list(result.plan.layers) == list(plain.plan.layers) == ["0", "5"]


def test_a_wrapper_inside_the_network_is_taken_off() -> None:
    result = datafree.quantize(Inner().eval(), TASK, method="rtn", target=datafree.Target(weight_bits=8, act_bits=8))
    assert list(result.plan.layers) == ["backbone.0", "backbone.5"]


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: torch.jit.trace(body(), torch.zeros(1, 3, 8, 8)), "TorchScript"),
        (lambda: torch.export.export(body(), (torch.zeros(2, 3, 8, 8),)).module(), "torch.export"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_networks_without_layers_are_refused(make: Callable[[], nn.Module], kind: str) -> None:
    with pytest.raises(NetworkError, match=f"the network is a {kind} module.*give the Python network"):
        datafree.quantize(make(), TASK)


def test_a_graph_of_fx_is_quantized() -> None:
    model = torch.fx.symbolic_trace(body())
    result = datafree.quantize(model, TASK, method="rtn", target=datafree.Target(weight_bits=8, act_bits=8))
    assert list(result.plan.layers) == ["0", "5"]


class Keeper:
    """Something of the user's own that holds what cannot be copied."""

    def __init__(self, value: object) -> None:
        self.value = value


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (threading.Lock(), r"0.kept \(a lock\)"),
        (Keeper([1, threading.Lock()]), r"0.kept.value\[1\] \(a lock\)"),
        ({"log": (each for each in "ab")}, r"0.kept\['log'\] \(a generator\)"),
    ],
)
def test_an_attribute_that_cannot_be_copied_is_named(value: object, told: str) -> None:
    model = body()
    model[0].kept = value
    with pytest.raises(NetworkError, match=f"because of its attribute {told}: .*Keep it outside the network, or set it to None"):
        datafree.quantize(model, TASK, method="rtn")


class WithExtraState(nn.Module):
    """Has state that is no tensor, a logger, and a result with its graph."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.seen, self.log = body(), 7, logging.getLogger("test")
        self.last = self.body[0].weight * 2

    def get_extra_state(self) -> dict[str, int]:
        return {"seen": self.seen}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.body(x))


def test_extra_state_loggers_and_results_are_carried_along() -> None:
    model = WithExtraState().eval()
    assert weights_hash(model) == weights_hash(WithExtraState().eval())
    result = datafree.quantize(model, TASK, method="rtn", target=datafree.Target(weight_bits=8, act_bits=8))
    assert result.student.seen == 7 and list(result.plan.layers) == ["body.0", "body.5"]
