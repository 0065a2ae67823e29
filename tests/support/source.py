"""The repository's own Python files as syntax trees, for tests about the code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.support.repository import ROOT


def python_files(*places: str) -> list[Path]:
    """Files and the Python files of folders, relative to the root, sorted."""
    found: set[Path] = set()
    for place in places:
        path = ROOT / place
        found |= {path} if path.is_file() else set(path.rglob("*.py"))
    return sorted(file.relative_to(ROOT) for file in found)


@cache
def tree(file: Path) -> ast.Module:
    """A file, parsed."""
    return ast.parse((ROOT / file).read_text(encoding="utf-8"), str(file))


def imports(nodes: ast.AST) -> Iterator[tuple[str, int]]:
    """Every module imported anywhere inside, with its line.

    ``from kava_core import hookimpl`` counts as ``kava_core.hookimpl``: what is named, not where it is from.
    """
    for node in ast.walk(nodes):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def module_level(nodes: ast.AST) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported, those of classes and ``if`` included."""
    for statement in getattr(nodes, "body", []) + getattr(nodes, "orelse", []):
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef) or _typing_only(statement):
            continue
        yield statement
        yield from module_level(statement)


def _typing_only(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test)
