"""The house rules hold, and each of them is shown to fail on something bad and to let something good pass."""

import socket
from collections.abc import Iterable
from pathlib import PurePosixPath

import pytest
import sklearn.datasets
import torch.utils.data

from datafree.method import methods
from house_rules import (
    CODE_FOLDERS,
    CODE_RULES,
    PACKAGE_RULES,
    ROOT,
    File,
    Rule,
    annotations,
    broad_except,
    code_files,
    docstrings,
    file_name,
    file_size,
    function_size,
    import_direction,
    mutable_state,
    no_kwargs,
    no_places,
    no_print,
    randomness,
    safe_loading,
    text_files,
)

# Each rule with a path and a source that it must find fault with; sources are written on one line, "|" ends a line.
BAD: tuple[tuple[Rule, str, str], ...] = (
    (file_size, "datafree/fit.py", "x = 1|" * 401),
    (file_size, "datafree/methods/mine.py", "x = 1|" * 201),
    (file_name, "datafree/graph/utils.py", ""),
    (file_name, "tests/_helpers.py", ""),
    (function_size, "datafree/fit.py", "def f():|" + "    x = 1|" * 71),
    (function_size, "datafree/fit.py", "def f(a, b, c, d, /, e, f, *, g, h, i): ..."),
    (docstrings, "datafree/fit.py", "x = 1"),
    (docstrings, "datafree/fit.py", "'''File.'''|class A: ..."),
    (docstrings, "datafree/fit.py", "'''File.'''|def f(): ..."),
    (docstrings, "datafree/fit.py", "'''File.'''|class A:|    '''Class.'''|    def f(self): ..."),
    (annotations, "datafree/fit.py", "def f(a) -> int: ..."),
    (annotations, "datafree/fit.py", "def f(a: int): ..."),
    (annotations, "datafree/fit.py", "def f(a: dict[str, Any]) -> int: ..."),
    (annotations, "datafree/fit.py", "class A:|    def f(self) -> typing.Any: ..."),
    (no_kwargs, "datafree/fit.py", "def f(**options: int) -> int: ..."),
    (import_direction, "datafree/graph/flow.py", "from datafree.quant.grid import fake"),
    (import_direction, "datafree/graph/flow.py", "def f():|    import datafree.api"),
    (import_direction, "datafree/closed/moments.py", "from ..methods import dfmpc"),
    (import_direction, "datafree/export/pack.py", "from datafree import measure"),
    (import_direction, "datafree/export/pack.py", "from datafree.closed.moments import x"),
    (import_direction, "datafree/networks.py", "from datafree.methods.rtn import Rtn"),
    (import_direction, "datafree/methods/mine.py", "from datafree import quantize"),
    (import_direction, "datafree/plan.py", "from .graph import flow"),
    (import_direction, "datafree/elsewhere.py", ""),
    (mutable_state, "datafree/fit.py", "_table = {}"),
    (mutable_state, "datafree/fit.py", "SEEN: list[int] = []"),
    (mutable_state, "datafree/fit.py", "SEEN = ('a', ['b'])"),
    (mutable_state, "datafree/fit.py", "seen = collections.defaultdict(int)"),
    (mutable_state, "datafree/fit.py", "class A:|    seen = set()"),
    (mutable_state, "datafree/fit.py", "def f():|    global x|    x = 1"),
    (mutable_state, "datafree/fit.py", "@lru_cache(1)|def f(): ..."),
    (broad_except, "datafree/fit.py", "try: f()|except: g()"),
    (broad_except, "datafree/fit.py", "try: f()|except (ValueError, Exception): g()"),
    (safe_loading, "datafree/fit.py", "pickle.loads(content)"),
    (safe_loading, "datafree/fit.py", "from torch import load"),
    (safe_loading, "datafree/fit.py", "torch.load(path)"),
    (safe_loading, "datafree/fit.py", "torch.load(path, weights_only=False)"),
    (safe_loading, "datafree/fit.py", "np.load(path, allow_pickle=True)"),
    (no_print, "datafree/fit.py", "print(1)"),
    (randomness, "datafree/fit.py", "torch.manual_seed(0)"),
    (randomness, "datafree/fit.py", "torch.randn(3)"),
    (randomness, "datafree/fit.py", "np.random.rand(3)"),
    (no_places, "README.md", "see /" + "work/main"),
    (no_places, "README.md", "see '/" + "tmp/x'"),
    (no_places, "Makefile", "pip install --index" + "-url x"),
)

