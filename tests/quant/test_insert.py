"""Quantizers in real modules: plans come back, names are checked, ranges are observed, the teacher is left alone."""

import copy
from collections import namedtuple

import pytest
import torch
from torch import Tensor, nn

from datafree.errors import NetworkError, TargetError
from datafree.plan import LayerPlan, Plan, QSpec
from datafree.quant import observe as observe_module
from datafree.quant.grid import fake_quantize
from datafree.quant.insert import (
    assign,
    codes_of,
    find_module,
    insert,
    latent_weight,
    plan_of,
    quantized_layers,
    quantizers,
    weight_quantizer,
)
from datafree.quant.observe import observe
from datafree.quant.ranges import from_range, minmax, mse, optimal_ternary

W4, A8 = QSpec(4, axis=0), QSpec(8, symmetric=False)
Pair = namedtuple("Pair", ["first", "second"])


class Net(nn.Module):
    """A residual block with a module called twice, a transposed conv and a norm without batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.ReLU())
        self.up = nn.ConvTranspose2d(4, 6, 2, groups=2)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv(x)))
        x = self.relu(x + self.body(x))
        return torch.as_tensor(self.head(self.norm(self.up(x).mean((2, 3)))))


class Returns(nn.Module):
    """Gives back whatever it was made with."""

    def __init__(self, make: str) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> object:
        return {"tuple": ("note", x, x), "named": Pair(x, x), "dict": {"x": x}}[self.make]


class Holder(nn.Module):
    """A parent that is no container."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> object:
        return self.inner(x)


PLAN = Plan(
    {
        "conv": LayerPlan(QSpec(8, axis=0), A8),
        "body.0": LayerPlan(QSpec(2, axis=0, grid="ternary"), A8),
        "up": LayerPlan(QSpec(3, symmetric=False, axis=1)),
        "head": LayerPlan(QSpec(4, grid="dorefa"), QSpec(8)),
    },
    {"relu:output": A8, "norm:output": QSpec(6, axis=1), "body.1:input": A8},
)


