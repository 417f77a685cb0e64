"""Weights that do not depend on the input are computed once, and what comes to a layer becomes one: the function stays the same."""

import math
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from datafree import Ctx, Task
from datafree.graph.flow import read
from datafree.graph.plain import teacher_of
from datafree.graph.tape import tensors_in

TASK = Task(shape=(3, 12, 12), mean=(0.5,), std=(0.25,), classes=4)


def old_norm(norm: Callable[..., nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def make(layer: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return norm(layer)

    return make


class Standardised(nn.Conv2d):
    """Weight standardisation, as timm's StdConv2d has it."""

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding, self.dilation, self.groups)


class SamePadded(Standardised):
    """The same behind uneven zero padding of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(F.pad(x, (0, 1, 0, 1)), (1, 0)))


class Equalised(nn.Module):
    """A convolution with an equalised learning rate, its weight at hand by another name."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.gain, self.shift = nn.Parameter(torch.randn(8, 4, 3, 3)), 1 / 6, nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel * self.gain, bias=self.shift, padding=1, groups=2)


class Product(nn.Module):
    """A linear layer by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8) / math.sqrt(8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def net(middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), middle, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def standard(norm: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: net(norm(nn.Conv2d(8, 8, 3, padding=1)))


CASES: dict[str, Callable[[], nn.Module]] = {
    "weight norm": standard(parametrizations.weight_norm),
    "old weight norm": standard(old_norm(nn.utils.weight_norm)),
    "spectral norm": standard(parametrizations.spectral_norm),
    "old spectral norm": standard(old_norm(nn.utils.spectral_norm)),
    "orthogonal": standard(parametrizations.orthogonal),
    "transposed": lambda: net(parametrizations.weight_norm(nn.ConvTranspose2d(8, 8, 2, 2), dim=1)),
    "reflected": lambda: net(parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"))),
    "standardised": lambda: net(Standardised(8, 8, 3, padding=1)),
    "standardised and padded": lambda: net(SamePadded(8, 8, 3, bias=False)),
    "equalised": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), Equalised(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    ),
    "by hand": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Product(), nn.Linear(8, 4)
    ),
}


@pytest.mark.parametrize("used", [False, True], ids=["new", "used before"])
@pytest.mark.parametrize("name", CASES)
def test_every_weight_can_be_quantized_and_the_function_stays(name: str, used: bool) -> None:
    torch.manual_seed(0)
    model = CASES[name]().eval()
    x = TASK.noise(3, torch.Generator().manual_seed(1))
    if used:
        model(x)
    names = set(model.state_dict())
    teacher = teacher_of(model, TASK)
    found = read(teacher, TASK, Ctx.create())
    assert len(found.layers) == 3 and not found.floats
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    with torch.no_grad():
        torch.testing.assert_close(TASK.run(teacher, x), TASK.run(model, x), rtol=1e-4, atol=1e-5)
    assert set(model.state_dict()) == names


def test_a_plain_network_keeps_its_modules_and_shares_its_tensors() -> None:
    model = net(nn.Conv2d(8, 8, 3, padding="same")).eval()
    teacher = teacher_of(model, TASK)
    assert [type(each) for each in teacher.modules()] == [type(each) for each in model.modules()]
    assert all(one.data_ptr() == other.data_ptr() for one, other in zip(model.parameters(), teacher.parameters(), strict=True))


class Dynamic(nn.Module):
    """A convolution whose weight depends on the input: nothing to compute once."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * x.mean())


class Adapted(nn.Module):
    """Two products added up: not one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.a, self.b = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + F.linear(F.linear(x, self.a), self.b)


class Reflected(nn.Module):
    """Padding that is not of zeros stands before a product by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), self.weight)


@pytest.mark.parametrize("middle", [Dynamic, Reflected])
def test_what_is_no_plain_layer_stays_as_it_is(middle: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = net(middle()).eval()
    teacher = teacher_of(model, TASK)
    assert isinstance(teacher[2], middle)
    x = TASK.noise(2, torch.Generator().manual_seed(1))
    assert all(torch.equal(one, other) for one, other in zip(tensors_in(model(x)), tensors_in(teacher(x)), strict=True))


def test_several_products_stay_and_are_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Adapted(), nn.Linear(8, 4)).eval()
    assert isinstance(teacher_of(model, TASK)[3], Adapted)
