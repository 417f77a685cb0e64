"""Where networks come from, and what each mistake says."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from datafree.checks import check_network
from datafree.cli_flags import NetworkFlags, open_network
from datafree.errors import MissingExtraError, NetworkError, WeightsError
from datafree.networks import Network, load_network, task_with
from datafree.task import Task

SMALL = Task(shape=(3, 8, 8), classes=5)


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))


def saved(model: nn.Module, folder: Path) -> Path:
    save_file(model.state_dict(), folder / "weights.safetensors")
    return folder / "weights.safetensors"


# ---------------------------------------------------------------- digits and files


@pytest.mark.parametrize("name", ["digits", "digits-vit"])
def test_digits_are_embedded(name: str) -> None:
    network = load_network(name)
    assert network.name == name and network.task.shape == (1, 8, 8) and not network.model.training
    check_network(network.model, network.task)


@pytest.mark.parametrize("name", ["digits", "digits-vit"])
def test_digits_take_other_weights(name: str, tmp_path: Path) -> None:
    other = load_network(name).model
    with torch.no_grad():
        next(other.parameters()).zero_()
    loaded = load_network(name, saved(other, tmp_path)).model
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in loaded.state_dict().items())


OWN = """
from __future__ import annotations
from dataclasses import dataclass

from torch import nn

from neighbour_of_my_net import WIDTH

@dataclass
class Sizes:
    inputs: int = 4

def bare():
    return nn.Linear(Sizes().inputs, WIDTH).train()

def described():
    from datafree.task import Task
    return nn.Linear(4, 2), Task(shape=(4,), classes=2)

def sized(width, depth=3):
    return nn.Linear(4, width)

def nothing():
    pass

def pair():
    return nn.Linear(4, 2), 5

class Net(nn.Linear):
    def __init__(self):
        super().__init__(4, 2)

def broken():
    raise TypeError("my own mistake")

number = 5
module = nn.Linear(4, 2)
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "my-net.py").write_text(OWN)
    (tmp_path / "neighbour_of_my_net.py").write_text("WIDTH = 7\n")
    return tmp_path / "my-net.py"


def test_file_gives_a_module(own: Path) -> None:
    before = list(sys.path)
    network = load_network(f"{own}:bare")
    assert (network.model.out_features, network.task, network.name) == (7, Task(), "bare")
    assert not network.model.training and sys.path == before


def test_file_gives_a_module_and_a_task(own: Path) -> None:
    network = load_network(f"{own}:described")
    assert network.task == Task(shape=(4,), classes=2)
    assert load_network(f"{own}:Net").model.out_features == 2


def test_file_with_weights(own: Path, tmp_path: Path) -> None:
    weights = saved(nn.Linear(4, 2), tmp_path)
    loaded = load_network(f"{own}:described", weights)
    with pytest.raises(WeightsError, match="does not fit the network"):
        load_network(f"{own}:bare", weights)
    assert isinstance(loaded, Network)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("sized", r"sized\(\) must be callable without arguments, but missing a required argument: 'width'"),
        ("nothing", r"nothing\(\) returned None: expected a torch.nn.Module, or \(module, datafree.Task\)"),
        ("pair", r"pair\(\) returned \(Linear, int\)"),
        ("absent", "has no function 'absent': it defines Sizes, bare, described, sized, nothing, pair, Net, broken"),
        ("number", "has an object of type int, not a function, 'number'"),
        ("module", "has an object of type Linear, not a function, 'module'"),
    ],
)
def test_function_that_gives_no_network_is_refused(own: Path, function: str, message: str) -> None:
    with pytest.raises(NetworkError, match=message):
        load_network(f"{own}:{function}")


def test_mistake_inside_the_function_is_reported_with_its_line(own: Path) -> None:
    line = OWN.splitlines().index('    raise TypeError("my own mistake")') + 1
    with pytest.raises(NetworkError, match=rf"broken\(\) fails: TypeError: my own mistake \({own}, line {line}, in broken\)"):
        load_network(f"{own}:broken")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(:\n", "cannot be imported: SyntaxError"),
        ("import no_such_package\n", "cannot be imported: ModuleNotFoundError: No module named 'no_such_package'"),
    ],
)
def test_file_that_cannot_be_imported_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "net.py").write_text(text)
    with pytest.raises(NetworkError, match=message):
        load_network(f"{tmp_path}/net.py:f")


@pytest.mark.parametrize(
    ("net", "message"),
    [
        ("resnet18", "unknown network 'resnet18': give digits, digits-vit, timm:NAME, torchvision:NAME or path/to/file.py:function"),
        ("", "unknown network ''"),
        ("timm:", "unknown network 'timm:'"),
        ("hub:resnet18", "unknown network 'hub:resnet18'"),
        ("nets.py", "names a file but no function in it: write nets.py:function"),
        ("absent/nets.py:f", "no file absent/nets.py: expected a Python file with a function f"),
    ],
)
def test_unknown_network_is_refused(net: str, message: str) -> None:
    with pytest.raises(NetworkError, match=message):
        load_network(net)


