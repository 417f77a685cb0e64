"""Where a float network comes from: an embedded one, timm, torchvision, or a function in a file of the user's own."""

import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from datafree.errors import DatafreeError, MissingExtraError, NetworkError, WeightsError
from datafree.export.checkpoints import LoadedWeights
from datafree.export.float_weights import load_weights
from datafree.graph.swap import unwrapped, wrappers
from datafree.task import Task
from datafree.user_code import USER_ERRORS, described_error

EMBEDDED = ("digits", "digits-vit")  # networks of the package, for the digits that it holds out
FORMS = f"{', '.join(EMBEDDED)}, timm:NAME, torchvision:NAME or path/to/file.py:function"


@dataclass(frozen=True)
class Network:
    """A float network in eval mode, what it is for, and a short name for reports.

    Args:
        model: without wrappers such as DataParallel.
        task: its inputs and answer.
        name: a short name.
        weights: what was taken out of a file of weights, if one was given.
        wrappers: what was taken off around the network, in words.
        assumed: which fields of the task nobody has given, so that its defaults were taken.
    """

    model: nn.Module
    task: Task
    name: str
    weights: LoadedWeights | None = None
    wrappers: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of how the network was loaded."""
        loaded = () if self.weights is None or not self.weights.note else (self.weights.note,)
        given = ", ".join(f"{name} {getattr(self.task, name)}" for name in self.assumed)
        guessed = f"the function returned no Task: {given} were assumed. Return (module, Task), or give --input-shape, --mean and --std"
        return (*(f"{each} is taken off" for each in self.wrappers), *loaded, *([guessed] if self.assumed else []))


def load_network(net: str, weights: Path | None = None, pretrained: bool = True, weights_key: str | None = None) -> Network:
    """Load a network and its task.

    Args:
        net: ``digits`` or ``digits-vit`` (embedded), ``timm:NAME``, ``torchvision:NAME``, or ``path/to/file.py:function``, where
            the function takes no arguments and returns a module or (module, Task).
        weights: a file of weights to load into it; then no hub is contacted.
        pretrained: whether timm and torchvision are asked for their weights where ``weights`` is None.
        weights_key: which state dict of the file to take where it has several.

    Raises:
        NetworkError: an unknown name, a failed download, a file or function that fails or does not give a network.
        MissingExtraError: timm or torchvision is not installed.
        WeightsError: ``weights`` cannot be read or does not fit.
    """
    kind, _, name = net.rpartition(":") if ".py:" in net else net.partition(":")
    assumed: tuple[str, ...] = ()
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
        model, task, assumed = _from_file(Path(kind).expanduser(), name)
    elif net.endswith(".py"):
        raise NetworkError(f"{net} names a file but no function in it: write {net}:function")
    else:
        raise NetworkError(f"unknown network {net!r}: give {FORMS}")
    if weights_key is not None and weights is None:
        raise WeightsError(f"the key {weights_key!r} names a part of a file of weights, but no file is given: add --weights FILE")
    taken_off, model = wrappers(model), unwrapped(model)
    loaded = None if weights is None else load_weights(model, weights, weights_key)
    return Network(model.eval(), task, name, loaded, tuple(taken_off), assumed)


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


def _from_file(path: Path, name: str) -> tuple[nn.Module, Task, tuple[str, ...]]:
    """The network, its task, and the fields of the task that are assumed."""
    if not path.is_file():
        raise NetworkError(f"no file {path}: expected a Python file with a function {name}")
    with _importable(path.resolve().parent):
        function = _function(path, name)
        try:
            made = function()
        except DatafreeError:
            raise
        except USER_ERRORS as error:
            raise NetworkError(f"{path}: {name}() fails: {described_error(error)}") from error
    if isinstance(made, torch.export.ExportedProgram):
        raise NetworkError(f"{path}: {name}() returned a torch.export program: give the Python network (torch.nn.Module) it was made from")
    assumed = () if isinstance(made, tuple) and len(made) == 2 else ("shape", "mean", "std")
    model, task = made if isinstance(made, tuple) and len(made) == 2 else (made, Task())
    if not isinstance(model, nn.Module) or not isinstance(task, Task):
        raise NetworkError(f"{path}: {name}() returned {_described(made)}: expected a torch.nn.Module, or (module, datafree.Task)")
    return model, task, assumed


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let a file in ``folder`` import its neighbours, as when it is run; those of a file loaded before, of the same name, are forgotten."""
    known = {Path(place).resolve() for place in sys.path}
    for module_name, module in list(sys.modules.items()):
        found = getattr(module, "__file__", None)
        if found is None or "." in module_name:
            continue
        home = Path(found).resolve().parent
        home = home.parent if Path(found).name == "__init__.py" else home
        neighbour = (folder / f"{module_name}.py").is_file() or (folder / module_name / "__init__.py").is_file()
        if neighbour and home != folder and home not in known:
            for each in [each for each in sys.modules if each == module_name or each.startswith(f"{module_name}.")]:
                del sys.modules[each]
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _function(path: Path, name: str) -> Callable[[], object]:
    """Import the file and find its function, one that needs no arguments."""
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]  # files in two folders may have one name
    spec = importlib.util.spec_from_file_location(f"datafree_network_{path.stem}_{place}", path)
    if spec is None or spec.loader is None:
        raise NetworkError(f"{path} cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    try:
        spec.loader.exec_module(module)
    except DatafreeError:
        raise
    except USER_ERRORS as error:
        raise NetworkError(f"{path} cannot be imported: {described_error(error)}") from error
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
