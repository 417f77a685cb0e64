"""Networks as people bring them: at 8 bits the student is as good on realistic pixels as with ranges that were seen on such pixels."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import datafree
from datafree import Target, Task
from field import CLOSE, realistic_sqnr, reference_sqnr, trained

GOOD = 37.0  # dB: nobody needs more of eight bits
EIGHT = Target(weight_bits=8, act_bits=8)
USUAL = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def task(shape: tuple[int, ...] = (3, 32, 32), mean: tuple[float, ...] = (0.5,), std: tuple[float, ...] = (0.25,)) -> Task:
    return Task(shape=shape, mean=mean, std=std, classes=10)


def block(inputs: int, outputs: int, stride: int = 1, norm: bool = True) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=not norm), *([nn.BatchNorm2d(outputs)] if norm else []), nn.ReLU()]


def head(width: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]


def plain(norm: bool = True) -> nn.Module:
    return nn.Sequential(*block(3, 16, 2, norm), *block(16, 32, 2, norm), *block(32, 32, 1, norm), *head(32))


class Normalising(nn.Module):
    """Takes pixels in [0, 1] and normalises them itself, in place."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.register_buffer("mean", torch.tensor(USUAL["mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(USUAL["std"]).view(3, 1, 1))
        self.body = plain()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.sub_(self.mean).div_(self.std) if self.in_place else (x - self.mean) / self.std)


class SameConv(nn.Conv2d):
    """Pads in its forward so that strides give ceil(size / stride), more behind than before."""

    def forward(self, x: Tensor) -> Tensor:
        sides: list[int] = []
        for size, kernel, stride in zip(x.shape[2:], self.kernel_size, self.stride, strict=True):
            total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            sides = [total // 2, total - total // 2, *sides]
        return F.conv2d(F.pad(x, sides), self.weight, self.bias, self.stride, groups=self.groups)


def same_padded() -> nn.Module:
    return nn.Sequential(
        SameConv(3, 16, 3, 2, bias=False), nn.BatchNorm2d(16), nn.SiLU(), nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32), nn.SiLU(),
        SameConv(32, 32, 5, 2, groups=32, bias=False), nn.BatchNorm2d(32), nn.SiLU(), nn.Conv2d(32, 16, 1, bias=False), nn.BatchNorm2d(16),
        *head(16),
    )  # fmt: skip


def norm_last() -> nn.Module:
    """The norm stands behind the activation."""
    layers = [[nn.Conv2d(i, o, 3, s, 1, bias=False), nn.ReLU(), nn.BatchNorm2d(o)] for i, o, s in ((3, 16, 2), (16, 32, 1), (32, 32, 1))]
    return nn.Sequential(*(each for layer in layers for each in layer), *head(32))


class Keywords(nn.Module):
    """Layers called with keywords alone, the input not first among them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, padding="same", dilation=2), nn.Linear(16, 10)
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(input=F.relu(self.norm(input=self.a(input=x)))))
        return self.fc(input=x.mean((2, 3)))


class Functional(nn.Module):
    """Convolutions and products written by hand."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3) / math.sqrt(9 * inputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, padding=1)


def by_hand() -> nn.Module:
    return nn.Sequential(*block(3, 16, 2), Functional(16, 32), nn.BatchNorm2d(32), nn.ReLU(), Functional(32, 32), nn.ReLU(), *head(32))