# ---------------------------------------------------------------- hubs, played by stand-ins


@dataclass
class Hub:
    """Stands in for timm or torchvision.models: notes what was asked for, and fails to download."""

    asked: list[object] = field(default_factory=list)
    failure: Exception | None = None

    def create_model(self, name: str, pretrained: bool) -> nn.Module:
        return self.get_model(name, pretrained)

    def get_model(self, name: str, weights: object) -> nn.Module:
        self.asked.append((name, weights))
        if weights and self.failure:
            raise self.failure
        model = small()
        model.num_classes = 5
        model.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7), "crop_pct": 0.9}
        return model


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub, module = Hub(), ModuleType("timm")
    vars(module).update(create_model=hub.create_model, list_models=lambda: ["small", "tall"], list_pretrained=lambda: ["small.best"])
    monkeypatch.setitem(sys.modules, "timm", module)
    return hub


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub, module = Hub(), ModuleType("torchvision.models")
    pictures = SimpleNamespace(crop_size=[8], resize_size=[9], mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])
    default = SimpleNamespace(transforms=lambda: pictures, meta={"categories": list("abcde")})
    vars(module).update(
        get_model=hub.get_model,
        list_models=lambda module: ["small", "tall"],
        get_model_weights=lambda name: SimpleNamespace(DEFAULT=default),
    )
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", module)
    return hub


FROM_TIMM = Task(shape=(3, 8, 8), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), classes=5, resize=8)
FROM_TORCHVISION = Task(shape=(3, 8, 8), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), classes=5, resize=9)


def test_timm_is_asked_for_weights_and_task(timm: Hub) -> None:
    network = load_network("timm:small.best")
    assert (network.name, network.task, timm.asked) == ("small.best", FROM_TIMM, [("small.best", True)])
    check_network(network.model, network.task)


def test_torchvision_is_asked_for_weights_and_task(torchvision: Hub) -> None:
    network = load_network("torchvision:small")
    assert (network.name, network.task) == ("small", FROM_TORCHVISION)
    (asked,) = torchvision.asked
    assert isinstance(asked, tuple) and asked[0] == "small" and asked[1] is not None


