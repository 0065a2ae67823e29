"""The docs say what is there: hooks, components, commands, links, generated pages, the example's code."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import typer
from typer.testing import CliRunner

from kava_core.cli.app import app
from kava_core.hookspecs import KINDS
from kava_core.registry import Registry
from tests.support.source import ROOT

DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), ROOT / "README.md"]
SMALL = 60_000
"""Bytes a picture may have."""
CLI = DOCS / "reference" / "cli.md"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PLUGINS = (DOCS / "extend" / "plugins.md").read_text(encoding="utf-8")


def generator() -> ModuleType:
    found = importlib.util.spec_from_file_location("make_reference", DOCS / "tools" / "make_reference.py")
    assert found
    assert found.loader
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def headings(text: str) -> list[str]:
    return re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)


def anchors(page: Path) -> set[str]:
    titles = headings(page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", sorted(generator().PAGES))
def test_generated_page_is_current(page: str) -> None:
    written = (DOCS / "reference" / page).read_text(encoding="utf-8")
    assert written == generator().PAGES[page](), "run: python docs/tools/make_reference.py"


@pytest.mark.parametrize("hook", KINDS.values())
def test_hook_has_a_heading(hook: str) -> None:
    assert hook in headings(PLUGINS)


@pytest.mark.parametrize("kind", KINDS)
def test_built_ins_are_described(kind: str) -> None:
    """Against the registry, not the generator: a component in the wrong section is found."""
    page = (DOCS / "reference" / "components.md").read_text(encoding="utf-8")
    _, _, rest = page.partition(f"\n## {kind}\n")
    here = rest.partition("\n## ")[0]
    names = Registry.build({"*"}).names(kind)
    assert names
    assert re.findall(r"^### (\w+)$", here, re.MULTILINE) == names


KIND_PAGES = {kind: DOCS / "kinds" / f"{hook.removeprefix('kava_')}.md" for kind, hook in KINDS.items()}
PICTURED = [*KIND_PAGES.values(), DOCS / "kinds" / "rotary.md"]


@pytest.mark.parametrize("kind", KINDS)
def test_page_of_a_kind_names_every_built_in(kind: str) -> None:
    """In the section about what is built in, as code."""
    page = KIND_PAGES[kind].read_text(encoding="utf-8")
    here = page.partition("\n## Built in\n")[2].partition("\n## ")[0]
    missing = [name for name in Registry.build({"*"}).names(kind) if f"`{name}`" not in here]
    assert not missing


@pytest.mark.parametrize("page", PICTURED, ids=lambda page: page.stem)
def test_page_of_a_kind_has_a_small_picture_that_the_script_draws(page: Path) -> None:
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    assert pictures
    for picture in pictures:
        file = (page.parent / picture).resolve()
        assert file.stat().st_size < SMALL
        assert file.parent == DOCS / "pictures"
        assert f"def {file.stem}(" in (DOCS / "tools" / "make_pictures.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PICTURED, ids=lambda page: page.stem)
def test_page_of_a_kind_says_what_it_must(page: Path) -> None:
    found = headings(page.read_text(encoding="utf-8"))
    assert {"When to use what", "Measured", "Traps"} <= set(found)


def test_no_picture_is_left_over() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert not [file.name for file in (DOCS / "pictures").iterdir() if f"pictures/{file.name})" not in text]


@pytest.mark.parametrize("file", ["__init__.py", "mapper.py"])
def test_plugin_page_shows_the_example_as_it_is(file: str) -> None:
    path = f"kava_last_layers/{file}"
    text = (ROOT / "examples" / "kava-last-layers" / path).read_text(encoding="utf-8")
    assert f"```python\n# {path}\n{text}```" in PLUGINS


def test_readme_shows_lines_of_the_example() -> None:
    [shown] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    example = (ROOT / "examples" / "own_loop.py").read_text(encoding="utf-8")
    lines = {line.strip() for line in example.splitlines()}
    assert {line.strip() for line in shown.splitlines()} <= lines


def test_readme_shows_lines_that_kava_plan_prints() -> None:
    [shown] = re.findall(r"```text\n(shapes:.*?)```", README, re.DOTALL)
    printed = CliRunner().invoke(app, ["plan", str(ROOT / "specs" / "quickstart.yaml")]).output
    assert {line.strip() for line in shown.splitlines()} <= {line.strip() for line in printed.splitlines()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    commands = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    named = re.findall(r"(?:`|&& |\$ |--no-python )kava ([a-z]+)\b", page.read_text(encoding="utf-8"))
    assert set(named) <= commands


def test_every_verb_is_in_the_reference() -> None:
    """Against the command line itself, not the generator: a verb that is left out is found."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    groups = {f"new {name}" for name in commands.pop("new").commands}
    titles = {title.removeprefix("kava ") for title in headings(CLI.read_text(encoding="utf-8"))}
    assert titles - {"Command line", "Exit codes", "Options of every verb"} == {*commands, *groups}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!http)([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text(encoding="utf-8"))
    for target, anchor in links:
        file = page.parent / target if target else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


def test_component_names_in_the_migration_page() -> None:
    """What a row offers is registered."""
    registry, fields = Registry.build({"*"}), 0
    for line in (DOCS / "start" / "migration.md").read_text(encoding="utf-8").splitlines():
        offered = line.rpartition(" | ")[2]
        for kind, name in re.findall(r"`(\w+): (?:\{name: )?(\w+)", offered):
            if kind in KINDS:
                fields += 1
                assert name in registry.names(kind), line
    assert fields > 10


def test_exit_codes_are_those_of_the_errors() -> None:
    from kava_core import errors

    rows = re.findall(r"^\| (\d+) \|", CLI.read_text(encoding="utf-8"), re.MULTILINE)
    codes = {
        e.exit_code for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.KavaError)
    }
    assert {int(row) for row in rows} == codes | {0}
