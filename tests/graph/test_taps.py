"""Anchored batch norms: the batch's statistics, the stored affine, nothing left behind. What modules take and give. Channels last."""

import copy

import pytest
import torch
from torch import Tensor, nn

import datafree
from datafree.errors import NetworkError
from datafree.graph.taps import anchored, anchored_alike, batch_moments, calls, channels_last, entering, outputs
from datafree.plan import Plan, QSpec, Target
from datafree.quant.insert import insert
from datafree.quant.observe import observe
from datafree.task import Task
from networks import NAMES, Scripted, build

NORMED = tuple(name for name in NAMES if name not in ("without_norm", "transformer"))


def noise(n: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NORMED)
def test_outputs_have_the_mean_and_variance_of_the_affine(name: str) -> None:
    model, task = build(name)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    seen = []
    for norm in norms:
        norm.register_forward_hook(lambda module, args, result: seen.append((module, result.clone())))
    x = noise(64, task.shape)
    with torch.no_grad():
        plain = model(x)
        seen.clear()
        with anchored(model):
            model(x)
        assert {id(norm) for norm, _ in seen} == {id(norm) for norm in norms}
        for norm, out in seen:
            channels = out.transpose(0, 1).flatten(1).double()
            torch.testing.assert_close(channels.mean(1), norm.bias.double(), atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(channels.var(1, correction=0), norm.weight.square().double(), atol=1e-3, rtol=2e-2)
        assert torch.equal(model(x), plain)


def test_state_is_left_bit_for_bit_even_by_infinite_batches_and_errors() -> None:
    model, task = build("resnet_basic")
    model.bn1.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [(module.training, getattr(module, "track_running_stats", None)) for module in model.modules()]
    with torch.no_grad(), anchored(model):
        model(noise(4, task.shape))
        model(torch.full((4, *task.shape), torch.inf))
    with pytest.raises(KeyError), anchored(model):
        raise KeyError
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert [(module.training, getattr(module, "track_running_stats", None)) for module in model.modules()] == modes


def test_norms_without_statistics_stay_as_they_are() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False), nn.InstanceNorm2d(4, track_running_stats=True)
    ).eval()
    with anchored(model):
        assert not any(module.training for module in model.modules())


