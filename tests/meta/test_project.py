"""What README, CI, nox, pyproject and the constraints promise one another."""

from __future__ import annotations

import re
import subprocess
import tomllib

import pytest
from packaging.requirements import Requirement
from typer.testing import CliRunner

from kava_core.cli.app import app
from kava_core.jobs.check import check
from tests.support.source import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOLDERS = (".", "scale", "kava", "experiments")
SPECS = sorted(file for folder in FOLDERS for file in (ROOT / "specs" / folder).glob("*.yaml"))


def requirements() -> list[Requirement]:
    project = PROJECT["project"]
    extras = project["optional-dependencies"].values()
    return [Requirement(line) for lines in (project["dependencies"], *extras) for line in lines]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def commands(text: str) -> list[str]:
    """Single commands of a shell line or script, without what may differ between two environments."""
    lines = [part.strip() for line in text.splitlines() for part in line.split("&&")]
    lines = [
        line for line in lines if line and not line.startswith(("#", "set ", "cd ", "export ", ".ci/browser"))
    ]
    lines = [re.sub(r"^exec | -q\b|^python -m (?=pip)", "", line) for line in lines]
    return [re.sub(r"\.venv[-\w]*", "VENV", line.replace("python3.11", "python")) for line in lines]


def shell_blocks() -> list[str]:
    return re.findall(r"```(?:bash|sh|console)\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize(
    "spec", SPECS or [pytest.param(None, marks=pytest.mark.skip("specs/ is empty"))], ids=str
)
def test_spec_passes_check(spec: object) -> None:
    assert [level for level, _ in check(str(spec))][:4] == ["syntax", "schema", "rules", "plugins"]


ALIKE = [spec for spec in SPECS if spec.parent.name == "kava"][1:]
"""Published settings that differ from the first in models and numbers alone."""
LARGE = [spec for spec in SPECS if spec.name == "llama70b_to_8b.yaml"]
"""Takes six seconds to plan."""


@pytest.mark.parametrize(
    "spec",
    [pytest.param(spec, marks=pytest.mark.release if spec in (*ALIKE, *LARGE) else ()) for spec in SPECS],
    ids=lambda spec: spec.name,
)
def test_spec_can_be_shown(spec: object) -> None:
    """``kava plan`` lists every field with its origin, of variants as well."""
    shown = CliRunner().invoke(app, ["plan", str(spec), "--time", "16"])
    assert shown.exit_code == 0, shown.output or shown.exception
    assert "resolved spec" in shown.output


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_spec_says_what_it_shows_and_needs(spec: object) -> None:
    opening = re.match(r"(#.*\n)+", spec.read_text(encoding="utf-8"))
    assert opening, "no comment at the top"
    assert {"Shows:", "Needs:"} <= set(opening[0].split())


def test_ci_runs_the_readme_test_command() -> None:
    [tested] = [commands(block) for block in shell_blocks() if "nox" in block]
    ci = commands((ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    assert len(tested) == 4
    assert ci == tested


def test_nox_runs_the_readme_quickstart() -> None:
    [tried] = [commands(block) for block in shell_blocks() if "kava train" in block]
    spec = tried[-1].split()[2]
    assert (ROOT / spec).is_file()
    assert f'"kava", "train", "{spec}"' in (ROOT / "noxfile.py").read_text(encoding="utf-8")


def test_no_pins_in_the_library() -> None:
    assert [str(r) for r in requirements() if "==" in str(r.specifier)] == []


def test_every_core_dependency_has_a_lower_bound() -> None:
    core = [Requirement(line) for line in PROJECT["project"]["dependencies"]]
    assert [r.name for r in core if ">" not in str(r.specifier)] == []


def test_constraints_cover_the_core_dependencies() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if re.match(r"\w", line)]
    versions = {canonical(pin.name): str(pin.specifier) for pin in pins}
    core = [Requirement(line) for line in PROJECT["project"]["dependencies"]]
    for requirement in core:
        pinned = re.fullmatch(r"===?([\w.+!]+)", versions.get(canonical(requirement.name), ""))
        assert pinned, f"{requirement.name} is not pinned"
        assert requirement.specifier.contains(pinned[1], prereleases=True), str(requirement)


def test_the_root_holds_at_most_16_entries() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len({file.partition("/")[0] for file in files}) <= 16
