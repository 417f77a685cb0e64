"""quantize, save, load and evaluate as a user calls them: what they promise, and what they refuse."""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import datafree
from datafree import Event, Method, Result, Target, Task
from datafree.errors import DataError, MethodError, NetworkError, OutputError, TargetError, WeightsError
from datafree.method import find_method
from datafree.quant.insert import plan_of
from datafree.result import strict_json
from networks import build

FILES = ["plan.json", "run.json", "student.safetensors"]


def small() -> tuple[nn.Module, Task]:
    return build("cifar_resnet")


@pytest.fixture(scope="module")
def result() -> Result:
    """One student, for tests that only look at it."""
    return datafree.quantize(*small())


def inputs(task: Task, n: int = 8) -> Tensor:
    return task.noise(n, torch.Generator().manual_seed(5))


def strictly(path: Path) -> dict[str, object]:
    found = json.loads(path.read_text(), parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    assert isinstance(found, dict)
    return found


# ---------------------------------------------------------------- quantize


def test_what_quantize_gives(result: Result) -> None:
    model, task = small()
    assert not result.student.training and not any(each.requires_grad for each in result.student.parameters())
    assert type(result.student) is type(model) and result.student(inputs(task)).shape == (8, 5)
    assert plan_of(result.student) == result.plan and len(result.plan.layers) == 8
    assert set(result.run) == {
        "versions", "weights_hash", "seed", "task", "device", "processes", "method", "fields", "target", "protocol", "data", "seconds",
        "peak_memory_bytes", "float_bytes", "packed_bytes", "coverage", "fidelity", "notes",
    }  # fmt: skip
    assert (result.run["method"], result.run["protocol"], result.run["data"], result.run["device"]) == ("anchor", "deploy", "none", "cpu")
    packed, full = result.run["packed_bytes"], result.run["float_bytes"]
    assert isinstance(packed, int) and isinstance(full, int) and 0 < packed < full


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_the_model_comes_back_as_it_went_in() -> None:
    """In train mode, with hooks and gradients: all as before, and the same tensors."""
    model, task = small()
    model.train()
    model.bn1.eval()
    calls: list[str] = []
    model.conv1.register_forward_hook(lambda *args: calls.append("conv1"))
    model.linear.weight.requires_grad_(False)
    model.conv1.weight.grad = torch.ones_like(model.conv1.weight)
    before, modes = state(model), [module.training for module in model.modules()]
    tensors = [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
    needs = [parameter.requires_grad for parameter in model.parameters()]
    hooks = [(len(each._forward_hooks), len(each._forward_pre_hooks), len(each._backward_hooks)) for each in model.modules()]

    student = datafree.quantize(model, task, target=Target(4, 8)).student

    assert modes == [module.training for module in model.modules()]
    assert tensors == [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
    assert needs == [parameter.requires_grad for parameter in model.parameters()]
    assert hooks == [(len(each._forward_hooks), len(each._forward_pre_hooks), len(each._backward_hooks)) for each in model.modules()]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(model.conv1.weight.grad, torch.ones_like(model.conv1.weight))
    own = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()) if tensor.numel() > 1}
    quantized = [module for module in student.modules() if hasattr(module, "parametrizations")]
    assert quantized and own.isdisjoint(module.parametrizations.weight.original.data_ptr() for module in quantized)


def test_train_mode_gives_the_student_of_eval_mode(result: Result) -> None:
    model, task = small()
    trained = datafree.quantize(model.train(), task).student
    assert torch.equal(trained(inputs(task)), result.student(inputs(task)))


def test_the_same_seed_gives_the_same_student() -> None:
    model, task = small()
    first, again, other = (state(datafree.quantize(model, task, target=Target(4, 4), seed=seed).student) for seed in (1, 1, 2))
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first), "its pictures are drawn anew"


def test_a_method_by_name_is_the_method_with_its_defaults(result: Result) -> None:
    model, task = small()
    by_hand = datafree.quantize(model, task, method=datafree.methods()["anchor"]())
    assert torch.equal(by_hand.student(inputs(task)), result.student(inputs(task)))
    assert by_hand.run["fields"] == result.run["fields"]