@pytest.mark.parametrize("hub", ["timm", "torchvision"])
def test_own_weights_need_no_download(hub: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    stand_in: Hub = request.getfixturevalue(hub)
    stand_in.failure = OSError("no network here")
    weights = saved(small(), tmp_path)
    assert load_network(f"{hub}:small", weights).name == "small"
    assert load_network(f"{hub}:small", pretrained=False).name == "small"
    with pytest.raises(NetworkError, match=f"no weights of {hub}:small could be downloaded: no network here; .*--weights FILE"):
        load_network(f"{hub}:small")


@pytest.mark.parametrize("hub", ["timm", "torchvision"])
def test_unknown_name_lists_close_ones(hub: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(hub)
    with pytest.raises(NetworkError, match=f"{hub} has no classification network 'smal': close names: small"):
        load_network(f"{hub}:smal")
    with pytest.raises(NetworkError, match=r"'zzz': it has \d classification networks, such as small, "):
        load_network(f"{hub}:zzz")


@pytest.mark.parametrize(("hub", "module"), [("timm", "timm"), ("torchvision", "torchvision.models")])
def test_missing_hub_names_the_extra(hub: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf'{module} cannot be imported .*pip install "datafree\[timm\]"'):
        load_network(f"{hub}:small")


# ---------------------------------------------------------------- task_with and check_network


def test_task_with_replaces_what_is_given() -> None:
    assert task_with(SMALL) == SMALL
    changed = task_with(SMALL, shape=(1, 4, 4), mean=(0.5,), std=(0.2,), classes=("a", "b"), resize=5)
    assert changed == Task(shape=(1, 4, 4), mean=(0.5,), std=(0.2,), classes=("a", "b"), resize=5)
    with pytest.raises(NetworkError, match="Task.mean has 3 values for 1 channels"):
        task_with(FROM_TIMM, shape=(1, 8, 8))


def test_sound_network_passes_and_stays_as_it_is() -> None:
    model = small().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    check_network(model, SMALL)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_batch_norm_of_zero_variance_passes() -> None:
    model = small().eval()
    model[1].running_var.zero_()
    check_network(model, SMALL)


def spoil(name: str, value: float, count: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = small().eval()
        model.state_dict()[name].view(-1)[:count] = value
        return model

    return make


def overflowing() -> nn.Module:
    model = small().append(nn.Linear(5, 1)).eval()
    model.state_dict()["4.bias"].fill_(1e30)
    model.state_dict()["5.weight"].fill_(1e30)
    return model


@pytest.mark.parametrize(
    ("make", "task", "message"),
    [
        (lambda: nn.Flatten(), SMALL, "Flatten has no parameters: there is nothing to quantize"),
        (spoil("0.weight", float("nan"), 3), SMALL, r"0.weight \(4, 3, 3, 3\) holds NaN or infinity \(3 of 108 values\)"),
        (spoil("1.running_mean", float("inf"), 1), SMALL, r"1.running_mean \(4,\) holds NaN or infinity \(1 of 4 values\)"),
        (spoil("1.running_var", -0.5, 2), SMALL, "1.running_var has 2 negative variances, down to -0.5"),
        (lambda: nn.LazyLinear(3).eval(), SMALL, "weight has no values yet"),
        (lambda: nn.Linear(8, 3, device="meta").eval(), SMALL, "weight has no values yet"),
        (lambda: small().eval(), Task(shape=(1, 8, 8)), r"the network fails on an input of shape \(1, 1, 8, 8\): .*task's shape right\?"),
        (lambda: small().eval(), task_with(SMALL, classes=10), "answers with 5 classes, the task names 10"),
        (lambda: small().eval(), task_with(SMALL, classes=("a", "b")), "answers with 5 classes, the task names 2"),
        (overflowing, SMALL, "answers NaN or infinity to pixels drawn at random"),
    ],
)
def test_unsound_network_is_refused(make: Callable[[], nn.Module], task: Task, message: str) -> None:
    with pytest.raises(NetworkError, match=message):
        check_network(make(), task)


# ---------------------------------------------------------------- files of code


def test_files_of_one_name_in_two_folders_keep_their_own_neighbours(tmp_path: Path) -> None:
    text = (
        "from torch import nn\nfrom same_neighbour_in_two_folders import WIDTH\n\n"
        "class Net(nn.Linear):\n    def __init__(self):\n        super().__init__(4, WIDTH)\n"
    )
    for folder, width in (("one", 2), ("two", 3)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "net.py").write_text(text)
        (tmp_path / folder / "same_neighbour_in_two_folders.py").write_text(f"WIDTH = {width}\n")
    one, two, again = (load_network(f"{tmp_path / folder}/net.py:Net").model for folder in ("one", "two", "one"))
    assert [each.out_features for each in (one, two, again)] == [2, 3, 2]
    assert type(one).__module__ != type(two).__module__
    for model in (one, two):
        assert sys.modules[type(model).__module__].WIDTH == model.out_features


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return torch.load('absent.pth')", r"net\(\) fails: FileNotFoundError: .*absent.pth.* \(.*net.py, line 3, in net\)"),
        ("return {}['absent']", r"net\(\) fails: KeyError: 'absent' \(.*net.py, line 3, in net\)"),
        ("import json; return json.loads('no JSON')", r"net\(\) fails: JSONDecodeError: .* \(.*net.py, line 3, in net\)"),
        ("raise SystemExit(2)", r"net\(\) fails: SystemExit: 2 \(.*line 3"),
        ("return torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))", "returned a torch.export program: give the Python"),
    ],
)
def test_a_function_that_fails_is_reported_with_its_line(body: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(f"import torch\ndef net():\n    {body}\n")
    with pytest.raises(NetworkError, match=message):
        load_network(f"{tmp_path}/net.py:net")


def test_wrappers_are_taken_off_and_noted(tmp_path: Path) -> None:
    code = ("from torch import nn", "from datafree import Task", "def net(): return nn.DataParallel(nn.Linear(4, 2)), Task(shape=(4,))")
    (tmp_path / "net.py").write_text("\n".join(code))
    weights = saved(nn.Linear(4, 2), tmp_path)
    found = load_network(f"{tmp_path}/net.py:net", weights)
    assert isinstance(found.model, nn.Linear) and found.notes == ("DataParallel around the network is taken off",)


def test_a_missing_task_is_told_with_what_was_assumed(tmp_path: Path) -> None:
    (tmp_path / "bare.py").write_text(
        "from torch import nn\ndef net(): return nn.Conv2d(3, 4, 3)\ndef both():\n    from datafree import Task\n    return net(), Task()\n"
    )
    (note,) = load_network(f"{tmp_path / 'bare.py'}:net").notes
    assert "returned no Task: shape (3, 224, 224), mean (0.0,), std (1.0,) were assumed" in note and "--mean" in note
    assert load_network(f"{tmp_path / 'bare.py'}:both").notes == ()
    flags = NetworkFlags(input_shape=(3, 32, 32), mean=(0.5,))
    (note,) = open_network(f"{tmp_path / 'bare.py'}:net", flags).notes
    assert "returned no Task: std (1.0,) were assumed" in note