@pytest.fixture
def teacher() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def inputs(n: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(n, 2, 5, 5, generator=torch.Generator().manual_seed(seed))


def weight(layer: nn.Module) -> Tensor:
    value = layer.weight
    assert isinstance(value, Tensor)
    return value


def call(model: nn.Module, batch: Tensor) -> object:
    return model(batch)


def ready(teacher: nn.Module, plan: Plan = PLAN) -> nn.Module:
    student = insert(teacher, plan)
    observe(student, [inputs()], "minmax", call)
    return student


def test_the_plan_comes_back(teacher: nn.Module) -> None:
    student = insert(teacher, PLAN)
    found = plan_of(student)
    assert found == PLAN and list(found.layers) == ["conv", "body.0", "up", "head"]
    assert Plan.from_json(found.to_json()) == PLAN
    assert plan_of(teacher) == Plan()
    assert set(quantizers(student)) == {"conv:input", "body.0:input", "head:input", "relu:output", "norm:output", "body.1:input"}
    assert list(quantized_layers(student)) == list(PLAN.layers)


def test_the_teacher_is_left_alone(teacher: nn.Module) -> None:
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = insert(teacher, PLAN)
    for layer in quantized_layers(student).values():
        latent_weight(layer).data.zero_()
    assert type(teacher.conv) is nn.Conv2d and not quantizers(teacher)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_layers_stay_what_they_were(teacher: nn.Module) -> None:
    conv = find_module(insert(teacher, PLAN), "conv")
    assert isinstance(conv, nn.Conv2d) and isinstance(conv.weight, Tensor)
    scale, zero = minmax(weight(teacher.get_submodule("conv")), QSpec(8, axis=0))
    assert torch.equal(conv.weight, fake_quantize(latent_weight(conv), scale, zero, QSpec(8, axis=0)))
    assert (conv.weight - latent_weight(conv)).abs().max() > 0


@pytest.mark.parametrize("mode", [True, False])
def test_mode_and_hooks_are_kept(teacher: nn.Module, mode: bool) -> None:
    teacher.train(mode)
    teacher.get_submodule("bn").eval()
    calls: list[str] = []
    teacher.get_submodule("conv").register_forward_hook(lambda module, args, result: calls.append("seen"))
    student = insert(teacher, PLAN)
    assert not student.get_submodule("bn").training
    assert {m.training for name, m in student.named_modules() if not name.startswith("bn")} == {mode}
    student(inputs())
    assert calls == ["seen"]


def test_no_second_copy_of_the_weights(teacher: nn.Module) -> None:
    student = insert(teacher, Plan({name: LayerPlan(W4) for name in ("conv", "body.0", "head")}))
    stored = sum(value.numel() for value in student.state_dict().values())
    scales = sum(2 * weight_quantizer(layer).scale.numel() for layer in quantized_layers(student).values())
    assert stored == sum(value.numel() for value in teacher.state_dict().values()) + scales
    assert sum(p.numel() for p in student.parameters()) == sum(p.numel() for p in teacher.parameters())


def test_activations_are_quantized_where_the_plan_says(teacher: nn.Module) -> None:
    student = ready(teacher)
    seen: dict[str, Tensor] = {}
    student.get_submodule("conv").register_forward_pre_hook(lambda module, args: seen.update(conv=args[0]))
    student.get_submodule("norm").register_forward_hook(lambda module, args, result: seen.update(norm=result))
    student(inputs(seed=1))
    for name, point in (("conv", "conv:input"), ("norm", "norm:output")):
        assert torch.equal(quantizers(student)[point](seen[name]), seen[name])
        assert len(set(seen[name].flatten().tolist())) > 2


def test_without_ranges_the_output_is_nan(teacher: nn.Module) -> None:
    assert insert(teacher, PLAN)(inputs()).isnan().all()


def test_copies_and_state_dicts_are_exact(teacher: nn.Module) -> None:
    student = ready(teacher)
    expected = student(inputs(seed=2))
    fresh = insert(teacher, PLAN)
    fresh.load_state_dict(student.state_dict())
    copied = copy.deepcopy(student)
    for layer in quantized_layers(student).values():
        latent_weight(layer).data.zero_()
    for quantizer in quantizers(student).values():
        quantizer.set(torch.full_like(quantizer.scale, 9.0), torch.zeros_like(quantizer.zero))
    assert torch.equal(fresh(inputs(seed=2)), expected) and torch.equal(copied(inputs(seed=2)), expected)
    assert not torch.equal(student(inputs(seed=2)), expected)


def test_latent_weights_train(teacher: nn.Module) -> None:
    student = ready(teacher)
    student(inputs()).square().sum().backward()
    for layer in quantized_layers(student).values():
        gradient = latent_weight(layer).grad
        assert gradient is not None and gradient.abs().sum() > 0


def test_assign_gives_exactly_those_values(teacher: nn.Module) -> None:
    student = ready(teacher)
    body, up, head = (find_module(student, name) for name in ("body.0", "up", "head"))
    codes, scale = optimal_ternary(latent_weight(body))
    assign(body, codes, scale)
    assert torch.equal(codes_of(body), codes) and torch.equal(weight(body), codes * scale.reshape(-1, 1, 1, 1))
    assert torch.equal(latent_weight(body), weight(body))
    codes = torch.randint(0, 8, weight(up).shape, generator=torch.Generator().manual_seed(3))
    scale, zero = torch.tensor([0.1, 0.013, 7.0]), torch.tensor([0.0, 3.0, 7.0])
    assign(up, codes, scale, zero)
    assert torch.equal(codes_of(up), codes.to(torch.int16))
    assert torch.equal(weight(up), scale.reshape(1, 3, 1, 1) * (codes - zero.reshape(1, 3, 1, 1)))
    assign(head, torch.full((3, 6), 15.0), torch.tensor(2.0))
    assert weight(head).eq(15.0).all()


@pytest.mark.parametrize(
    ("codes", "scale", "message"),
    [
        (torch.zeros(4, 1, 3), torch.ones(4), r"codes have shape \(4, 1, 3\)"),
        (torch.full((4, 1, 3, 3), 2), torch.ones(4), "a code is 2, expected integers from -1 to 1"),
        (torch.full((4, 1, 3, 3), 0.5), torch.ones(4), "a code is 0.5"),
        (torch.full((4, 1, 3, 3), float("nan")), torch.ones(4), "a code is nan"),
        (torch.zeros(4, 1, 3, 3), torch.zeros(4), "a scale is 0.0"),
    ],
)
def test_assign_refuses_and_changes_nothing(teacher: nn.Module, codes: Tensor, scale: Tensor, message: str) -> None:
    body = find_module(insert(teacher, PLAN), "body.0")
    before = weight(body).clone()
    with pytest.raises(NetworkError, match=message):
        assign(body, codes, scale)
    assert torch.equal(weight(body), before)


def test_only_quantized_layers_have_codes(teacher: nn.Module) -> None:
    for act in (weight_quantizer, latent_weight, codes_of):
        with pytest.raises(NetworkError, match="is not quantized"):
            act(teacher.get_submodule("conv"))


@pytest.mark.parametrize(
    ("plan", "error", "message"),
    [
        (Plan({"covn": LayerPlan(W4)}), TargetError, "no module 'covn': did you mean conv"),
        (Plan({"zzz": LayerPlan(W4)}), TargetError, "it has conv, bn"),
        (Plan({}, {"relu:ouput": A8}), TargetError, "is no point"),
        (Plan({}, {"relu": A8}), TargetError, "is no point"),
        (Plan({}, {"rely:output": A8}), TargetError, "did you mean relu"),
        (Plan({"relu": LayerPlan(W4)}), NetworkError, "relu is a ReLU"),
        (Plan({"conv": LayerPlan(QSpec(4, axis=4))}), NetworkError, "has no axis 4"),
        (Plan({}, {"body:output": A8}), NetworkError, "body is a Sequential"),
        (Plan({"conv": LayerPlan(W4, A8)}, {"conv:input": A8}), TargetError, "conv:input twice"),
    ],
)
def test_plans_that_do_not_fit(teacher: nn.Module, plan: Plan, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        insert(teacher, plan)


def test_networks_that_cannot_take_a_quantizer() -> None:
    plan = Plan({"inner": LayerPlan(W4)})
    student = insert(Holder(nn.Linear(2, 2)), plan)
    with pytest.raises(NetworkError, match="quantized already"):
        insert(student, plan)
    with pytest.raises(NetworkError, match="parametrized already"):
        insert(Holder(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))), plan)
    with pytest.raises(NetworkError, match="the network is a Sequential"):
        insert(nn.Sequential(nn.ReLU()), Plan({}, {":output": A8}))
    pointed = insert(Holder(nn.ReLU()), Plan({}, {"inner:input": A8}))
    with pytest.raises(NetworkError, match="inner:input is quantized already"):
        insert(pointed, Plan({}, {"inner:input": A8}))