class Viewing(nn.Module):
    """Its view wants the channels of the convolution's output first in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.fc(torch.relu(self.norm(self.conv(x))).view(len(x), -1))
        return answer


def test_channels_come_last_only_where_the_network_allows_it() -> None:
    pictures = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    flat = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    laid_out = channels_last(flat, pictures)
    assert torch.equal(laid_out, pictures) and laid_out.is_contiguous(memory_format=torch.channels_last)
    assert flat[0](laid_out).is_contiguous(memory_format=torch.channels_last)
    assert channels_last(Viewing().eval(), pictures) is pictures
    assert channels_last(flat, pictures[0]).dim() == 3


def test_a_network_that_views_is_quantized() -> None:
    model = Viewing().eval()
    student = datafree.quantize(model, Task(shape=(3, 8, 8)), method="anchor", target=Target(4, 8)).student
    assert torch.isfinite(student(torch.zeros(2, 3, 8, 8))).all()


def test_outputs_of_every_call_are_seen_while_it_lasts() -> None:
    model, task = build("twice")
    x = noise(2, task.shape)
    with outputs(model, "bn") as seen, outputs(model, None) as nothing:
        model(x)
    model(x)
    assert len(seen) == 2 and nothing == [] and not any(each._forward_hooks for each in model.modules())
    with torch.no_grad():
        torch.testing.assert_close(seen[0], model.bn(model.conv(torch.relu(model.stem_bn(model.stem(x))))))


def test_calls_stand_in_the_order_in_which_they_end() -> None:
    model, task = build("twice")
    found = calls(model, noise(2, task.shape))
    names = "stem stem_bn conv bn conv bn left shared right shared fc".split()
    assert [name for name, _, _ in found] == [*names, ""]
    assert all(module is model.get_submodule(name) for name, module, _ in found)
    assert found[0][2] == (2, 8, 8, 8) and found[-1][2] == (2, 5)
    assert not any(each._forward_hooks for each in model.modules())


def test_what_enters_a_module_is_recorded_before_it_is_quantized_and_as_it_was() -> None:
    model, task = build("resnet_basic")
    student = insert(model, Plan({}, {"layers.0:input": QSpec(2, symmetric=False)}))
    batches = noise(6, task.shape).split(4)
    observe(student, batches, "minmax", task.run)
    found = [entering(each, "layers.0", batches, task.run) for each in (model, student)]
    with torch.no_grad():
        expected = model.maxpool(model.relu(model.bn1(model.conv1(torch.cat(batches)))))
    for each in found:
        assert torch.equal(each.inputs, expected) and each.others == () and each.named == {}


def test_other_arguments_are_kept() -> None:
    conv = Scripted(lambda self, x: x)
    conv.forward = lambda x, factor, shift: x * factor + shift  # type: ignore[method-assign]
    model = Scripted(lambda self, x: self.part(x, 2, shift=1), part=conv)
    found = entering(model, "part", [torch.ones(2, 3)], lambda model, x: model(x))
    assert found.others == (2,) and found.named == {"shift": 1}


def test_a_module_that_was_not_called_or_got_no_tensor_is_told() -> None:
    model = Scripted(lambda self, x: self.part([x]), part=nn.Identity(), idle=nn.Identity())
    for name, told in (("idle", "idle was not called"), ("part", "part was not handed a tensor")):
        with pytest.raises(NetworkError, match=told):
            entering(model, name, [torch.ones(1)], lambda model, x: model(x))


def test_both_networks_norms_are_helped_alike() -> None:
    teacher, x = small(), torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(3)) * 3 + 1
    student = copy.deepcopy(teacher)
    norm, own = teacher[1], student[1]
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
    assert isinstance(own, nn.BatchNorm2d) and own.running_mean is not None and own.running_var is not None
    with torch.no_grad():
        student[0].bias += 0.5  # type: ignore[operator, union-attr]
        own.running_mean += 0.3
        own.running_var *= 1.7
    before = copy.deepcopy(student)
    with torch.no_grad(), anchored_alike(teacher, student):
        told, said = teacher(x), student(x)

    entering, entering_own = teacher[0](x).double(), student[0](x).double()
    variance, mean = torch.var_mean(entering, (0, 2, 3), correction=0)
    scale = ((norm.running_var + norm.eps) / (variance + norm.eps)).sqrt().view(-1, 1, 1)
    moved = [(each - mean.view(-1, 1, 1)) * scale + norm.running_mean.view(-1, 1, 1) for each in (entering, entering_own)]
    torch.testing.assert_close(told.double(), copy.deepcopy(teacher[1:]).double()(moved[0]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(said.double(), copy.deepcopy(student[1:]).double()(moved[1]), atol=1e-4, rtol=1e-4)
    for key, value in student.state_dict().items():
        assert torch.equal(value, before.state_dict()[key]), "afterwards it knows what it knew"


@pytest.mark.parametrize("sizes", [(), (7,), (4, 6)])
def test_moments_of_a_batch(sizes: tuple[int, ...]) -> None:
    x = torch.randn(32, 5, *sizes, generator=torch.Generator().manual_seed(3)) + 10
    expected = torch.var_mean(x.double(), (0, *range(2, x.dim())), correction=0)
    for got, wanted in zip(batch_moments(x), reversed(expected), strict=True):
        torch.testing.assert_close(got.double(), wanted, atol=1e-5, rtol=1e-5)


def test_a_norm_called_twice_is_helped_each_time() -> None:
    teacher = small()
    twice = nn.Sequential(teacher[0], teacher[1], teacher[1]).eval()
    with torch.no_grad(), anchored_alike(twice, copy.deepcopy(twice)) as _:
        x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(3))
        told = twice(x)
    with torch.no_grad(), anchored_alike(twice, student := copy.deepcopy(twice)):
        twice(x)
        torch.testing.assert_close(student(x), told)


def small() -> nn.Sequential:
    """A conv and a norm that knows something."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return model.eval()
