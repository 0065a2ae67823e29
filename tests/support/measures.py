"""Measure how the code reads: ``python -m tests.support.measures [FOLDER …]`` prints a table.

Counted are ``kava_core`` and ``kava_plugins``, or the folders given. The lines of a function do not include
its docstring. A name is one word if nothing divides it: ``align``, ``_align``, but not ``align_layer``.
"""

from __future__ import annotations

import ast
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from tests.support.source import ROOT, imports, python_files, tree

CODE = ("kava_core", "kava_plugins")
MOST_FILES = 12
"""Python files in a folder, its ``__init__.py`` not counted."""

FLOORS = (
    *("cli", "experiment", "jobs", "train", "costs", "build", "distill", "latent", "models", "data"),
    *("testing", "kv", "runs", "specfile", "protocols", "root"),
)
"""Rooms of ``kava_core`` from top to bottom; an arrow points down. ``root`` are the modules in no room."""

Function = ast.FunctionDef | ast.AsyncFunctionDef
COMPREHENSIONS = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp


def functions(*places: str) -> Iterator[tuple[Path, Function]]:
    """Every function and method, with its file."""
    for file in python_files(*places):
        for node in ast.walk(tree(file)):
            if isinstance(node, Function):
                yield file, node


def docstring_words(node: ast.AST) -> int:
    """Words of a docstring; 0 without one."""
    return len((ast.get_docstring(node) or "").split())  # type: ignore[arg-type]


def function_lines(node: Function) -> int:
    """Lines from ``def`` to the end, the docstring left out."""
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    first = node.body[0]
    if ast.get_docstring(node) is not None:
        lines -= (first.end_lineno or first.lineno) - first.lineno + 1
    return lines


def is_one_word(name: str) -> bool:
    """Return whether a function's name is a single word; ``__init__`` and its like are left to Python."""
    return "_" not in name.strip("_")


def one_word_share(*places: str) -> float:
    """Share of functions whose name is one word, those of Python's own protocols left out."""
    names = [node.name for _, node in functions(*places) if not node.name.startswith("__")]
    return sum(map(is_one_word, names)) / len(names)


def code_lines(file: Path) -> int:
    """Lines of a file that are neither empty nor a comment."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines)


def comprehensions_per_100_lines(*places: str) -> float:
    """Comprehensions and generator expressions for every hundred lines of code."""
    files = python_files(*places)
    found = sum(isinstance(node, COMPREHENSIONS) for file in files for node in ast.walk(tree(file)))
    return 100 * found / sum(map(code_lines, files))


def files_of_folders(*places: str) -> dict[str, int]:
    """Python files of every folder, ``__init__.py`` left out."""
    count: dict[str, int] = {}
    for file in python_files(*places):
        if file.name != "__init__.py":
            count[str(file.parent)] = count.get(str(file.parent), 0) + 1
    return count


def room_of(module: str) -> str:
    """The room of a module of ``kava_core``; ``root`` for one that lies in none."""
    words = module.split(".")
    return words[1] if len(words) > 1 and (ROOT / "kava_core" / words[1]).is_dir() else "root"


def arrows_up() -> list[str]:
    """Every import, lazy ones too, that points from a room of ``kava_core`` to a higher one."""
    wrong = []
    for file in python_files("kava_core"):
        if file in (Path("kava_core/__main__.py"), Path("kava_core/__init__.py")):
            continue  # The command line and the front door: they are above all rooms.
        room = room_of(".".join(file.with_suffix("").parts))
        for name, line in imports(tree(file)):
            if not name.startswith("kava_core."):
                continue
            to = room_of(name)
            if FLOORS.index(to) < FLOORS.index(room):
                wrong.append(f"{file}:{line}: {room} imports {name} of {to}")
    return wrong


def percentile_90(numbers: list[int]) -> int:
    """The 90th percentile, nearest rank."""
    return sorted(numbers)[math.ceil(0.9 * len(numbers)) - 1]


def verbless_docstrings(*places: str) -> list[str]:
    """Modules and public functions whose docstring does not start with a verb of ``verbs.txt``."""
    known = set((ROOT / "tests/meta/verbs.txt").read_text(encoding="utf-8").split())
    wrong = []
    for file in python_files(*places):
        nodes = [tree(file), *(node for _, node in functions(str(file)) if not node.name.startswith("_"))]
        for node in nodes:
            words = (ast.get_docstring(node) or "").split()
            if words and words[0].strip(".,:;") not in known:
                wrong.append(f"{file}:{getattr(node, 'lineno', 1)}: {' '.join(words[:6])}")
    return wrong


def table(*places: str) -> list[tuple[str, str]]:
    """Every measure with its value."""
    lengths = [function_lines(node) for _, node in functions(*places)]
    files = [code_lines(file) for file in python_files(*places)]
    words = [docstring_words(node) for _, node in functions(*places) if docstring_words(node)]
    fullest = max(files_of_folders(*places).items(), key=lambda entry: entry[1])
    return [
        ("functions", str(len(lengths))),
        ("lines of a function, median and p90", f"{median(lengths):.0f}, {percentile_90(lengths)}"),
        ("lines of a file, median and p90", f"{median(files):.0f}, {percentile_90(files)}"),
        ("words of a function's docstring, median", f"{median(words):.0f}"),
        ("function names of one word", f"{one_word_share(*places):.0%}"),
        ("comprehensions per 100 lines", f"{comprehensions_per_100_lines(*places):.1f}"),
        ("docstrings that start with no verb", str(len(verbless_docstrings(*places)))),
        ("most files in a folder", f"{fullest[1]} ({fullest[0]})"),
        ("imports between rooms that point up", str(len(arrows_up()))),
    ]


if __name__ == "__main__":
    for label, value in table(*(sys.argv[1:] or CODE)):
        print(f"{label:<45} {value}")
    if sys.argv[1:]:
        print("", *verbless_docstrings(*sys.argv[1:]), sep="\n")
