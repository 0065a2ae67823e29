"""``kava new``: what it writes installs, passes its own test and the linters; mistakes are one line."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from kava_core.cli.app import main
from kava_core.cli.new_plugin import write_plugin
from kava_core.cli.new_spec import write_spec
from kava_core.errors import KavaError, SpecError
from kava_core.hookspecs import KINDS
from kava_core.jobs.check import check
from tests.support.hook_examples import add_distribution
from tests.support.source import ROOT, imports, module_level


def python(*arguments: str, path: tuple[Path, ...], cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT)))}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=300)


def registered_in(site: Path, folder: Path) -> None:
    """The metadata pip would write, from the package's own pyproject."""
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    add_distribution(site, project["name"], project["entry-points"]["kava"], project["version"])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a new plugin of every kind, ``kava-my-KIND``, by the command line."""
    output = tmp_path_factory.mktemp("new")
    for kind in KINDS:
        with pytest.raises(SystemExit) as stopped:
            main(["new", "plugin", f"my-{kind.replace('_', '-')}", "--kind", kind, "--output", str(output)])
        assert stopped.value.code == 0
    return output


@pytest.fixture(scope="module")
def tested(written: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[bool]]:
    """Test module to whether each of its tests passed, from one process that has them all installed."""
    site, report = tmp_path_factory.mktemp("site"), written / "report.xml"
    folders = [folder for folder in written.iterdir() if folder.is_dir()]
    for folder in folders:
        registered_in(site, folder)
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-W",
        "error",
        "--rootdir",
        str(written),
        f"--junitxml={report}",
    ]
    python("-m", "pytest", *options, *map(str, folders), path=(site, *folders), cwd=written)
    passed: dict[str, list[bool]] = defaultdict(list)
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        passed[Path(case.attrib["classname"].split(".Test")[0].replace(".", "/")).name].append(not len(case))
    return passed


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_plugin_passes_its_own_test(kind: str, tested: dict[str, list[bool]]) -> None:
    passed = tested[f"test_my_{kind}"]
    assert all(passed)
    assert len(passed) > 20


def test_new_plugins_are_tidy(written: Path) -> None:
    files = sorted(written.rglob("*.py"))
    assert len(files) == 3 * len(KINDS)
    assert "$" not in "".join(file.read_text(encoding="utf-8") for file in files)
    style = ["--isolated", "--line-length", "110"]
    rules = ["--select", "E,F,I,UP,B,SIM", "--ignore", "F722,F821,UP037"]
    for command in (["check", *style, *rules], ["format", "--check", *style]):
        for folder in (file.parents[1] for file in files if file.name == "__init__.py"):
            done = python("-m", "ruff", *command, ".", path=(), cwd=folder)
            assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_the_declaration_needs_no_torch(kind: str, tmp_path: Path) -> None:
    folder = write_plugin("some-thing", kind, tmp_path)
    source = ast.parse((folder / "kava_some_thing" / "__init__.py").read_text(encoding="utf-8"))
    assert {name.partition(".")[0] for node in module_level(source) for name, _ in imports(node)} <= {
        *("collections", "typing", "kava_core")
    }


def test_pip_installs_it_and_its_name_works(tmp_path: Path) -> None:
    """With the real build backend, where it can be had."""
    folder, site = write_plugin("kava-deep", "layer_mapper", tmp_path), tmp_path / "site"
    pip = ["-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(folder)]
    done = python(*pip, path=(), cwd=tmp_path)
    if done.returncode:
        pytest.skip(f"pip cannot build here: {done.stderr.strip().splitlines()[-1]}")
    listed = python("-m", "kava_core", "plugins", path=(site,), cwd=tmp_path)
    [line] = [line for line in listed.stdout.splitlines() if "kava-deep" in line]
    assert line.split()[:4] == ["layer_mapper", "deep", "kava-deep", "0.1.0"]


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("Ratio", "layer_mapper", "must be lower-case letters and digits"),
        ("../x", "layer_mapper", "must be lower-case letters and digits"),
        ("", "fuser", "must be lower-case letters and digits"),
        ("a--b", "fuser", "must be lower-case letters and digits"),
        ("naïve", "fuser", "must be lower-case letters and digits"),
        ("ratio", "layer_mapper", "layer_mapper 'ratio' is registered by kava"),
        ("kava-ratio", "layer_mapper", "layer_mapper 'ratio' is registered by kava"),
        ("x", "layer_maper", "no kind 'layer_maper'; possible: .*; did you mean 'layer_mapper'"),
        ("perplexity", "kv_loss", "name 'perplexity': is reserved"),
        ("core", "fuser", "name 'core': is reserved"),
    ],
)
def test_what_cannot_be_a_plugin_is_told_in_one_line(name: str, kind: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=said) as raised:
        write_plugin(name, kind, tmp_path)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def write_my_plugin(output: Path) -> Path:
    return write_plugin("mine", "fuser", output)


def write_my_spec(output: Path) -> Path:
    return write_spec("mine", output)


@pytest.mark.parametrize("write", [write_my_plugin, write_my_spec])
def test_nothing_is_overwritten(write: Callable[[Path], Path], tmp_path: Path) -> None:
    made = write(tmp_path)
    before = made.stat().st_mtime_ns
    with pytest.raises(KavaError, match="exists already; choose another name or --output"):
        write(tmp_path)
    assert made.stat().st_mtime_ns == before


@pytest.mark.parametrize("write", [write_my_plugin, write_my_spec])
def test_an_unwritable_place_is_one_line(write: Callable[[Path], Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(KavaError, match=r"cannot be written|exists already") as raised:
        write(tmp_path / "file")
    assert "\n" not in str(raised.value)


def test_a_new_spec_passes_check(tmp_path: Path) -> None:
    file = write_spec("first.try-1", tmp_path)
    assert [level for level, _ in check(str(file))] == ["syntax", "schema", "rules", "plugins", "shapes"]
    assert file.read_text(encoding="utf-8").startswith("# first.try-1:")


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "x" * 81, "a b"])
def test_what_cannot_be_a_run_is_told(name: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="must be letters, digits"):
        write_spec(name, tmp_path)


def test_help_names_every_kind_and_imports_no_torch() -> None:
    code = (
        "import sys, atexit; from kava_core.cli.app import main;"
        "atexit.register(lambda: print('HEAVY', 'torch' in sys.modules)); main(['new', 'plugin', '--help'])"
    )
    said = python("-c", code, path=(), cwd=ROOT).stdout
    assert [kind for kind in KINDS if kind not in said] == []
    assert said.splitlines()[-1] == "HEAVY False"
