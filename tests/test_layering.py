"""The arrows of the house, read from the imports: parts know the core, the core knows nothing above it."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = "arbl2"
PARTS = {
    "arbl2_recorder": ROOT / "recorder" / "arbl2_recorder",
    "arbl2_replay": ROOT / "replay" / "arbl2_replay",
    "arbl2_calibration": ROOT / "calibration" / "arbl2_calibration",
}
JOINERS = {"arbl2.cli", "arbl2.cli_book", "arbl2.cli_datasets", "arbl2.cli_live", "arbl2.cli_runs", "arbl2.live_feed", "arbl2"}
"""The modules that join the parts, inside functions only."""

CLI = {"arbl2.cli", "arbl2.cli_book", "arbl2.cli_datasets", "arbl2.cli_live", "arbl2.cli_runs"}
ONLY_IN = {"typer": CLI, "rich": CLI, "asyncio": {*CLI, "arbl2.live_feed"}, "pyarrow": {"arbl2.tape", "arbl2.places"}}
NEVER_IN_CORE = {"websockets", "duckdb", "polars", "socket", "ssl", "http", "urllib"}


@dataclass(frozen=True, slots=True)
class Import:
    """``module`` imports ``target``; ``late``: in a function or for the type checker only, so not on import."""

    module: str
    target: str
    late: bool
    line: int

    @property
    def top(self) -> str:
        return self.target.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.module} line {self.line} imports {self.target}"


class _Finder(ast.NodeVisitor):
    def __init__(self, module: str, package: str) -> None:
        self.module, self.package = module, package
        self.late = False
        self.found: list[Import] = []

    def _add(self, target: str, node: ast.stmt | ast.expr) -> None:
        self.found.append(Import(self.module, target, self.late, node.lineno))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name, node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = self.package.split(".")[: len(self.package.split(".")) - node.level + 1] if node.level else []
        prefix = ".".join([*base, *([node.module] if node.module else [])])
        for alias in node.names:
            self._add(f"{prefix}.{alias.name}", node)

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in {"import_module", "__import__"}:
            literal = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else "a computed name"
            self._add(str(literal), node)
        self.generic_visit(node)

    def _inside(self, node: ast.AST) -> None:
        before, self.late = self.late, True
        self.generic_visit(node)
        self.late = before

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = _inside

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            before, self.late = self.late, True
            for child in node.body:
                self.visit(child)
            self.late = before
            for child in node.orelse:
                self.visit(child)
        else:
            self.generic_visit(node)


def imports_of(source: str, module: str, *, package: str) -> list[Import]:
    finder = _Finder(module, package)
    finder.visit(ast.parse(source))
    return finder.found


def imports_below(folder: Path, package: str) -> list[Import]:
    found = []
    for path in sorted(folder.rglob("*.py")):
        parts = [package, *path.relative_to(folder).with_suffix("").parts]
        is_package = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if is_package else parts)
        found += imports_of(path.read_text(encoding="utf-8"), module, package=module if is_package else module.rpartition(".")[0])
    return found


def breaches(imports: list[Import]) -> list[str]:
    """Every import that breaks an arrow, in words."""
    found = []
    for item in imports:
        own = item.module.partition(".")[0]
        if own in PARTS:
            if item.top in PARTS and item.top != own:
                found.append(f"{item}: parts never import each other")
        elif item.top in PARTS and not (item.late and item.module in JOINERS):
            found.append(f"{item}: the core knows the parts only inside functions of arbl2/cli.py and arbl2/__init__.py")
        elif item.top in NEVER_IN_CORE:
            found.append(f"{item}: the core has no socket, no database and no data frames")
        elif item.top in ONLY_IN and item.module not in ONLY_IN[item.top]:
            found.append(f"{item}: only {', '.join(sorted(ONLY_IN[item.top]))} may")
        elif item.target == "a computed name" and item.module not in JOINERS:
            found.append(f"{item}: a computed import hides an arrow")
    return found


@pytest.mark.parametrize("package", [CORE, *PARTS])
def test_the_arrows_hold(package: str) -> None:
    imports = imports_below(PARTS.get(package, ROOT / CORE), package)
    assert any(item.target.startswith("arbl2.") for item in imports), "no import of the core was found at all"
    assert breaches(imports) == []


def test_only_the_tape_module_reads_and_writes_the_tape_format() -> None:
    users = {item.module for item in imports_below(ROOT / CORE, CORE) if item.target.startswith("pyarrow.parquet")}
    assert users == {"arbl2.tape"}


def test_datasets_is_no_package() -> None:
    assert (ROOT / "datasets").is_dir()
    assert list((ROOT / "datasets").rglob("*.py")) == []


PLANTED = [
    ("arbl2_replay.driver", "from arbl2_recorder.session import Session"),
    ("arbl2_replay.driver", "def f():\n    import arbl2_calibration"),
    ("arbl2_calibration.fit", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from arbl2_replay import x"),
    ("arbl2.engine", "import arbl2_replay"),
    ("arbl2.engine", "def f():\n    from arbl2_replay import driver"),
    ("arbl2.engine", "import importlib\nimportlib.import_module('arbl2_replay')"),
    ("arbl2.engine", "from importlib import import_module\nimport_module(name)"),
    ("arbl2.cli", "from arbl2_replay import replay"),
    ("arbl2.cli", "class A:\n    import arbl2_replay"),
    ("arbl2", "if True:\n    import arbl2_recorder"),
    ("arbl2.engine", "import typer"),
    ("arbl2.fx", "from rich.table import Table"),
    ("arbl2.engine", "import pyarrow.parquet as pq"),
    ("arbl2.providers.upbit", "from websockets.asyncio import client"),
    ("arbl2.zones", "def f():\n    import duckdb"),
    ("arbl2.zones", "import polars as pl"),
    ("arbl2.cli", "def f():\n    import duckdb"),
    ("arbl2.engine", "import asyncio"),
]


@pytest.mark.parametrize(("module", "source"), PLANTED)
def test_a_planted_breach_is_found(module: str, source: str) -> None:
    assert breaches(imports_of(source, module, package=module.rpartition(".")[0])) != []


ALLOWED = [
    ("arbl2.cli", "import typer\ndef f():\n    from arbl2_replay import replay"),
    ("arbl2", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from arbl2_replay import replay"),
    ("arbl2_replay.driver", "from arbl2.engine import Engine\nimport arbl2_replay.clock\nimport polars, websockets"),
    ("arbl2.tape", "import pyarrow as pa\nimport numpy"),
]


@pytest.mark.parametrize(("module", "source"), ALLOWED)
def test_what_the_house_allows_is_no_breach(module: str, source: str) -> None:
    assert breaches(imports_of(source, module, package=module.rpartition(".")[0])) == []


def test_relative_imports_are_resolved() -> None:
    found = imports_of("from . import base\nfrom .. import engine\nfrom ..tape import x", "arbl2.p.u", package="arbl2.p")
    assert [item.target for item in found] == ["arbl2.p.base", "arbl2.engine", "arbl2.tape.x"]
