"""Copies that share tensors, and replacement by name."""

import threading

import pytest
import torch
from torch import nn

from datafree.errors import NetworkError
from datafree.graph.swap import frozen_copy, replace
from networks import NAMES, build


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_computes_the_same_and_shares_every_tensor(name: str) -> None:
    model, task = build(name)
    copied = frozen_copy(model.train())
    assert model.training and not any(module.training for module in copied.modules())
    x = torch.randn(2, *task.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(copied(x), model.eval()(x))
    mine, theirs = copied.state_dict(), model.state_dict()
    assert mine.keys() == theirs.keys() and all(mine[key].data_ptr() == theirs[key].data_ptr() for key in mine)
    assert not any(each.requires_grad for each in copied.parameters()) and all(each.requires_grad for each in model.parameters())
    modules = {id(module) for module in model.modules()}
    assert not any(id(module) in modules for module in copied.modules())


def test_other_dtypes_become_float32_and_counters_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).double()
    copied = frozen_copy(model, torch.device("cpu"))
    assert {each.dtype for each in copied.parameters()} == {torch.float32}
    assert copied.get_buffer("1.num_batches_tracked").dtype == torch.int64 and model[0].weight.dtype == torch.float64


def test_ties_stay_ties() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    copied = frozen_copy(model)
    assert copied.get_parameter("0.weight") is copied.get_parameter("1.weight")


def test_what_cannot_be_copied_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    model.lock = threading.Lock()
    with pytest.raises(NetworkError, match="the network cannot be copied .*lock"):
        frozen_copy(model)


def test_replace_reaches_every_name_of_a_module() -> None:
    model = nn.ModuleDict({"block": nn.Sequential(nn.Linear(3, 3), nn.ReLU())})
    model["alias"] = model["block"][1]
    model["list"] = nn.ModuleList([model["alias"], model["alias"]])
    replace(model, "block.1", new := nn.GELU())
    assert model["block"][1] is new and model["alias"] is new and all(each is new for each in model["list"])
    assert isinstance(model["block"][0], nn.Linear)
    with pytest.raises(AttributeError):
        replace(model, "block.7", new)