def test_a_field_of_ones_own_is_recorded() -> None:
    found = datafree.quantize(*small(), method=datafree.methods()["rtn"](weight_range="minmax"))
    assert isinstance(found.run["fields"], dict) and found.run["fields"]["weight_range"] == "minmax"


def test_events_arrive_and_notes_are_kept() -> None:
    heard: list[Event] = []
    model, task = build("branching")
    found = datafree.quantize(model, task, on_event=heard.append)
    assert [each.message for each in heard if each.name == "note"] == found.run["notes"] != []
    steps = [(each.step, each.total) for each in heard if each.name == "compensate"]
    assert steps == [(step, len(found.plan.layers)) for step in range(1, len(steps) + 1)]


def test_a_budget_that_suffices() -> None:
    found = datafree.quantize(*small(), target=Target(max_bytes=100_000))
    assert isinstance(found.run["packed_bytes"], int) and found.run["packed_bytes"] <= 100_000


def method(name: str, **values: object) -> Callable[[], Method]:
    return lambda: find_method(name)(**values)


REFUSED: tuple[tuple[str, dict[str, object], type[Exception], str], ...] = (
    ("budget", {"target": Target(max_bytes=100)}, TargetError, r"the student takes \d{4} bytes, more than max_bytes = 100: choose fewer"),
    ("layer", {"target": Target(keep=("conv9",))}, TargetError, r"no layer 'conv9' to quantize; did you mean conv1"),
    ("method", {"method": "best"}, MethodError, r"unknown method 'best': choose from .*dfmpc.*rtn"),
    ("class", {"method": find_method("rtn")}, MethodError, r"method must be a name or a Method, not <class .*datafree.methods\(\) lists"),
    ("field", {"method": find_method("dfmpc")(rho=2.0)}, MethodError, r"dfmpc: rho cannot be 2.0: expected a finite number, 0 to 1"),
    ("choice", {"method": find_method("rtn")(act_range="most")}, MethodError, r"rtn: act_range cannot be 'most': choose from mse, minmax"),
    ("seed", {"seed": -1}, TargetError, r"seed cannot be -1"),
    ("device", {"device": "toaster"}, TargetError, r"device 'toaster' cannot be used here"),
)


