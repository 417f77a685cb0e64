"""The rules of the house that a machine can check: each is a function from one file to its findings."""

import ast
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[1]
CODE_FOLDERS = ("datafree", "tests", "tests_zoo", "benchmarks", "examples")
Function = ast.FunctionDef | ast.AsyncFunctionDef

BASE = ("errors", "outputs", "user_code", "plan", "context", "task", "method", "fit", "parallel")
CHAIN = ("graph", "quant", "closed", "bits", "synth", "tune", "methods")  # each may import those before it
BESIDE = ("export", "measure", "report")  # these import graph, quant and each other in this order
MAY_IMPORT: dict[str, set[str]] = {
    **{name: set(BASE) for name in BASE},
    **{name: {*BASE, *CHAIN[: i + 1]} for i, name in enumerate(CHAIN)},
    **{name: {*BASE, "graph", "quant", *BESIDE[: i + 1]} for i, name in enumerate(BESIDE)},
    **dict.fromkeys(("networks", "zoo"), {*BASE, "graph", "quant", *BESIDE, "networks", "zoo"}),
    "checks": {*BASE, "graph", "quant", "bits"},
    "input_check": {*BASE, *CHAIN},
    "result": {*BASE, "graph", "quant", *BESIDE},
    "api": {*BASE, *CHAIN, *BESIDE, "networks", "checks", "input_check", "result", "zoo", "__init__"},  # for its version
    "show": {*BASE, *CHAIN, *BESIDE, "networks", "zoo", "result", "__init__"},
    "planning": {*BASE, *CHAIN, *BESIDE, "networks", "checks", "api"},
    "cli_flags": {*BASE, "networks"},
    "cli_export": {*BASE, *CHAIN, *BESIDE, "networks", "zoo", "api", "result", "show", "__init__"},
    "cli_search": {*BASE, *CHAIN, *BESIDE, "networks", "result", "show", "planning", "cli_flags"},
    "cli_report": {*BASE, *CHAIN, *BESIDE, "networks", "zoo", "result", "show", "cli_export", "__init__"},
    "cli": {
        *BASE,
        *CHAIN,
        *BESIDE,
        "networks",
        "checks",
        "zoo",
        "api",
        "input_check",
        "result",
        "show",
        "cli_flags",
        "cli_export",
        "cli_report",
        "cli_search",
        "__init__",
    },
    "__main__": {"cli"},
    "__init__": {*BASE, *CHAIN, *BESIDE, "networks", "zoo", "api", "result", "planning"},
}

EXCEPTIONS = (("datafree/bits/cost.py", "export"),)  # it counts the bytes that packing takes
METHOD_TABLE = ("datafree/method.py", "_table")  # the one exception from the rule on state
EMPTY_NAMES = ("utils", "helpers", "common", "misc")
FUNCTION_LINES = 70  # about 60
IMMUTABLE_MAKERS = frozenset(
    "TypeVar ParamSpec NewType MappingProxyType tuple frozenset range get_args Path compile len max min sum device".split()
)
UNSAFE = ("pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")
LOADERS = ("load", "loads", "Unpickler", "open")
DRAWS = frozenset("rand randn rand_like randn_like randint randperm bernoulli multinomial normal".split())


@dataclass(frozen=True)
class File:
    """One Python file: where it is, relative to the root and with slashes, and what is in it."""

    path: str
    source: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)

    @property
    def top(self) -> str:
        """Which part of the package it belongs to: a folder or a single module."""
        return PurePosixPath(self.path).parts[1].removesuffix(".py")


Rule = Callable[[File], Iterator[str]]


def code_files(*folders: str) -> list[File]:
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return [File(path.relative_to(ROOT).as_posix(), path.read_text()) for path in paths]


def text_files() -> list[File]:
    """Every text file that git tracks or would track."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True, text=True)
    contents = ((name, ROOT / name) for name in sorted(listed.stdout.split("\0")) if name)
    raw = ((name, path.read_bytes()) for name, path in contents if path.is_file())
    return [File(name, content.decode(errors="replace")) for name, content in raw if b"\0" not in content]


def public_functions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, Function]]:
    """Functions and methods that a user may call, with their full names; dunders other than __init__ and __call__ are left out."""
    for node in body:
        if isinstance(node, Function) and (not node.name.startswith("_") or node.name in ("__init__", "__call__")):
            yield prefix + node.name, node
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body, f"{prefix}{node.name}.")


def called(node: ast.AST) -> str:
    """The last part of a called or referenced name: ``load`` of ``torch.load``."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def all_arguments(node: Function) -> list[ast.arg]:
    found = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return [each for each in found if each.arg not in ("self", "cls")]


