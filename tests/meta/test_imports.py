"""Imports point down only, and the declarative half needs no tensors."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.source import ROOT, imports, module_level, python_files, tree

ALLOWED_IN_PLUGINS = (
    "kava_core.hookimpl",
    "kava_core.config",
    "kava_core.errors",
    "kava_core.protocols",
    "kava_core.kv.maths",
)
TENSORS = {"torch", "transformers", "jaxtyping", "numpy", "einops", "accelerate", "safetensors", "tokenizers"}
DECLARATIVE = [
    *(
        f"kava_core/{name}.py"
        for name in [
            *("__init__", "config", "console", "declarations", "errors", "hookspecs", "json_files"),
            *("moved", "paths", "processes", "registry", "shapecheck", "versions"),
        ]
    ),
    "kava_core/specfile",
    "kava_core/cli",
    "kava_core/experiment/slurm",
    "kava_core/runs",
    *(
        f"kava_plugins/{folder.name}/__init__.py"
        for folder in (ROOT / "kava_plugins").iterdir()
        if folder.is_dir()
    ),
]


def within(name: str, module: str) -> bool:
    """Whether ``name`` is the module or something in it."""
    return name == module or name.startswith(module + ".")


def named(files: list[Path]) -> list[tuple[str, str]]:
    """``file:line`` and imported name of every import."""
    return [(f"{file}:{line}", name) for file in files for name, line in imports(tree(file))]


def test_the_core_never_imports_plugins() -> None:
    wrong = [(at, name) for at, name in named(python_files("kava_core")) if within(name, "kava_plugins")]
    assert wrong == []


@pytest.mark.parametrize(
    "kind", sorted(f.name for f in (ROOT / "kava_plugins").iterdir() if (f / "__init__.py").exists())
)
def test_plugins_import_the_contract_and_their_own_kind(kind: str) -> None:
    own = f"kava_plugins.{kind}"
    ours = [
        (at, name)
        for at, name in named(python_files(f"kava_plugins/{kind}"))
        if within(name, "kava_core") or within(name, "kava_plugins")
    ]
    assert ours, "no import at all: the test looks at nothing"
    wrong = [
        (at, name)
        for at, name in ours
        if not any(within(name, module) for module in (*ALLOWED_IN_PLUGINS, own))
    ]
    assert wrong == []


def test_plugins_do_not_import_one_another_through_their_parent() -> None:
    assert [name for _, name in named([Path("kava_plugins/__init__.py")])] == []


@pytest.mark.parametrize("file", [*map(str, python_files(*DECLARATIVE))])
def test_declarative_half_imports_no_tensors(file: str) -> None:
    found = (name for statement in module_level(tree(Path(file))) for name, _ in imports(_shallow(statement)))
    assert [name for name in found if name.partition(".")[0] in TENSORS] == []


def _shallow(statement: ast.stmt) -> ast.AST:
    """Only the statement itself where it is an import; ``module_level`` brings the nested ones."""
    return statement if isinstance(statement, ast.Import | ast.ImportFrom) else ast.Pass()


def test_help_registry_and_spec_load_no_torch() -> None:
    """The same at run time: what is imported indirectly counts as well."""
    code = (
        "import sys; import kava_core.cli.app, kava_core.specfile.load;"
        "from kava_core.registry import Registry;"
        "from kava_core.specfile.bind import bind_spec_model; r = Registry.build(); bind_spec_model(r);"
        f"print(sorted({TENSORS} & set(sys.modules)), [str(f) for f in r.failures], len(r.table()) > 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"KAVA_SHAPE_CHECK": "0"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == "[] [] True", done.stderr