@pytest.mark.parametrize(("options", "error", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_options_that_are_refused(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        datafree.quantize(*small(), **options)  # type: ignore[arg-type]


def broken(change: Callable[[nn.Module], object]) -> nn.Module:
    model, _ = small()
    with torch.no_grad():
        change(model)
    return model


NETWORKS: tuple[tuple[str, Callable[[], object], Task, str], ...] = (
    ("no module", lambda: "resnet20", Task(), r"must be a torch.nn.Module, not a str"),
    ("no parameters", lambda: nn.ReLU(), Task(), r"ReLU has no parameters: there is nothing to quantize"),
    ("no layers", lambda: nn.BatchNorm2d(3).eval(), Task(shape=(3, 8, 8)), r"no convolution or linear layer that can be quantized"),
    ("channels", lambda: small()[0], Task(shape=(1, 16, 16)), r"fails on an input of shape \(1, 1, 16, 16\).*is the task's shape right"),
    ("dimensions", lambda: small()[0], Task(shape=(3, 16)), r"fails on an input of shape \(1, 3, 16\)"),
    ("classes", lambda: small()[0], Task(shape=(3, 16, 16), classes=7), r"answers with 5 classes, the task names 7"),
    ("part", lambda: small()[0], Task(shape=(3, 16, 16), output=0), r"Task.output is 0, but the network returned a Tensor"),
    ("nan", lambda: broken(lambda m: m.linear.weight[0].fill_(math.nan)), small()[1], r"linear.weight \(5, 16\) holds NaN .* \(16 of 80"),
    ("infinity", lambda: broken(lambda m: m.bn1.running_mean.fill_(math.inf)), small()[1], r"bn1.running_mean \(8,\) holds NaN or inf"),
    ("variance", lambda: broken(lambda m: m.bn1.running_var[0].fill_(-1)), small()[1], r"bn1.running_var has 1 negative variances"),
)


@pytest.mark.parametrize(("make", "task", "message"), [case[1:] for case in NETWORKS], ids=[case[0] for case in NETWORKS])
def test_networks_that_are_refused(make: Callable[[], nn.Module], task: Task, message: str) -> None:
    with pytest.raises(NetworkError, match=message):
        datafree.quantize(make(), task)


# ---------------------------------------------------------------- channels that do nothing


def dead(weight: float | None = None, gamma: float | None = None, beta: float | None = None, var: float | None = None) -> nn.Module:
    """The network with one channel of a low layer, and of its batch norm, set to these values."""

    def change(model: nn.Module) -> None:
        conv, norm = model.layer1[0].conv1, model.layer1[0].bn1
        for tensor, value in ((conv.weight, weight), (norm.weight, gamma), (norm.bias, beta), (norm.running_var, var)):
            if value is not None:
                tensor[2] = value

    return broken(change)


@pytest.mark.parametrize("target", [Target((2, 6), protocol="dfmpc"), Target(4, 4)], ids=["W2/6", "W4A4"])
@pytest.mark.parametrize("chosen", [method("rtn"), method("dfmpc"), method("dfmpc", mode="faithful")], ids=["rtn", "plus", "faithful"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: dead(gamma=0.0),
        lambda: dead(gamma=0.0, beta=0.0),
        lambda: dead(weight=0.0),
        lambda: dead(weight=0.0, gamma=1e-9, beta=-1e-9, var=0.0),
        lambda: dead(weight=1e-30, var=0.0),
    ],
    ids=["gamma 0", "gamma and beta 0", "weight 0", "dead channel", "denormal square"],
)
def test_dead_channels(make: Callable[[], nn.Module], chosen: Callable[[], Method], target: Target, tmp_path: Path) -> None:
    model, task = make(), small()[1]
    found = datafree.quantize(model, task, method=chosen(), target=target)
    full, low = model(inputs(task, 64)), found.student(inputs(task, 64))
    assert torch.isfinite(low).all() and (low - full).norm() < 0.35 * full.norm()
    assert torch.equal(datafree.load(found.save(tmp_path / "run"), model)(inputs(task, 64)), low)


@pytest.mark.parametrize("chosen", [method("rtn"), method("dfmpc"), method("dfmpc", mode="faithful")], ids=["rtn", "plus", "faithful"])
def test_norms_without_variance(chosen: Callable[[], Method]) -> None:
    model, task = broken(lambda m: m.layer1[0].bn1.running_var.zero_()), small()[1]
    found = datafree.quantize(model, task, method=chosen(), target=Target((2, 6), 8))
    assert torch.isfinite(found.student(inputs(task))).all()


# ---------------------------------------------------------------- save and load


def test_save_and_load(result: Result, tmp_path: Path) -> None:
    model, task = small()
    folder = result.save(tmp_path / "runs" / "first")
    assert folder == tmp_path / "runs" / "first" and sorted(file.name for file in folder.iterdir()) == FILES
    assert [each.name for each in folder.parent.iterdir()] == ["first"], "something half-written stays"
    before = state(model)
    loaded = datafree.load(folder, model)
    assert torch.equal(loaded(inputs(task)), result.student(inputs(task)))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert datafree.Plan.from_json(strictly(folder / "plan.json")) == result.plan
    run = strictly(folder / "run.json")
    assert run == json.loads(json.dumps(result.run)), "run.json is not what the result says"


def test_numbers_that_are_not_finite_become_null(result: Result, tmp_path: Path) -> None:
    """A student that answers exactly like the teacher has an infinite ratio of signal to noise."""
    odd = {"sqnr": math.inf, "parts": (1.5, math.nan, [-math.inf, {"place": Path("a")}]), 3: True}
    folder = replace(result, run={**result.run, "fidelity": odd}).save(tmp_path / "run")
    assert strictly(folder / "run.json")["fidelity"] == {"sqnr": None, "parts": [1.5, None, [None, {"place": "a"}]], "3": True}
    assert strict_json([1, 2.0, "x", None]) == json.dumps([1, 2.0, "x", None], indent=2)


def test_an_exact_student_is_saved(tmp_path: Path) -> None:
    layer = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(4))
    found = datafree.quantize(layer, Task(shape=(4,)), method=find_method("rtn")(weight_range="minmax"), target=Target(8))
    assert isinstance(found.run["fidelity"], dict) and found.run["fidelity"]["sqnr"] == math.inf
    fidelity = strictly(found.save(tmp_path / "run") / "run.json")["fidelity"]
    assert isinstance(fidelity, dict) and fidelity["sqnr"] is None and fidelity["agreement"] == 100


def test_an_empty_folder_is_as_good_as_none(result: Result, tmp_path: Path) -> None:
    assert sorted(file.name for file in result.save(str(tmp_path)).iterdir()) == FILES


@pytest.mark.parametrize("kind", ["file", "folder that is not empty"])
def test_what_is_there_is_not_overwritten(result: Result, tmp_path: Path, kind: str) -> None:
    place = tmp_path / "run"
    (place if kind == "file" else place / "file").parent.mkdir(exist_ok=True)
    (place if kind == "file" else place / "file").write_text("mine")
    with pytest.raises(OutputError, match=f"run is there already, a {kind}: choose another folder or remove it"):
        result.save(place)
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == ["mine"]


def test_a_second_save_is_refused(result: Result, tmp_path: Path) -> None:
    result.save(tmp_path / "run")
    with pytest.raises(OutputError, match="is there already"):
        result.save(tmp_path / "run")


@pytest.mark.parametrize("place", ["file/run", "file/more/run", "x" * 300, "x" * 250])
def test_a_place_that_cannot_be_written(result: Result, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="cannot write"):
        result.save(tmp_path / place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("broken_call", ["rename", "write_text", "chmod"])
def test_a_failure_on_the_way_leaves_nothing(result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken_call: str) -> None:
    def fail(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, broken_call, fail)
    with pytest.raises(OutputError, match="cannot write .*run: No space left on device"):
        result.save(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("network", ["vgg", "resnet_basic"])
def test_a_student_of_another_network_is_refused(result: Result, tmp_path: Path, network: str) -> None:
    folder = result.save(tmp_path / "run")
    with pytest.raises(WeightsError, match="does not fit the network"):
        datafree.load(folder, build(network)[0])


def test_a_folder_without_a_student_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(WeightsError, match="holds no student.safetensors: expected a folder that datafree wrote"):
            datafree.load(folder, small()[0])


def test_a_damaged_student_is_refused(result: Result, tmp_path: Path) -> None:
    file = result.save(tmp_path / "run") / "student.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="damaged"):
        datafree.load(tmp_path / "run", small()[0])


def test_load_on_other_weights_gives_the_student_all_the_same(result: Result, tmp_path: Path) -> None:
    """Everything that the student computes with is in the file."""
    model, task = small()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    assert torch.equal(datafree.load(result.save(tmp_path / "run"), other)(inputs(task)), result.student(inputs(task)))


# ---------------------------------------------------------------- evaluate


def test_evaluate(result: Result) -> None:
    model, task = small()
    pictures = inputs(task, 50)
    labels = model(pictures).argmax(1)
    assert datafree.evaluate(model.train(), task, (pictures, labels)) == datafree.Accuracy(50, 50) and model.training
    found = datafree.evaluate(result.student, task, (pictures, labels))
    assert found.total == 50 and found.top1 == 2 * int((result.student(pictures).argmax(1) == labels).sum())
    with pytest.raises(DataError, match="holds no inputs"):
        datafree.evaluate(model, task, [])
