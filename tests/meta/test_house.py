"""The house stays as it was built: floors, folders, the reach of the spec, words, paths that are leaving."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from kava_core import moved
from tests.support import measures, quick_python
from tests.support.source import ROOT, imports, python_files, tree

BELOW_BUILD = ("distill", "latent", "models", "data", "testing", "kv", "protocols")


def test_imports_between_rooms_point_down() -> None:
    """Lazy imports and those for type checkers are counted."""
    assert measures.arrows_up() == []


def test_an_arrow_up_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """With two floors exchanged, what was an arrow down is one up."""
    floors = list(measures.FLOORS)
    first, second = floors.index("build"), floors.index("distill")
    floors[first], floors[second] = floors[second], floors[first]
    monkeypatch.setattr(measures, "FLOORS", tuple(floors))
    wrong = measures.arrows_up()
    assert wrong
    assert all("build imports kava_core.distill" in line for line in wrong)


def test_every_room_has_a_floor() -> None:
    folders = {path.name for path in (ROOT / "kava_core").iterdir() if (path / "__init__.py").exists()}
    assert folders | {"root"} == set(measures.FLOORS)


def test_folders_hold_at_most_twelve_files() -> None:
    """``__init__.py`` and ``conftest.py`` are not counted."""
    fullest = measures.files_of_folders("kava_core", "kava_plugins", "tests")
    assert {folder: count for folder, count in fullest.items() if count > measures.MOST_FILES} == {}


@pytest.mark.parametrize("room", BELOW_BUILD)
def test_the_whole_spec_is_not_read_below_build(room: str) -> None:
    files = python_files(f"kava_core/{room}")
    assert files
    readers = []
    for file in files:
        names = {name.rpartition(".")[2] for name, _ in imports(tree(file))}
        mentions = any(isinstance(n, ast.Name) and n.id == "PipelineSpec" for n in ast.walk(tree(file)))
        if "PipelineSpec" in names or mentions:
            readers.append(str(file))
    assert readers == []


def test_docstrings_start_with_a_verb() -> None:
    assert measures.verbless_docstrings(*measures.CODE) == []


def test_a_docstring_without_a_verb_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tests" / "meta"
    folder.mkdir(parents=True)
    words = (ROOT / "tests/meta/verbs.txt").read_text(encoding="utf-8")
    (folder / "verbs.txt").write_text(words.replace("\nReturn\n", "\n"), encoding="utf-8")
    monkeypatch.setattr(measures, "ROOT", tmp_path)
    assert any(": Return " in line for line in measures.verbless_docstrings(*measures.CODE))


def test_names_and_comprehensions_stay_readable() -> None:
    """The aims of the move, with what was measured then in measures' table of docs/extend/contributing.md."""
    assert measures.one_word_share(*measures.CODE) < 0.45
    assert measures.comprehensions_per_100_lines(*measures.CODE) < 3.0


@pytest.mark.parametrize(("old", "new"), sorted(moved.MODULES.items()))
def test_an_old_module_path_warns_and_gives_the_same_objects(old: str, new: str) -> None:
    """In processes of their own: a module is found once."""
    code = (
        "import importlib, sys, warnings\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        f"    old = importlib.import_module({old!r})\n"
        f"new = importlib.import_module({new!r})\n"
        "public = [name for name in vars(new) if not name.startswith('_')]\n"
        "assert public and all(getattr(old, name) is getattr(new, name) for name in public)\n"
        "print([(w.category.__name__, str(w.message)) for w in caught if 'kava_core' in str(w.message)])\n"
    )
    done = subprocess.run(
        [quick_python.executable(), "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    said = f"{old} is now {new}; the old path will be gone in kava 0.2"
    assert done.stdout.strip() == str([("DeprecationWarning", said)]), done.stderr


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, names in moved.NAMES.items() for name in names]
)
def test_an_old_name_warns_and_is_the_same_object(module: str, name: str) -> None:
    new = moved.NAMES[module][name]
    with pytest.warns(DeprecationWarning, match=f"^{module}.{name} is now {new}.{name}; the old path will"):
        found = getattr(sys.modules.get(module) or __import__(module, fromlist=["_"]), name)
    assert found is getattr(sys.modules[new], name)


def test_a_name_that_never_was_is_missing() -> None:
    from kava_core import protocols

    with pytest.raises(AttributeError, match=r"module 'kava_core.protocols' has no attribute 'Fusser'"):
        protocols.Fusser  # noqa: B018
