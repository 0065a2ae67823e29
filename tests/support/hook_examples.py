"""The worked examples in the hooks' docstrings, as packages on disk."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from kava_core import hookspecs

PRELUDE = """\
from typing import Literal
from kava_core import hookimpl
from kava_core.config import ComponentConfig, KVLossConfig

"""
"""The imports that only the first example spells out."""

FILE = re.compile(r"^# (\w+/\w+\.py)\b.*$", re.MULTILINE)


def files_of(hook: str) -> dict[str, str]:
    """Path to text of every file in a hook's example."""
    docstring = inspect.getdoc(getattr(hookspecs, hook)) or ""
    _, marker, block = docstring.partition("::\n")
    assert marker, f"{hook}: no example in its docstring"
    _, *pieces = FILE.split(inspect.cleandoc("\n" + block))
    return dict(zip(pieces[::2], pieces[1::2], strict=True))


def install(hook: str, site: Path) -> str:
    """Write the example and its entry point into a folder, as pip would; returns the package's name."""
    files = files_of(hook)
    [package] = {path.partition("/")[0] for path in files}
    for path, text in files.items():
        file = site / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text((PRELUDE if path.endswith("__init__.py") else "") + text, encoding="utf-8")
    add_distribution(site, package.replace("_", "-"), {package: package})
    return package


def add_distribution(site: Path, name: str, plugins: dict[str, str], version: str = "1.0") -> None:
    """Metadata of a distribution whose entry points in the group ``kava`` are these (name to module)."""
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8"
    )
    lines = [f"{entry} = {module}\n" for entry, module in plugins.items()]
    (folder / "entry_points.txt").write_text("[kava]\n" + "".join(lines), encoding="utf-8")
