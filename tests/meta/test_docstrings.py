"""Everything public has a docstring."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.source import python_files, tree

Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def public(node: ast.AST, path: str = "") -> Iterator[tuple[str, Documented]]:
    """Public functions, classes and their methods, not what is inside functions or private classes."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Documented) and not child.name.startswith("_") and not _overload(child):
            yield path + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from public(child, f"{path}{child.name}.")
        elif isinstance(child, ast.If | ast.Try):
            yield from public(child, path)


def _overload(node: Documented) -> bool:
    return any(ast.unparse(decorator).endswith("overload") for decorator in node.decorator_list)


@pytest.mark.parametrize("file", [*map(str, python_files("kava_core", "kava_plugins"))])
def test_public_things_have_docstrings(file: str) -> None:
    module = tree(Path(file))
    assert ast.get_docstring(module), "the module has no docstring"
    assert [name for name, node in public(module) if not ast.get_docstring(node)] == []
