"""The example plugin as a third party's: built, installed beside kava, named in a spec, and broken."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import quick_python
from tests.support.repository import ROOT

EXAMPLE = ROOT / "examples" / "kava-last-layers"

SPEC = """\
name: example
student: {config: {model_type: llama}, tokenizer: {kind: chars}}
teachers:
  - {name: big, config: {model_type: llama}, tokenizer: {kind: chars}, align: {layer_mapper: last_layers}}
losses: [mse]
data: {name: chain}
train: {steps: 1}
"""

BUILD = """
import sys, traceback
from kava_core.protocols.axes import Geometry
from kava_core.build.pipeline import build_pipeline
from kava_core.specfile.load import load_spec
spec = load_spec(sys.argv[1]).spec
big = Geometry(layer=6, head=2, dim=4, qhead=4, hidden=16)
try:
    pipeline = build_pipeline(spec, teachers={"big": big}, student=big.with_(layer=2))
except Exception as error:
    print(type(error).__name__, *error.__notes__, sep="|")
else:
    print(pipeline.aligners[0].sources)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed example, and nothing else."""
    target = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--target",
        str(target),
        str(EXAMPLE),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"pip cannot build the example here: {done.stderr.strip().splitlines()[-1]}")
    return target


@pytest.fixture(scope="module")
def broken(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same plugin, its matrix one teacher layer short."""
    target = tmp_path_factory.mktemp("broken") / "site"
    shutil.copytree(installed, target)
    mapper = target / "kava_last_layers" / "mapper.py"
    text = mapper.read_text(encoding="utf-8")
    assert text.count("return self.matrix") == 1
    mapper.write_text(text.replace("return self.matrix", "return self.matrix[:, 1:]"), encoding="utf-8")
    return target


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    """A spec that names the plugin's component."""
    file = tmp_path / "example.yaml"
    file.write_text(SPEC, encoding="utf-8")
    return file


def python(site: Path, code: str, *arguments: object, shapes: bool = False) -> str:
    """What a process with the plugin installed prints."""
    environment = os.environ | {
        "PYTHONPATH": f"{site}{os.pathsep}{ROOT}",
        "KAVA_SHAPE_CHECK": str(int(shapes)),
    }
    command = [quick_python.executable(), "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_name_works_in_a_spec(installed: Path, spec: Path) -> None:
    assert python(installed, BUILD, spec) == "(4, 5)"


def test_check_accepts_the_spec(installed: Path, spec: Path) -> None:
    said = python(
        installed, "import sys; from kava_core.cli.app import main; main(['check', sys.argv[1]])", spec
    )
    assert "layer_mapper last_layers" in said


def test_registry_knows_the_distribution(installed: Path) -> None:
    code = (
        "from kava_core.registry import Registry;"
        "print(Registry.build().origin('layer_mapper', 'last_layers'))"
    )
    assert python(installed, code) == "kava-last-layers 0.1.0"


def test_wrong_shape_is_caught_at_the_border(broken: Path, spec: Path) -> None:
    error, *notes = python(broken, BUILD, spec, shapes=True).split("|")
    assert error == "PluginError"
    assert any("layer_mapper 'last_layers', teacher 'big'" in note for note in notes)


def test_wrong_shape_is_an_error_without_debug_mode_too(broken: Path, spec: Path) -> None:
    error, *notes = python(broken, BUILD, spec).split("|")
    assert error == "PluginError"
    assert any("layer_mapper 'last_layers', teacher 'big' (kava-last-layers 0.1.0)" in note for note in notes)


def test_the_example_has_no_annotations() -> None:
    """Only kava's own borders can find its mistakes."""
    assert "->" not in (EXAMPLE / "kava_last_layers" / "mapper.py").read_text(encoding="utf-8")


def test_its_own_tests_pass(installed: Path) -> None:
    environment = os.environ | {"PYTHONPATH": f"{installed}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(EXAMPLE)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