def test_a_shared_module_is_one_layer_and_a_shared_weight_is_two() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)
            self.b = self.a
            self.c = nn.Linear(3, 3)
            self.emb = nn.Embedding(3, 3)
            self.c.weight = self.emb.weight

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.c(self.b(self.a(x)))) + self.emb.weight.sum()

    torch.manual_seed(1)
    teacher = Shared().eval()
    student = insert(teacher, Plan({"b": LayerPlan(W4), "c": LayerPlan(W4)}))
    assert list(plan_of(student).layers) == ["a", "c"]
    with pytest.raises(NetworkError, match="quantized already"):
        insert(teacher, Plan({"a": LayerPlan(W4), "b": LayerPlan(W4)}))
    layer = find_module(student, "c")
    assign(layer, torch.zeros(3, 3), torch.ones(3))
    assert not weight(layer).any() and torch.equal(weight(find_module(student, "emb")), teacher.emb.weight)


def test_tuples_of_outputs() -> None:
    x = torch.tensor([0.3, 1.0])
    spec = {"inner:output": QSpec(2)}
    student = insert(Holder(Returns("tuple")), Plan({}, spec))
    quantizers(student)["inner:output"].set(torch.tensor(1.0))
    note, first, second = student(x)
    assert note == "note" and first.tolist() == [0, 1] and torch.equal(second, x)
    named = insert(Holder(Returns("named")), Plan({}, spec))
    quantizers(named)["inner:output"].set(torch.tensor(1.0))
    result = named(x)
    assert isinstance(result, Pair) and result.first.tolist() == [0, 1]
    with pytest.raises(NetworkError, match="returned a dict"):
        insert(Holder(Returns("dict")), Plan({}, spec))(x)


def test_an_input_may_be_a_keyword() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.inner(input=x))

    student, x = insert(Keyword(), Plan({}, {"inner:input": A8})), torch.tensor([[0.4, 2.6]])
    quantizers(student)["inner:input"].set(torch.tensor(1.0), torch.tensor(0.0))
    assert torch.equal(student(x), student.inner(torch.tensor([[0.0, 3.0]])))


