"""One forward pass, recorded: every operation on tensors that depend on the input, in order.

The network runs for real (on noise, in eval mode), so data-dependent branches, in-place operations and modules called
twice are no obstacle: what is recorded is what happened. Modules only tell where an operation stands, by hooks that are
removed again; operations are seen through ``torch.overrides``. A recorded call can be run again on other values, which is
how moments are propagated.
"""

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils.weak import WeakTensorKeyDictionary

from datafree.errors import DatafreeError, FlowError

# Names of torch functions that mean the same operation.
_SAME = MappingProxyType(
    {
        **{f"conv{n}d": "conv" for n in (1, 2, 3)},
        **{f"conv_transpose{n}d": "conv_transpose" for n in (1, 2, 3)},
        **{f"max_pool{n}d": "max_pool" for n in (1, 2, 3)},
        **{f"max_pool{n}d_with_indices": "max_pool" for n in (1, 2, 3)},
        **{f"adaptive_max_pool{n}d": "adaptive_max_pool" for n in (1, 2, 3)},
        **{f"avg_pool{n}d": "avg_pool" for n in (1, 2, 3)},
        **{f"adaptive_avg_pool{n}d": "adaptive_avg_pool" for n in (1, 2, 3)},
        **{name: "cat" for name in ("concat", "concatenate")},
        **{name: "add" for name in ("radd", "iadd")},
        **{name: "sub" for name in ("subtract", "isub")},
        **{name: "rsub" for name in ("rsubtract",)},
        **{name: "mul" for name in ("multiply", "rmul", "imul")},
        **{name: "div" for name in ("divide", "true_divide", "truediv", "itruediv")},
        **{name: "matmul" for name in ("bmm", "mm", "rmatmul")},
        **{name: "getitem" for name in ("select", "narrow")},
        "clip": "clamp",
        "swish": "silu",
        "boolean_dispatch": "max_pool",
    }
)

# All that may go wrong in somebody else's forward pass.
_FAILURES = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    StopIteration,
    ImportError,
    OSError,
)
# Functions that turn a tensor into something that is none. A truth value is left out: branches on data are followed as they went.
_ESCAPES = frozenset("item tolist numpy array float int complex index".split())


@dataclass(frozen=True)
class Ref:
    """Stands in a recorded call for the value of an earlier node."""

    index: int


@dataclass(frozen=True)
class Name:
    """Stands in a recorded call for a parameter or buffer of the network."""

    name: str


@dataclass(frozen=True)
class Call:
    """A call of a torch function; tensors among the arguments are :class:`Ref`, :class:`Name` or constants."""

    function: Callable[..., object]
    args: tuple[object, ...]
    kwargs: Mapping[str, object]


