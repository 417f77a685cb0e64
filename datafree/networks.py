"""Where a float network comes from: an embedded one, timm, torchvision, or a function in a file of the user's own."""

import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from datafree.errors import MissingExtraError, NetworkError
from datafree.export.float_weights import load_weights
from datafree.graph.swap import frozen_copy
from datafree.task import Task

EMBEDDED = ("digits", "digits-vit")  # networks of the package, for the digits that it holds out
FORMS = f"{', '.join(EMBEDDED)}, timm:NAME, torchvision:NAME or path/to/file.py:function"


@dataclass(frozen=True)
class Network:
    """A float network in eval mode, what it is for, and a short name for reports."""

    model: nn.Module
    task: Task
    name: str


def load_network(net: str, weights: Path | None = None, pretrained: bool = True) -> Network:
    """Load a network and its task.

    Args:
        net: ``digits`` or ``digits-vit`` (embedded), ``timm:NAME``, ``torchvision:NAME``, or ``path/to/file.py:function``, where
            the function takes no arguments and returns a module or (module, Task).
        weights: a file of weights to load into it; then no hub is contacted.
        pretrained: whether timm and torchvision are asked for their weights where ``weights`` is None.

    Raises:
        NetworkError: an unknown name, a failed download, a file or function that does not give a network.
        MissingExtraError: timm or torchvision is not installed.
        WeightsError: ``weights`` cannot be read or does not fit.
    """
    kind, _, name = net.rpartition(":") if ".py:" in net else net.partition(":")
    download = pretrained and weights is None
    if net == "digits":
        from datafree.zoo.digits import digits

        name = net
        model, task = digits()
    elif net == "digits-vit":
        from datafree.zoo.digits_vit import digits_vit

        name = net
        model, task = digits_vit()
    elif kind == "timm" and name:
        model, task = _from_timm(name, download)
    elif kind == "torchvision" and name:
        model, task = _from_torchvision(name, download)
    elif kind.endswith(".py") and name:
        model, task = _from_file(Path(kind).expanduser(), name)
    elif net.endswith(".py"):
        raise NetworkError(f"{net} names a file but no function in it: write {net}:function")
    else:
        raise NetworkError(f"unknown network {net!r}: give {FORMS}")
    if weights is not None:
        load_weights(model, weights)
    return Network(model.eval(), task, name)


def task_with(
    task: Task,
    shape: tuple[int, ...] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    classes: int | tuple[str, ...] | None = None,
    resize: int | None = None,
) -> Task:
    """``task`` with everything that is given here in place of its own. Raises NetworkError where the parts do not fit each other."""
    return replace(
        task,
        shape=task.shape if shape is None else shape,
        mean=task.mean if mean is None else mean,
        std=task.std if std is None else std,
        classes=task.classes if classes is None else classes,
        resize=task.resize if resize is None else resize,
    )


def check_network(model: nn.Module, task: Task) -> None:
    """Refuse a network that cannot be quantized sensibly, after one run on an input of zeros.

    Raises:
        NetworkError: no parameters, or some without values; NaN, infinity or a negative variance among them;
            a forward pass that fails on ``task.shape``; an answer that is not finite or has another number of classes than the task.
    """
    if next(model.parameters(), None) is None:
        raise NetworkError(f"{type(model).__name__} has no parameters: there is nothing to quantize")
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        _check_tensor(name, tensor)
    first = next(model.parameters())
    example = torch.zeros(1, *task.shape, device=first.device)
    try:
        with torch.no_grad():
            result = frozen_copy(model)(example)
    except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
        raise NetworkError(f"the network fails on an input of shape {tuple(example.shape)}: {error}; is the task's shape right?") from error
    answer = task.answer(result)
    if not torch.isfinite(answer).all():
        raise NetworkError(f"the network answers NaN or infinity to an input of zeros of shape {tuple(example.shape)}")
    classes = len(task.classes) if isinstance(task.classes, tuple) else task.classes
    if classes is not None and answer.ndim == 2 and answer.shape[1] != classes:
        raise NetworkError(f"the network answers with {answer.shape[1]} classes, the task names {classes}: correct the task's classes")


