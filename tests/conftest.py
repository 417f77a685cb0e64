"""What every test lives under: one thread, no sockets, no loaders of data sets."""

import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import torch.utils.data
from torch import nn

from datafree import api
from datafree.methods import anchor
from datafree.quant.insert import plan_of
from datafree.task import Task

ROOT = Path(__file__).parents[1]

torch.set_num_threads(1)


def _refuse(what: str) -> Callable[..., NoReturn]:
    # pytest.fail raises a BaseException, which no `except Exception` on the way can swallow.
    return lambda *args, **kwargs: pytest.fail(f"a test tried to {what}: this package works without data and without a network")


@pytest.fixture(autouse=True)
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sockets and loaders of data sets raise: "no data" is the product's promise."""
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, _refuse("connect a socket"))
    monkeypatch.setattr(socket, "create_connection", _refuse("open a connection"))
    monkeypatch.setattr(torch.utils.data.DataLoader, "__init__", _refuse("make a DataLoader"))
    for package in ("sklearn.datasets", "torchvision.datasets"):
        module = sys.modules.get(package)
        for name in () if module is None else module.__all__:
            if package == "torchvision.datasets" or name.startswith(("load_", "fetch_")):
                monkeypatch.setattr(module, name, _refuse(f"use {package}.{name}"))


@pytest.fixture
def few_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """anchor draws 8 pictures, and fidelity is told from as many."""
    monkeypatch.setattr(anchor, "PICTURES", 8)
    monkeypatch.setattr(anchor, "FEWER", 8)
    monkeypatch.setattr(api, "_inputs", lambda task: 8)


@pytest.fixture(scope="module")
def traced_once() -> Iterator[None]:
    """A student is followed for export once, which takes seconds, however many commands export it."""
    from datafree.export import onnx  # takes seconds too

    follow, known = onnx.trace, {}

    def trace(student: nn.Module, task: Task) -> object:
        numbers = [each.numpy().tobytes() for each in student.state_dict().values() if isinstance(each, torch.Tensor)]
        key = (repr((student, plan_of(student), task)), *numbers)
        if key not in known:
            known[key] = follow(student, task)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx, "trace", trace)
        yield


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of larger data for measuring: $DATAFREE_DATA, or ../shared/data; the test is skipped where it is absent."""
    folder = Path(os.environ.get("DATAFREE_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}: set DATAFREE_DATA to where cifar10.npz and weights/ are")
    return folder
