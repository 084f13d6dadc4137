"""Nothing in the core may differ between two runs: no clock, no chance, no order that depends on hashes.

A reader of the syntax tree, not of the types: it knows names bound to sets in the same module, not sets that come from
elsewhere. What it cannot see, the digest tests do.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = sorted((ROOT / "arbl2").rglob("*.py"))

BANNED_MODULES = {"time", "random", "uuid", "secrets"}
BANNED_NAMES = {
    "datetime.datetime.now": "reads the clock",
    "datetime.datetime.utcnow": "reads the clock",
    "datetime.datetime.today": "reads the clock",
    "datetime.date.today": "reads the clock",
    "os.urandom": "is chance",
    "os.getrandom": "is chance",
    "numpy.random": "is chance",
    "numpy.datetime64": "reads the clock when it is given 'now'",
}
ENVIRONMENT = {"os.environ", "os.environb", "os.getenv"}
BANNED_CALLS = {"hash": "differs between processes", "id": "differs between processes"}
ORDER_TAKERS = {"list", "tuple", "enumerate", "zip", "map", "filter", "iter", "next", "reversed", "sum", "dict"}
ORDER_FREE = {"sorted", "set", "frozenset", "any", "all", "min", "max", "len"}


def _names_a_set(annotation: ast.expr) -> bool:
    return ast.unparse(annotation).partition("[")[0] in {"set", "frozenset", "AbstractSet"}


class _Lint(ast.NodeVisitor):
    def __init__(self, tree: ast.Module, *, may_read_environment: bool) -> None:
        self.may_read_environment = may_read_environment
        self.found: list[str] = []
        self.aliases: dict[str, str] = {}
        self.sets: set[str] = set()
        self.order_free: set[ast.AST] = set()
        self._learn(tree)
        self.visit(tree)

    def _learn(self, tree: ast.Module) -> None:
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    name = alias.name if alias.asname else alias.name.partition(".")[0]
                    self.aliases[alias.asname or name] = name
            elif isinstance(node, ast.ImportFrom) and not node.level:
                for alias in node.names:
                    self.aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
            elif isinstance(node, ast.Assign) and self._is_set(node.value):
                self.sets |= {ast.unparse(target) for target in node.targets}
            elif isinstance(node, ast.AnnAssign) and (
                _names_a_set(node.annotation) or (node.value is not None and self._is_set(node.value))
            ):
                self.sets.add(ast.unparse(node.target))
            elif isinstance(node, ast.arg) and node.annotation is not None and _names_a_set(node.annotation):
                self.sets.add(node.arg)

    def _is_set(self, node: ast.expr) -> bool:
        match node:
            case ast.Set() | ast.SetComp():
                return True
            case ast.Call(func=ast.Name(id="set" | "frozenset")):
                return True
            case ast.BinOp(op=ast.BitOr() | ast.BitAnd() | ast.Sub() | ast.BitXor()):
                return self._is_set(node.left) or self._is_set(node.right)
            case ast.Name() | ast.Attribute():
                return ast.unparse(node) in self.sets
        return False

    def _say(self, node: ast.AST, what: str) -> None:
        self.found.append(f"line {getattr(node, 'lineno', 0)}: {what}")

    def _full_name(self, node: ast.AST) -> str:
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            return ""
        return ".".join([self.aliases.get(node.id, node.id), *reversed(parts)])

    def _judge(self, node: ast.AST, name: str) -> None:
        if name in BANNED_NAMES:
            self._say(node, f"{name} {BANNED_NAMES[name]}")
        elif name in ENVIRONMENT and not self.may_read_environment:
            self._say(node, f"{name} differs between machines; the command line reads the environment")

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.partition(".")[0] in BANNED_MODULES or alias.name == "numpy.random":
                self._say(node, f"{alias.name} is a clock or chance")

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if not node.level and (node.module or "").partition(".")[0] in BANNED_MODULES | {"numpy.random"}:
            self._say(node, f"{node.module} is a clock or chance")
        for alias in node.names:
            name = f"{node.module}.{alias.name}"
            if (node.module or "") == "numpy.random" or name in BANNED_NAMES | dict.fromkeys(ENVIRONMENT, ""):
                self._judge(node, "numpy.random" if node.module == "numpy.random" else name)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._judge(node, self._full_name(node))
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load) and node.id in BANNED_CALLS:
            self._say(node, f"{node.id}() {BANNED_CALLS[node.id]}")

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name in ORDER_FREE:
            self.order_free |= set(node.args)
        joins = isinstance(node.func, ast.Attribute) and node.func.attr in {"join", "extend", "fromkeys"}
        if (name in ORDER_TAKERS or joins) and any(self._is_set(arg) for arg in node.args):
            self._say(node, "takes the elements of a set in the order of their hashes; sort them first")
        if isinstance(node.func, ast.Attribute) and node.func.attr == "pop" and self._is_set(node.func.value):
            self._say(node, "takes an arbitrary element of a set")
        self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        self._iterates(node, node.iter)
        self.generic_visit(node)

    visit_AsyncFor = visit_For  # type: ignore[assignment]

    def visit_Starred(self, node: ast.Starred) -> None:
        self._iterates(node, node.value)
        self.generic_visit(node)

    def _comprehension(self, node: ast.ListComp | ast.DictComp | ast.GeneratorExp) -> None:
        if node not in self.order_free:
            for part in node.generators:
                self._iterates(node, part.iter)
        self.generic_visit(node)

    visit_ListComp = visit_DictComp = visit_GeneratorExp = _comprehension

    def _iterates(self, node: ast.AST, iterated: ast.expr) -> None:
        if self._is_set(iterated):
            self._say(node, "goes through a set in the order of its hashes; sort it first")


def findings(source: str, *, may_read_environment: bool = False) -> list[str]:
    """What in this source could differ between two runs."""
    return _Lint(ast.parse(source), may_read_environment=may_read_environment).found


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_core_has_no_clock_no_chance_and_no_hash_order(path: Path) -> None:
    found = findings(path.read_text(encoding="utf-8"), may_read_environment=path.name == "cli.py")
    assert found == []


def test_the_core_was_found() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in CORE}
    assert {"arbl2/tape.py", "arbl2/rules.py", "arbl2/providers/upbit.py"} <= names


PLANTED = [
    "import time",
    "import time as clock",
    "from time import monotonic_ns",
    "def f():\n    import random",
    "from random import Random",
    "import uuid",
    "from secrets import token_hex",
    "import datetime\ndatetime.datetime.now()",
    "import datetime as dt\ndt.datetime.utcnow()",
    "from datetime import datetime\ndatetime.now(tz=None)",
    "from datetime import datetime as when\nwhen.today()",
    "from datetime import date\ndate.today()",
    "import os\nos.urandom(8)",
    "from os import urandom",
    "import numpy as np\nnp.random.default_rng(1)",
    "import numpy\nnumpy.random.rand()",
    "import numpy.random",
    "from numpy import random",
    "from numpy.random import default_rng",
    "import os\nos.environ['A']",
    "from os import environ",
    "import os\nos.getenv('A')",
    "key = hash('a')",
    "key = id(object())",
    "xs = sorted(ys, key=id)",
    "for x in {1, 2}:\n    pass",
    "for x in set(xs):\n    pass",
    "for x in set(xs) - {1}:\n    pass",
    "for i, x in enumerate(frozenset(xs)):\n    pass",
    "ys = [x for x in {f(x) for x in xs}]",
    "ys = {x: 1 for x in set(xs)}",
    "ys = sum(x for x in set(xs))",
    "ys = sum({0.1, 0.2})",
    "ys = list(set(xs))",
    "ys = ','.join({'a', 'b'})",
    "ys = [*{1, 2}]",
    "names = {'a', 'b'}\nfor name in names:\n    pass",
    "names: frozenset[str] = make()\nys = tuple(names)",
    "def f(names: set[str]):\n    return [n for n in names]",
    "class A:\n    def f(self):\n        self.names = set()\n        return list(self.names)",
    "names = set(xs)\nfirst = names.pop()",
]


@pytest.mark.parametrize("source", PLANTED)
def test_a_planted_violation_is_found(source: str) -> None:
    assert findings(source) != []


ALLOWED = [
    "for x in sorted({1, 2}):\n    pass",
    "ok = x in {1, 2}",
    "names = {'a'}\nok = any(n == 'b' for n in names)\nn = len(names)\nbig = max(names)",
    "ys = sorted(x for x in {1, 2})",
    "ys = {f(x) for x in {1, 2}}",
    "for k, v in {'a': 1}.items():\n    pass",
    "from datetime import date, datetime, UTC\ndatetime.fromtimestamp(0, UTC)\ndate.fromordinal(1)",
    "import os\nos.fsync(1)\nos.path.join('a', 'b')",
    "order.id = 5\nself.hash()\nnow = book.time",
    "import numpy as np\nnp.zeros(3)",
]


@pytest.mark.parametrize("source", ALLOWED)
def test_what_is_the_same_every_time_is_no_violation(source: str) -> None:
    assert findings(source) == []


def test_only_the_command_line_reads_the_environment() -> None:
    assert findings("import os\nos.environ['A']", may_read_environment=True) == []