def _check_tensor(name: str, tensor: Tensor) -> None:
    if is_lazy(tensor) or tensor.is_meta:
        raise NetworkError(f"{name} has no values yet: initialise the network (run it once) or load its weights first")
    if not tensor.is_floating_point():
        return
    wrong = int((~torch.isfinite(tensor)).sum())
    if wrong:
        raise NetworkError(f"{name} {tuple(tensor.shape)} holds NaN or infinity ({wrong} of {tensor.numel()} values): load sound weights")
    if name.rpartition(".")[2] == "running_var" and bool((tensor < 0).any()):
        count, least = int((tensor < 0).sum()), float(tensor.min())
        raise NetworkError(f"{name} has {count} negative variances, down to {least:.3g}: load sound weights")


def _from_timm(name: str, download: bool) -> tuple[nn.Module, Task]:
    timm = _extra("timm")
    _check_known("timm", name, {*timm.list_models(), *timm.list_pretrained()})
    with _failing_as(f"timm:{name}", download):
        made = timm.create_model(name, pretrained=download)
    model: nn.Module = made
    config = made.pretrained_cfg
    shape = tuple(config["input_size"])
    resize = math.floor(min(shape[1:]) / config.get("crop_pct", 1.0))
    return model, Task(shape=shape, mean=tuple(config["mean"]), std=tuple(config["std"]), classes=made.num_classes or None, resize=resize)


def _from_torchvision(name: str, download: bool) -> tuple[nn.Module, Task]:
    models = _extra("torchvision.models")
    _check_known("torchvision", name, models.list_models(module=models))
    weights = models.get_model_weights(name).DEFAULT
    with _failing_as(f"torchvision:{name}", download):
        model: nn.Module = models.get_model(name, weights=weights if download else None)
    pictures = weights.transforms()
    (crop,), (resize,) = pictures.crop_size, pictures.resize_size
    task = Task(
        shape=(3, crop, crop), mean=tuple(pictures.mean), std=tuple(pictures.std), classes=len(weights.meta["categories"]), resize=resize
    )
    return model, task


def _extra(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # torchvision raises the latter where it was built for another torch
        raise MissingExtraError(
            f'{module} cannot be imported ({error}): pip install "datafree[timm]", in a version that fits torch {torch.__version__}'
        ) from error


def _check_known(hub: str, name: str, known: Iterable[str]) -> None:
    names = sorted(known)
    if name not in names:
        close = get_close_matches(name, names)
        hint = (
            f"close names: {', '.join(close)}" if close else f"it has {len(names)} classification networks, such as {', '.join(names[:3])}"
        )
        raise NetworkError(f"{hub} has no classification network {name!r}: {hint}")


@contextmanager
def _failing_as(net: str, download: bool) -> Iterator[None]:
    """Tell a failure of the hub in our words."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        if not download:
            raise NetworkError(f"{net} cannot be built: {error}") from error
        raise NetworkError(f"no weights of {net} could be downloaded: {error}; get them elsewhere and give --weights FILE") from error


def _from_file(path: Path, name: str) -> tuple[nn.Module, Task]:
    if not path.is_file():
        raise NetworkError(f"no file {path}: expected a Python file with a function {name}")
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)  # so that it may import its neighbours, as when it is run
    try:
        function = _function(path, name)
        made = function()
    finally:
        sys.path.remove(folder)
    model, task = made if isinstance(made, tuple) and len(made) == 2 else (made, Task())
    if not isinstance(model, nn.Module) or not isinstance(task, Task):
        raise NetworkError(f"{path}: {name}() returned {_described(made)}: expected a torch.nn.Module, or (module, datafree.Task)")
    return model, task


def _function(path: Path, name: str) -> Callable[[], object]:
    """Import the file and find its function, one that needs no arguments."""
    spec = importlib.util.spec_from_file_location(f"datafree_network_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise NetworkError(f"{path} cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    try:
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError) as error:
        raise NetworkError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not callable(found) or isinstance(found, nn.Module):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == spec.name and callable(value)]
        what = "no function" if found is None else f"{_described(found)}, not a function,"
        raise NetworkError(f"{path} has {what} {name!r}: it defines {', '.join(own) or 'none'}")
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise NetworkError(f"{path}: {name}() must be callable without arguments, but {error}: give them defaults") from error
    function: Callable[[], object] = found
    return function


def _described(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(type(part).__name__ for part in value)})"
    return "None" if value is None else f"an object of type {type(value).__name__}"