# ---------------------------------------------------------------- the rules


def file_size(file: File) -> Iterator[str]:
    limit = 200 if file.path.startswith("datafree/methods/") else 400
    lines = len(file.source.splitlines())
    if lines > limit:
        yield f"{lines} lines, the limit is {limit}: split it by what it is about"


def file_name(file: File) -> Iterator[str]:
    if PurePosixPath(file.path).stem.strip("_") in EMPTY_NAMES:
        yield "the name says nothing: name it after what is in it"


def function_size(file: File) -> Iterator[str]:
    for node in ast.walk(file.tree):
        if not isinstance(node, Function):
            continue
        lines, parameters = (node.end_lineno or 0) - node.lineno + 1, len(all_arguments(node))
        if lines > FUNCTION_LINES:
            yield f"{node.lineno}: {node.name} has {lines} lines, about 60 is the limit: split it"
        if parameters > 8 and "reference" not in file.path:  # a formula takes all its symbols
            yield f"{node.lineno}: {node.name} takes {parameters} parameters, the limit is 8: group them in a frozen dataclass"


def docstrings(file: File) -> Iterator[str]:
    if not ast.get_docstring(file.tree):
        yield "1: the file has no docstring"
    for node in file.tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node):
            yield f"{node.lineno}: class {node.name} has no docstring"
    for name, node in public_functions(file.tree.body):
        overrides = node.name in ("forward", "backward", "extra_repr") or any(called(each) == "override" for each in node.decorator_list)
        if not overrides and not node.name.startswith("__") and not ast.get_docstring(node):
            yield f"{node.lineno}: {name} has no docstring"


def annotations(file: File) -> Iterator[str]:
    for name, node in public_functions(file.tree.body):
        arguments = [*all_arguments(node), *filter(None, (node.args.vararg, node.args.kwarg))]
        for argument in arguments:
            if argument.annotation is None:
                yield f"{node.lineno}: {name}: {argument.arg} has no annotation"
        if node.returns is None:
            yield f"{node.lineno}: {name} has no return annotation"
        for annotation in filter(None, (node.returns, *(argument.annotation for argument in arguments))):
            if re.search(r"\bAny\b", ast.unparse(annotation)):
                yield f"{node.lineno}: {name} has Any in its signature: say what it takes, or object"


def no_kwargs(file: File) -> Iterator[str]:
    for name, node in public_functions(file.tree.body):
        if node.args.kwarg is not None:
            yield f"{node.lineno}: {name} takes **{node.args.kwarg.arg}: name the parameters"


def imported(file: File) -> Iterator[tuple[int, str]]:
    """Line and part of the package, for every import of the package, wherever in the file it stands."""
    here = PurePosixPath(file.path).parent.parts
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(here[: len(here) + 1 - node.level]) if node.level else ""
            module = ".".join(filter(None, (above, node.module)))
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for parts in (name.split(".") for name in names):
            if parts[0] == "datafree":
                yield node.lineno, parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else "__init__"


def import_direction(file: File) -> Iterator[str]:
    if file.top not in MAY_IMPORT:
        yield f"{file.top} has no place in the import order: DESIGN section 2"
        return
    for line, part in imported(file):
        if part not in (file.top, *MAY_IMPORT[file.top]) and (file.path, part) not in EXCEPTIONS:
            yield f"{line}: {file.top} must not import {part}: graph -> quant -> closed, bits -> synth, tune -> methods -> api -> cli"


def mutable_state(file: File) -> Iterator[str]:
    for line, name in mutable_names(file.tree.body, in_class=False):
        if name != "__all__" and (file.path, name) != METHOD_TABLE:
            yield f"{line}: {name} can change: use a tuple, frozenset or MappingProxyType, or make it inside a function"
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Global):
            yield f"{node.lineno}: global {', '.join(node.names)}: no state at module level"
        for decorator in node.decorator_list if isinstance(node, Function) else ():
            if called(decorator.func if isinstance(decorator, ast.Call) else decorator) in ("cache", "lru_cache"):
                yield f"{decorator.lineno}: a cache is state at module level: hand the value on"