@dataclass(frozen=True)
class Node:
    """One value of the forward pass.

    Args:
        index: position in ``Tape.nodes``.
        op: what made it: ``input``, ``conv``, ``linear``, ``batch_norm``, ``relu``, ``add``, ``cat``, ... ; ``item`` takes
            one tensor out of several; ``opaque`` is something that ran unseen (numpy, a script); ``escape`` is a value
            that became a number or an array of Python's (``item``, ``numpy``) and may influence anything.
        module: name of the innermost module it ran in, "" for the network itself.
        inputs: nodes whose values it consumed, in the order of the arguments.
        call: how to make it again; None for ``input``, ``opaque``, ``escape``, and a tensor that was written to.
        shape: of the tensor; () where the value is a tuple of tensors.
    """

    index: int
    op: str
    module: str
    inputs: tuple[int, ...]
    call: Call | None
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module, and the nodes recorded meanwhile.

    ``input`` is the first positional tensor, ``output`` the returned tensor or the first of a tuple; None where there is none,
    or where the same tensor is handed over a second time.
    """

    module: str
    input: int | None
    output: int | None
    start: int
    stop: int


@dataclass(frozen=True)
class Tape:
    """All that one forward pass did, in order."""

    nodes: tuple[Node, ...]
    module_calls: tuple[ModuleCall, ...]
    outputs: tuple[int, ...]


def record(model: nn.Module, example: Tensor) -> Tape:
    """Run ``model`` once in eval mode on ``example`` (n, *shape) and record it. Raises FlowError where the network refuses the input."""
    _refuse_compiled(model)
    example = example.clone()  # the network may change its input in place
    recorder = _Recorder(model, example)
    try:
        with _evaluating(model), torch.no_grad(), recorder:
            answer = model(example)
    except DatafreeError:
        raise
    except _FAILURES as error:
        raise FlowError(
            f"the network refused an input of shape {tuple(example.shape)} in {_place(recorder.module)}"
            f"{_line(traceback.extract_tb(error.__traceback__))}: {type(error).__name__}: {error}. "
            "Check the shape of the task and that the network runs on one tensor"
        ) from error
    finally:
        recorder.remove_hooks()
    outputs = tuple(recorder.index_of[each] for each in tensors_in(answer) if each in recorder.index_of)
    if not outputs:
        raise FlowError(
            f"the answer of the network, a {type(answer).__name__}, holds no tensor that depends on its input through operations that can "
            "be followed: let it return a tensor, or tensors in a tuple, list, mapping or dataclass"
        )
    return Tape(tuple(recorder.nodes), tuple(recorder.module_calls), outputs)


def _refuse_compiled(model: nn.Module) -> None:
    for name, module in model.named_modules():
        compiled = getattr(module, "_compiled_call_impl", None) is not None or "_orig_mod" in module._modules
        if compiled or isinstance(module, torch.jit.ScriptModule):
            kind = "compiled (torch.compile)" if compiled else "a TorchScript module"
            raise FlowError(f"{_place(name)} is {kind}, which cannot be followed: give the Python network it was made from")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in before:
            module.training = training


def tensors_in(value: object) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists, mappings and dataclasses, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from tensors_in(each)
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_in(each)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))


def replace_in(value: object, change: Callable[[object], object]) -> object:
    """``value`` with ``change`` applied to whatever is not a tuple, list, slice or dictionary."""
    if isinstance(value, (tuple, list)):
        changed = [replace_in(each, change) for each in value]
        return tuple(changed) if isinstance(value, tuple) else changed
    if isinstance(value, dict):
        return {key: replace_in(each, change) for key, each in value.items()}
    if isinstance(value, slice):
        return slice(*(replace_in(each, change) for each in (value.start, value.stop, value.step)))
    return change(value)


def repeat(call: Call, resolve: Callable[[object], object]) -> object:
    """Run a recorded call again; ``resolve`` turns :class:`Ref` and :class:`Name` into values and keeps the rest."""
    args = cast(tuple[object, ...], replace_in(call.args, resolve))
    kwargs = {key: replace_in(value, resolve) for key, value in call.kwargs.items()}
    return call.function(*args, **kwargs)


@dataclass
class _Frame:
    name: str
    input: int | None
    inputs: tuple[int, ...]
    start: int


@dataclass(eq=False)
class _Recorder(TorchFunctionMode):
    model: nn.Module
    example: Tensor
    nodes: list[Node] = field(default_factory=list)
    module_calls: list[ModuleCall] = field(default_factory=list)
    stack: list[_Frame] = field(default_factory=list)
    index_of: MutableMapping[Tensor, int] = field(default_factory=WeakTensorKeyDictionary)
    stale: MutableMapping[Tensor, str] = field(default_factory=WeakTensorKeyDictionary)

    def __post_init__(self) -> None:
        super().__init__()
        self.names = {id(tensor): name for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers())}
        self.hooks = []
        for name, module in self.model.named_modules():
            self.hooks.append(module.register_forward_pre_hook(self._enter(name), with_kwargs=True))
            self.hooks.append(module.register_forward_hook(self._leave(name)))
        self._add("input", None, (), self.example)

    @property
    def module(self) -> str:
        """Name of the module that runs at the moment."""
        return self.stack[-1].name if self.stack else ""

    def remove_hooks(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def _enter(self, name: str) -> Callable[[nn.Module, tuple[object, ...], dict[str, object]], None]:
        def enter(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            entered = tuple(self.index_of[each] for each in tensors_in((args, kwargs)) if each in self.index_of)
            self.stack.append(_Frame(name, self._first(args, (args, kwargs)), entered, len(self.nodes)))

        return enter

    def _leave(self, name: str) -> Callable[[nn.Module, tuple[object, ...], object], None]:
        def leave(module: nn.Module, args: tuple[object, ...], result: object) -> None:
            while self.module != name:  # modules that were left by an exception which the network caught
                self.stack.pop()
            frame = self.stack[-1]
            for each in tensors_in(result):
                if each not in self.index_of and frame.inputs and id(each) not in self.names:
                    self._add("opaque", None, frame.inputs, each)
            self.stack.pop()
            output = self._first(result if isinstance(result, tuple) else (result,), result)
            self.module_calls.append(ModuleCall(frame.name, frame.input, output, frame.start, len(self.nodes)))

        return leave

    def _first(self, values: tuple[object, ...], everything: object) -> int | None:
        """The node of the first tensor among ``values``, if it occurs only once in ``everything``."""
        first = next((each for each in values if isinstance(each, Tensor)), None)
        if first is None or sum(each is first for each in tensors_in(everything)) > 1:
            return None
        return self.index_of.get(first)

    def _add(self, op: str, call: Call | None, inputs: tuple[int, ...], value: object) -> int:
        index = len(self.nodes)
        shape = tuple(value.shape) if isinstance(value, Tensor) else ()
        self.nodes.append(Node(index, op, self.module, inputs, call, shape))
        if isinstance(value, Tensor):
            self.index_of[value] = index
            self.stale.pop(value, None)
        return index

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        given = list(tensors_in((args, kwargs)))
        if not any(each in self.index_of for each in given):
            return func(*args, **kwargs)
        if any(each.is_inference() for each in given):
            raise FlowError(f"{self._here()} runs in inference mode, which cannot be followed: use torch.no_grad instead")
        stale = next((self.stale[each] for each in given if each in self.stale), None)
        inputs = tuple(self.index_of[each] for each in given if each in self.index_of)
        call = Call(func, *cast(tuple[tuple[object, ...], Mapping[str, object]], replace_in((args, kwargs), self._symbol)))
        versions = [each._version for each in given]
        result = func(*args, **kwargs)
        changed = [each for each, version in zip(given, versions, strict=True) if each._version != version]
        if func == Tensor.data.__set__:  # type: ignore[attr-defined]
            changed = given[:1]
        if self._keep(op_name(func), call, inputs, result, changed) and stale is not None:
            raise FlowError(
                f"{self._here()} reads a tensor that {stale} changed in place through a view of it: this cannot be followed; "
                "use the out-of-place form there"
            )
        return result

    def _keep(self, op: str, call: Call, inputs: tuple[int, ...], result: object, changed: list[Tensor]) -> bool:
        """Record what a call made or changed; False where it did neither."""
        before = len(self.nodes)
        results = list(tensors_in(result))
        if isinstance(result, Tensor):
            if result not in self.index_of or any(each is result for each in changed):
                self._add(op, call, inputs, result)  # else it handed its argument back: dropout in eval mode, say
        elif results:
            parent = self._add(op, call, inputs, result)
            for place, each in enumerate(results):
                self._add("item", Call(_item, (Ref(parent), place), {}), (parent,), each)
        elif op in _ESCAPES and result is not None:
            self._add("escape", None, inputs, None)
        for each in changed:
            if all(each is not other for other in results):
                self._add(op, None, inputs, each)
            self._spoil(each, op)
        return len(self.nodes) > before

    def _spoil(self, tensor: Tensor, op: str) -> None:
        """Other live tensors that overlap one that was changed in place no longer hold what was recorded for them."""
        spoiled = [each for each in list(self.index_of.keys()) if each is not tensor and _overlap(each, tensor)]
        if spoiled:
            place = f"the operation {op!r} in {self._here()}"
            for each in spoiled:
                self.stale[each] = place

    def _here(self) -> str:
        return _place(self.module) + _line(traceback.extract_stack())

    def _symbol(self, value: object) -> object:
        if isinstance(value, Tensor):
            if value in self.index_of:
                return Ref(self.index_of[value])
            if id(value) in self.names:
                return Name(self.names[id(value)])
        return value


def _item(values: object, place: int) -> Tensor:
    """The tensor at ``place`` among those in ``values``: what an ``item`` node repeats."""
    return list(tensors_in(values))[place]


def op_name(function: Callable[..., object]) -> str:
    """What :class:`Node` calls the operation of a torch function."""
    parts = (resolve_name(function) or getattr(function, "__name__", "unknown")).split(".")
    if parts[-1] == "__get__":  # a property such as Tensor.T
        parts.pop()
    plain = parts[-1].strip("_")
    return _SAME.get(plain, plain)


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have memory in common."""
    if any(each.layout != torch.strided or each.numel() == 0 for each in (one, other)):
        return False
    storage = one.untyped_storage()
    if storage.data_ptr() != other.untyped_storage().data_ptr():
        return False
    if one.dtype != other.dtype:
        return True
    marks = torch.zeros(storage.nbytes() // one.element_size(), dtype=torch.bool)
    marks.as_strided(one.shape, one.stride(), one.storage_offset()).fill_(True)
    return bool(marks.as_strided(other.shape, other.stride(), other.storage_offset()).any())


def _line(frames: Iterable[traceback.FrameSummary]) -> str:
    """Where in the network's own code the innermost of ``frames`` stands."""
    found, torch_itself = "", str(Path(torch.__file__).parent)
    for frame in frames:
        if frame.filename == __file__:
            found = "" if frame.name == record.__name__ else found
        elif not frame.filename.startswith(torch_itself):
            found = f" ({frame.filename}:{frame.lineno})"
    return found


def _place(name: str) -> str:
    return f"module {name!r}" if name else "the network's own forward"
