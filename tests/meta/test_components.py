"""Check that each of kava's components declares what it does, its formula and its source, in one style."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from kava_core.config import ComponentConfig
from kava_core.hookspecs import KINDS
from kava_core.registry import Registered, Registry
from tests.support.repository import ROOT

PLUGINS = ROOT / "kava_plugins"
BUILT_IN = Registry.build(disabled={"*"}).table()


def folder_of_kind(kind: str) -> Path:
    """Return the folder of a kind's components: ``kv_loss`` → ``kava_plugins/kv_losses``."""
    return PLUGINS / KINDS[kind].removeprefix("kava_")


def docstring_lines(config: type[ComponentConfig]) -> list[str]:
    """Return the lines of a declaration's own docstring."""
    return inspect.cleandoc(config.__doc__ or "").splitlines()


@pytest.fixture(params=BUILT_IN, ids=[f"{component.kind}-{component.name}" for component in BUILT_IN])
def component(request: pytest.FixtureRequest) -> Registered:
    return request.param


def test_class_names_tell_declaration_and_implementation_apart(component: Registered) -> None:
    implementation = component.config.implementation()
    assert component.config.__name__ == f"{implementation.__name__}Config"


def test_docstring_begins_with_one_sentence(component: Registered) -> None:
    first, *rest = docstring_lines(component.config)
    assert first.endswith(".")
    assert ". " not in first
    assert not rest or rest[0] == ""


@pytest.mark.parametrize("label", ["Formula:", "Source:"])
def test_docstring_has_formula_and_source(component: Registered, label: str) -> None:
    labelled = [line for line in docstring_lines(component.config) if line.startswith(label)]
    assert len(labelled) == 1
    assert labelled[0].removeprefix(label).strip()


def test_implementation_is_in_the_file_of_its_name(component: Registered) -> None:
    file = Path(inspect.getfile(component.config.implementation()))
    assert file == folder_of_kind(component.kind) / f"{component.name}.py"


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_components_or_marked_as_helpers(kind: str) -> None:
    stems = {file.stem for file in folder_of_kind(kind).glob("*.py")}
    names = {component.name for component in BUILT_IN if component.kind == kind}
    assert {stem for stem in stems if not stem.startswith("_")} == names