class Reader(nn.Module):
    """Convolutions, a recurrent layer, an answer of (steps, batch, classes)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(*block(1, 16, 2), *block(16, 16, 2), nn.Conv2d(16, 16, (4, 1)), nn.ReLU())
        self.rnn, self.head = nn.LSTM(16, 8, bidirectional=True), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.rnn(self.features(x).squeeze(2).permute(2, 0, 1))
        return self.head(x)


def wave() -> nn.Module:
    norm = nn.utils.parametrizations.weight_norm
    return nn.Sequential(
        norm(nn.Conv1d(1, 16, 7, padding=3)), nn.LeakyReLU(0.1), norm(nn.Conv1d(16, 16, 3, padding=3, dilation=3)), nn.LeakyReLU(0.1),
        norm(nn.Conv1d(16, 32, 4, 4)), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Task]] = {
    "bytes": (plain, task(mean=(0.0,), std=(1 / 255,))),
    "bytes, no norm": (lambda: plain(False), task(mean=(0.0,), std=(1 / 255,))),
    "unit": (plain, task(mean=(0.0,), std=(1.0,))),
    "unit, no norm": (lambda: plain(False), task(mean=(0.0,), std=(1.0,))),
    "usual": (plain, task(**USUAL)),
    "tensorflow's": (plain, task(std=(0.5,))),
    "in place": (lambda: Normalising(True), task(mean=(0.0,), std=(1.0,))),
    "out of place": (lambda: Normalising(False), task(mean=(0.0,), std=(1.0,))),
    "same padding": (same_padded, task()),
    "norm behind the activation": (norm_last, task()),
    "keywords": (Keywords, task()),
    "by hand": (by_hand, task()),
    "reader": (Reader, task((1, 16, 40))),
    "wave": (wave, task((1, 256))),
    "features": (lambda: nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)), task((12,))),
    "half": (lambda: plain().half(), task()),
}


@pytest.mark.parametrize("method", ["rtn", "anchor"])
@pytest.mark.parametrize("name", NETWORKS)
def test_eight_bits_are_as_good_as_with_ranges_seen_on_realistic_pixels(name: str, method: str) -> None:
    build, found = NETWORKS[name]
    torch.manual_seed(0)
    model = build()
    dtype = next(model.parameters()).dtype
    full = trained(model.float(), found)
    student = datafree.quantize(trained(model, found).to(dtype), found, method=method, target=EIGHT).student
    reached, reference = realistic_sqnr(full.float(), student, found), reference_sqnr(full.float(), found, n=128)
    assert reached > min(GOOD, reference - CLOSE), f"{reached:.1f} dB, reference {reference:.1f} dB"


def test_a_network_that_changes_its_input_gives_the_student_of_one_that_does_not() -> None:
    found = NETWORKS["in place"][1]
    students = []
    for in_place in (True, False):
        torch.manual_seed(0)
        model = trained(Normalising(in_place), found)
        students.append(datafree.quantize(model, found, target=Target(weight_bits=4, act_bits=8)).student)
    x = found.noise(4, torch.Generator().manual_seed(1))
    assert torch.equal(found.run(students[0], x), found.run(students[1], x))


def test_the_tasks_input_is_never_changed() -> None:
    found = NETWORKS["in place"][1]
    model, x = trained(Normalising(True), found), found.noise(2, torch.Generator().manual_seed(1))
    before = x.clone()
    found.run(model, x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("method", ["rtn", "anchor", "dfmpc", "dfq", "squant", "zeroq"])
@pytest.mark.parametrize("name", ["bytes", "unit", "usual", "tensorflow's"])
def test_no_range_of_the_input_exceeds_black_and_white(name: str, method: str) -> None:
    build, found = NETWORKS[name]
    torch.manual_seed(0)
    model = trained(build(), found)
    chosen = datafree.methods()[method](**({"steps": 5, "pictures": 8} if method == "zeroq" else {}))
    student = datafree.quantize(model, found, method=chosen, target=EIGHT).student
    quantizer = student[0].input_quantizer
    low, high = (float(quantizer.scale * (level - quantizer.zero)) for level in quantizer.spec.levels)
    step = float(quantizer.scale)
    assert min(found.limits[0], 0) - step <= low and high <= max(found.limits[1], 0) + step
    assert high - low > 0.8 * (found.limits[1] - found.limits[0])


@pytest.mark.parametrize(
    ("given", "real", "hint"),
    [
        (task(mean=(0.0,), std=(1.0,)), task(mean=(0.0,), std=(1 / 255,)), "pixels 0..255"),
        (task(mean=(0.0,), std=(1 / 255,)), task(mean=(0.0,), std=(1.0,)), "pixels 0..1"),
        (task(mean=(0.0,), std=(1 / 255,)), task(**USUAL), "Check Task.mean and Task.std"),
    ],
)
def test_a_task_that_contradicts_the_network_is_told(given: Task, real: Task, hint: str) -> None:
    torch.manual_seed(0)
    model = trained(plain(), real)
    wrong, right = (datafree.quantize(model, each, method="rtn", target=EIGHT).run["notes"] for each in (given, real))
    (note,) = (each for each in wrong if "contradicts" in each)
    assert hint in note and "1" in note and not any("contradicts" in each for each in right)