def mutable_names(body: list[ast.stmt], in_class: bool) -> Iterator[tuple[int, str]]:
    for node in body:
        if isinstance(node, ast.ClassDef | ast.If | ast.Try):
            yield from mutable_names(node.body, in_class or isinstance(node, ast.ClassDef))
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None and not immutable(node.value, in_class):
            yield node.lineno, ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)


def immutable(value: ast.expr, in_class: bool) -> bool:
    """Whether a value at module level, or of a class attribute, is one that cannot change."""
    if isinstance(value, ast.Dict | ast.List | ast.Set | ast.DictComp | ast.ListComp | ast.SetComp | ast.GeneratorExp):
        return False
    if isinstance(value, ast.BinOp):  # the left side decides the kind: frozenset | {1} is a frozenset
        return immutable(value.left, in_class) and (isinstance(value.right, ast.Set) or immutable(value.right, in_class))
    if isinstance(value, ast.Tuple | ast.Starred):
        return all(immutable(each, in_class) for each in ast.iter_child_nodes(value) if isinstance(each, ast.expr))
    if isinstance(value, ast.Call):
        return called(value.func) in (IMMUTABLE_MAKERS | FROZEN | ({"field", "option"} if in_class else set()))
    return True


def frozen_classes(files: list[File]) -> frozenset[str]:
    """Names of the package's frozen dataclasses, whose values may stand at module level."""
    classes = (node for file in files for node in file.tree.body if isinstance(node, ast.ClassDef))
    return frozenset(node.name for node in classes if any("frozen=True" in ast.unparse(each) for each in node.decorator_list))


def broad_except(file: File) -> Iterator[str]:
    for node in ast.walk(file.tree):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            if any(each is None or called(each) in ("Exception", "BaseException") for each in caught):
                yield f"{node.lineno}: catches everything: catch what you mean, let the rest through"


def safe_loading(file: File) -> Iterator[str]:
    for node in ast.walk(file.tree):
        if isinstance(node, ast.ImportFrom) and node.module in (*UNSAFE, "torch") and any(each.name in LOADERS for each in node.names):
            yield f"{node.lineno}: {ast.unparse(node)}: reading must not run code; use safetensors"
        if not isinstance(node, ast.Call):
            continue
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        module, _, name = ast.unparse(node.func).rpartition(".")
        if module == "torch" and name == "load" and given.get("weights_only") != "True":
            yield f"{node.lineno}: torch.load needs weights_only=True"
        if (module in UNSAFE and name in LOADERS) or given.get("allow_pickle", "False") != "False":
            yield f"{node.lineno}: {ast.unparse(node)}: reading must not run code; use safetensors"


def no_print(file: File) -> Iterator[str]:
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print" and file.top != "cli":
            yield f"{node.lineno}: print: emit an Event, the command line shows it"


def randomness(file: File) -> Iterator[str]:
    for node in ast.walk(file.tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if re.fullmatch(r"(np|numpy)\.random\..*|random\.\w+|torch\.manual_seed", name):
            yield f"{node.lineno}: {name}: draw from the generator of Ctx"
        if name.startswith("torch.") and called(node.func) in DRAWS and "generator" not in {keyword.arg for keyword in node.keywords}:
            yield f"{node.lineno}: {name} without generator=: draw from the generator of Ctx"


MACHINE = re.compile(r"(?<![\w.\-/}])/(?:work|root)\b|(?<![\w.\-/}])/t[m]p/")
HOSTS = re.compile(
    "|".join((r"pypi\.(?:python\.)?org", r"python[h]osted\.org", r"download\.pytorch\.org", r"anaconda\.org", r"--(?:extra-)?index[-]url"))
)


def no_places(file: File) -> Iterator[str]:
    for number, line in enumerate(file.source.splitlines(), 1):
        for found in (*MACHINE.finditer(line), *HOSTS.finditer(line)):
            yield f"{number}: {found.group()} is a place of one machine or of a package index: leave it out"


PACKAGE_RULES: tuple[Rule, ...] = (
    docstrings, annotations, no_kwargs, import_direction, mutable_state, broad_except, safe_loading, no_print, randomness
)  # fmt: skip
CODE_RULES: tuple[Rule, ...] = (file_size, file_name, function_size)
FROZEN = frozen_classes(code_files("datafree"))
