"""What ``import kava_core`` offers, and the example that uses it."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import kava_core
from tests.support.repository import ROOT

EXAMPLE = ROOT / "examples" / "own_loop.py"


@pytest.mark.parametrize("name", sorted(kava_core.FRONT_DOOR))
def test_every_name_is_the_one_of_its_module(name: str) -> None:
    found = getattr(kava_core, name)
    assert found.__module__ == kava_core.FRONT_DOOR[name]
    assert found.__doc__
    assert name in dir(kava_core)
    assert name in kava_core.__all__


def test_other_names_are_missing_as_python_says_it() -> None:
    with pytest.raises(AttributeError, match=r"module 'kava_core' has no attribute 'lod_spec'"):
        kava_core.lod_spec  # noqa: B018


def test_torch_is_imported_when_it_is_needed_and_not_before() -> None:
    code = (
        "import sys, kava_core; before = 'torch' in sys.modules; kava_core.load_spec; "
        "spec = 'torch' in sys.modules; kava_core.Capture; print(before, spec, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == ["False", "False", "True"], done.stderr


def test_the_example_trains_in_under_forty_lines(tmp_path: Path) -> None:
    """Both models learn the form of the text: the loss falls, and it holds the KV term."""
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) < 40
    train = runpy.run_path(str(EXAMPLE))["train"]
    losses = list(train(EXAMPLE.with_suffix(".yaml"), steps=12))
    assert losses[-1] < losses[0] - 0.5
    plain = tmp_path / "plain.yaml"
    text = EXAMPLE.with_suffix(".yaml").read_text(encoding="utf-8")
    plain.write_text(text.replace("weight: 0.5", "weight: 1e-9"), encoding="utf-8")
    assert losses[0] > next(train(plain, steps=1)) + 0.1