def test_observe_takes_the_extremes_of_all_calls(teacher: nn.Module) -> None:
    student = insert(teacher, PLAN)
    plain = insert(teacher, Plan({name: LayerPlan(layer.weight) for name, layer in PLAN.layers.items()}))
    seen: list[Tensor] = []
    plain.get_submodule("relu").register_forward_hook(lambda module, args, result: seen.append(result.detach()))
    batches = [inputs(seed=5), inputs(2, seed=6)]
    for batch in batches:
        plain(batch)
    observe(student, iter(batches), "minmax", call)
    every = torch.cat([each.flatten() for each in seen])
    scale, zero = minmax(every, A8)
    found = quantizers(student)["relu:output"]
    assert len(seen) == 4 and torch.equal(found.scale, scale) and torch.equal(found.zero, zero) and found.zero == 0
    assert quantizers(student)["norm:output"].scale.shape == (6,)
    assert not student(inputs()).isnan().any()
    assert student(inputs()).requires_grad
    assert all(not quantizer._forward_hooks for quantizer in quantizers(student).values())


def test_observe_by_mse_equals_mse_of_what_was_seen() -> None:
    point = Plan({}, {"inner:output": QSpec(3, symmetric=False), "inner:input": QSpec(3, axis=1)})
    student = insert(Holder(nn.Identity()), point)
    batches = [torch.randn(50, 3, 4, generator=torch.Generator().manual_seed(seed)) ** 3 * seed for seed in (1, 2)]
    observe(student, batches, "mse", call)
    every = torch.cat(batches)
    ends = torch.stack([every.min(), every.max()])
    scale, zero = mse(torch.cat([every.flatten(), ends]), QSpec(3, symmetric=False))
    found = quantizers(student)["inner:output"]
    assert torch.allclose(found.scale, scale) and torch.equal(found.zero, zero)
    rows = every.transpose(0, 1).flatten(1)
    ends = torch.stack([rows.amin(1), rows.amax(1)], 1)
    assert torch.allclose(quantizers(student)["inner:input"].scale, mse(torch.cat([rows, ends], 1), QSpec(3, axis=0))[0])


def test_a_large_sample_is_thinned_evenly_and_keeps_its_extremes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe_module, "_SAMPLE", 2000)
    seen = observe_module._Seen(QSpec(4, symmetric=False), keep=True)
    batches = [torch.arange(3000.0).remainder(8) + 8 * k for k in range(5)]
    batches[2][17] = 1e6
    for batch in batches:
        seen.watch(nn.Identity(), (batch,), batch)
    assert seen.sample is not None and 1000 < seen.sample.numel() <= 2000
    kept = seen.sample.flatten().long()
    counts = torch.bincount(kept[kept < 40], minlength=40)
    assert counts.min() > 0.7 * counts.float().mean() and counts.max() < 1.3 * counts.float().mean()
    widest = from_range(torch.tensor(0.0), torch.tensor(1e6), QSpec(4, symmetric=False))
    assert torch.equal(seen.range("minmax", 1.0)[0], widest[0])


def test_observe_names_points_that_saw_nothing(teacher: nn.Module) -> None:
    student = insert(teacher, PLAN)
    with pytest.raises(NetworkError, match="conv:input"):
        observe(student, [], "minmax", call)
    with pytest.raises(NetworkError, match="no value passed relu:output, body.0:input, .* head:input: give"):
        observe(student, [inputs()], "mse", lambda model, batch: model.get_submodule("conv")(batch))
    assert not any(quantizer.ready for quantizer in quantizers(student).values())
    observe(teacher, [], "minmax", call)


def test_a_failing_run_leaves_no_hooks(teacher: nn.Module) -> None:
    student = insert(teacher, PLAN)
    with pytest.raises(RuntimeError):
        observe(student, [torch.ones(1, 3, 5, 5)], "minmax", call)
    assert all(not quantizer._forward_hooks for quantizer in quantizers(student).values())


def test_networks_without_batch_norm() -> None:
    torch.manual_seed(3)
    teacher = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 2)).eval()
    plan = Plan({"0": LayerPlan(W4, A8), "3": LayerPlan(W4, A8)})
    student = insert(teacher, plan)
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(4))
    observe(student, [x], "mse", call)
    error = (student(x) - teacher(x)).square().mean() / teacher(x).square().mean()
    assert 0 < error < 0.1
