"""File names of a run are spelled in one module."""

from __future__ import annotations

import ast
from pathlib import Path

from kava_core.runs.folder import Folder
from tests.support.source import python_files, tree

HOME = Path("kava_core/runs/folder.py")
GENERAL_WORDS = {"student", "latents", "lock"}
"""Names of files that are words of their own, and so occur elsewhere with another meaning."""


def file_names() -> set[str]:
    """Names of all files and folders of a run."""
    run = Folder(Path("run"))
    paths = [value for value in vars(run).values() if isinstance(value, Path)]
    return {path.name for path in paths if path.parent == run.path} - GENERAL_WORDS


def literals(file: Path) -> set[str]:
    """The strings of a file, parts of f-strings included, and what is after the last slash of each."""
    nodes = [node for node in ast.walk(tree(file)) if isinstance(node, ast.Constant)]
    return {node.value.rpartition("/")[2] for node in nodes if isinstance(node.value, str)}


def test_only_the_folder_spells_file_names_of_a_run() -> None:
    names = file_names()
    assert len(names) > 12
    assert names <= literals(HOME)
    wrong = {
        str(file): found
        for file in python_files("kava_core", "kava_plugins")
        if file != HOME and (found := names & literals(file))
    }
    assert wrong == {}
