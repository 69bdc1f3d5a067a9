"""The project's Python files, read as syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .tools import ROOT

PACKAGE = "regionspot_d2"


class Source(NamedTuple):
    """A Python file.

    Attributes:
        name: of a module of the package the dotted name inside it ("data.build", "data.__init__");
            of any other file its path from the root of the repository.
        text: what the file holds.
    """

    name: str
    text: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)


def package_modules() -> list[Source]:
    """Every module of the package."""
    folder = ROOT / PACKAGE
    return [
        Source(".".join(path.relative_to(folder).with_suffix("").parts), _read(path))
        for path in sorted(folder.rglob("*.py"))
    ]


def scripts_and_tests() -> list[Source]:
    """Every Python file outside the package."""
    paths = [*ROOT.glob("*.py"), *(p for d in ("demo", "tools", "tests") for p in _python(d))]
    return [Source(path.relative_to(ROOT).as_posix(), _read(path)) for path in sorted(paths)]


def _python(folder: str) -> Iterator[Path]:
    return (ROOT / folder).rglob("*.py")


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def imports(module: Source) -> tuple[set[str], set[str]]:
    """What a module of the package imports, anywhere but under ``TYPE_CHECKING``.

    Returns:
        Names of modules (or of packages) inside the package, and the top names of all others.
    """
    own, others = set(), set()
    parents = module.name.split(".")[:-1]
    for node in _nodes_at_run_time(module.tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = [PACKAGE, *parents[: len(parents) - node.level + 1]] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            # "from . import sam" names a module, "from .sam import SamLocalizer" does not.
            plain = base == PACKAGE or not node.module
            names = [f"{base}.{alias.name}" if plain else base for alias in node.names]
        else:
            continue
        for name in names:
            top, _, inside = name.partition(".")
            if top == PACKAGE:
                own.add(inside)
            else:
                others.add(top)
    return own, others


def _nodes_at_run_time(tree: ast.AST) -> Iterator[ast.AST]:
    yield tree
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield from _nodes_at_run_time(other)
        else:
            yield from _nodes_at_run_time(child)


def functions(module: Source) -> Iterator[tuple[str, int]]:
    """Every function with its number of lines, the docstring not counted."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node, clean=False) is not None:
                lines -= node.body[0].end_lineno - node.body[0].lineno + 1
            yield f"{module.name}.{node.name}", lines


def calls(module: Source, *names: str) -> Iterator[str]:
    """Every call of a function or method with one of these names, as it is written."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            called = node.func.id if isinstance(node.func, ast.Name) else called
            if called in names:
                yield ast.unparse(node)


def private_definitions(module: Source) -> set[str]:
    """Names with a leading underscore that a module defines: in itself, in classes, on ``self``."""
    found = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return {name for name in found if is_private(name)}


def private_uses(file: Source, private: set[str]) -> Iterator[str]:
    """Where a file outside the package reaches for a private member of it.

    Args:
        file: the file.
        private: private names of the package; one that the file defines itself is its own.
    """
    private = private - private_definitions(file)
    for node in ast.walk(file.tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
            for name in [*node.module.split("."), *(alias.name for alias in node.names)]:
                if is_private(name):
                    yield f"{file.name}:{node.lineno} imports {name}"
        elif isinstance(node, ast.Attribute) and node.attr in private:
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield f"{file.name}:{node.lineno} reads {ast.unparse(node)}"
        elif isinstance(node, ast.Call):
            yield from _patched(file, node, private)


def _patched(file: Source, call: ast.Call, private: set[str]) -> Iterator[str]:
    """``setattr(module, "_name", ...)`` and ``setattr("regionspot_d2.x._name", ...)``."""
    if ast.unparse(call.func).rpartition(".")[2] in ("setattr", "delattr", "getattr"):
        for argument in call.args[:2]:
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                parts = argument.value.split(".")
                if parts[-1] in private or (parts[0] == PACKAGE and any(map(is_private, parts))):
                    yield f"{file.name}:{call.lineno} replaces {argument.value}"


def is_private(name: str) -> bool:
    """Whether a name has a leading underscore, but is not "_" or of Python itself ("__len__")."""
    return name.startswith("_") and not name.endswith("_")