# And what they must let pass.
GOOD: tuple[tuple[Rule, str, str], ...] = (
    (file_size, "datafree/fit.py", "x = 1|" * 400),
    (function_size, "datafree/fit.py", "class A:|    def f(self, a, b, c, d, e, f, g, h): ..."),
    (docstrings, "datafree/fit.py", "'''File.'''|class A:|    '''Class.'''|    def forward(self): ...|    def _f(self): ..."),
    (annotations, "datafree/fit.py", "def f(a: object, *b: int) -> None:|    c: Any = a|def _g(a): ..."),
    (import_direction, "datafree/api.py", "import torch|from datafree.methods import dfmpc|from .export import pack"),
    (import_direction, "datafree/methods/mine.py", "from datafree.closed.moments import x|from ..context import Ctx"),
    (import_direction, "datafree/bits/cost.py", "from datafree.export.pack import packed_size"),
    (mutable_state, "datafree/method.py", "_table: dict[str, int] = {}"),
    (mutable_state, "datafree/fit.py", "A = A - {1}|B = MappingProxyType({})|S = QSpec(8)|def f():|    x = []"),
    (mutable_state, "datafree/fit.py", "class A:|    x: int = field(default=1)|    y: float = option(1.0, 'help')"),
    (broad_except, "datafree/fit.py", "try: f()|except (ValueError, KeyError): g()"),
    (safe_loading, "datafree/fit.py", "import pickle|torch.load(path, weights_only=True)|np.load(path, allow_pickle=False)"),
    (no_print, "datafree/cli.py", "print(1)"),
    (randomness, "datafree/fit.py", "torch.randn(3, generator=ctx.generator)|torch.Generator().manual_seed(0)"),
    (no_places, "README.md", "../shared/data, a/work/b, $HOME/tmp/x, framework"),
)


def findings(rule: Rule, files: list[File]) -> list[str]:
    return [f"{file.path}:{finding}" for file in files for finding in rule(file)]


def names(rules: Iterable[Rule]) -> list[str]:
    return [rule.__name__ for rule in rules]


@pytest.mark.parametrize("rule", PACKAGE_RULES, ids=names(PACKAGE_RULES))
def test_package_keeps(rule: Rule) -> None:
    found = findings(rule, code_files("datafree"))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("rule", CODE_RULES, ids=names(CODE_RULES))
def test_all_code_keeps(rule: Rule) -> None:
    found = findings(rule, code_files(*CODE_FOLDERS))
    assert not found, "\n".join(found)


def test_no_text_names_a_machine_or_an_index() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: which files belong to the project is not known")
    found = findings(no_places, text_files())
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("rule", "path", "source"), BAD, ids=names(case[0] for case in BAD))
def test_rule_can_fail(rule: Rule, path: str, source: str) -> None:
    assert findings(rule, [File(path, source.replace("|", "\n"))])


@pytest.mark.parametrize(("rule", "path", "source"), GOOD, ids=names(case[0] for case in GOOD))
def test_rule_lets_pass(rule: Rule, path: str, source: str) -> None:
    assert not findings(rule, [File(path, source.replace("|", "\n"))])


def one_method_a_file(files: list[str], modules: list[str]) -> list[str]:
    """What differs between the files of ``datafree/methods`` and the modules of the classes found by scanning it."""
    stems = (PurePosixPath(file).stem for file in files)
    expected = [f"datafree.methods.{stem}" for stem in stems if stem != "__init__"]
    return [
        f"{each}: {modules.count(each)} methods" for each in sorted({*expected, *modules}) if modules.count(each) != expected.count(each)
    ]


def test_every_method_file_holds_one_method() -> None:
    found = one_method_a_file([file.path for file in code_files("datafree/methods")], [each.__module__ for each in methods().values()])
    assert not found, "\n".join(found)


def test_a_method_file_without_a_method_is_found() -> None:
    assert one_method_a_file(["a/__init__.py", "a/x.py"], ["datafree.methods.x"]) == []
    assert one_method_a_file(["a/x.py", "a/y.py"], ["datafree.methods.x"]) == ["datafree.methods.y: 0 methods"]
    assert one_method_a_file(["a/x.py"], ["datafree.methods.x"] * 2) == ["datafree.methods.x: 2 methods"]


def test_data_and_network_are_out_of_reach() -> None:
    with socket.socket() as line:
        attempts = (
            lambda: line.connect(("localhost", 9)),
            lambda: socket.create_connection(("localhost", 9)),
            lambda: torch.utils.data.DataLoader([1]),
            lambda: sklearn.datasets.load_digits(),
        )
        for attempt in attempts:
            with pytest.raises(pytest.fail.Exception, match="without data"):
                attempt()
