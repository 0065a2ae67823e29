"""Debug mode: what is hooked when it is on, that nothing is when it is off, and values beside shapes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kava_core import shapecheck
from kava_core.errors import NonFiniteError
from kava_core.kv.align.finite import assert_finite
from kava_core.protocols.axes import Cache
from tests.support import quick_python
from tests.support.hook_examples import add_distribution
from tests.support.repository import ROOT

THEIRS = """\
from importlib.util import cache_from_source

from jaxtyping import Float
from torch import Tensor

BYTE_CODE = cache_from_source("imported.py")

def halve(x: Float[Tensor, "batch 4"]) -> Float[Tensor, "batch 2"]:
    return x[:, :2]
"""

LOOK = """
import json, sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    {before}
    import kava_core
    {after}
    from kava_core.kv.maths.masks import widen
    from kava_core.kv.align.boundaries import fuse_targets
    from kava_core.train.weights import entries_under
    from kava_plugins.kv_losses.mse import MSE
    from kava_plugins.kv_losses.mercator import one_minus_cosine
    from theirs.tensors import BYTE_CODE, halve
    import torch

    def refuses(call, *arguments):
        try:
            call(*arguments)
        except Exception as error:
            return type(error).__module__.partition(".")[0] in ("jaxtyping", "beartype")
        return False

    functions = (fuse_targets, widen, entries_under, one_minus_cosine, MSE.forward, halve)
    wrapped = [hasattr(f, "__wrapped__") for f in functions]
    hooking = ("jaxtyping._import_hook", "kava_core.shapecheck")
    hooks = [finder for finder in sys.meta_path if type(finder).__module__ in hooking]
    print(json.dumps(dict(
        wrapped=wrapped,
        hooks=len(hooks),
        ours=refuses(one_minus_cosine, *[torch.zeros(1, 2, 3, 4, 5)] * 2, torch.ones(1, 2, 3, 4, 5)),
        theirs=refuses(halve, torch.zeros(3, 5)),
        compiles_imports_anew="jaxtyping" in BYTE_CODE,
        warned=[str(one.message) for one in caught if "shape checking" in str(one.message)],
    )))
"""

CHECKED = {
    "wrapped": [True] * 6,
    "hooks": 1,
    "ours": True,
    "theirs": True,
    "compiles_imports_anew": False,
    "warned": [],
}


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder on the path with a third-party plugin ``theirs``, installed as far as metadata goes."""
    package = tmp_path / "theirs"
    package.mkdir()
    (package / "__init__.py").write_text("", encoding="utf-8")
    (package / "tensors.py").write_text(THEIRS, encoding="utf-8")
    add_distribution(tmp_path, "their-plugin", {"theirs": "theirs"})
    return tmp_path


def look(
    site: Path, *, variable: str, before: str = "pass", after: str = "pass", python: str = sys.executable
) -> dict[str, Any]:
    """What an interpreter finds hooked; a fresh one, if it is to hook anything."""
    environment = os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{ROOT}", "KAVA_SHAPE_CHECK": variable}
    code = LOOK.format(before=before, after=after)
    done = subprocess.run([python, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_variable_hooks_ours_and_theirs(site: Path) -> None:
    found = look(site, variable="1")
    assert found == CHECKED


@pytest.mark.parametrize("variable", ["", "0"])
def test_off_nothing_is_hooked(site: Path, variable: str) -> None:
    found = look(site, variable=variable, python=quick_python.executable())
    assert found == CHECKED | {"wrapped": [False] * 6, "hooks": 0, "ours": False, "theirs": False}


@pytest.mark.release
def test_enabled_by_the_command_line_after_the_registry(site: Path) -> None:
    """``--check-shapes`` comes when kava is imported but no tensor half."""
    after = "from kava_core.cli.app import options; options(check_shapes=True, traceback=False)"
    found = look(site, variable="0", after=after)
    assert found == CHECKED


@pytest.mark.release
def test_late_enabling_warns_and_names_what_is_missed(site: Path) -> None:
    found = look(site, variable="1", before="import theirs.tensors")
    assert found["theirs"] is False
    assert found["ours"] is True
    assert found["warned"] == ["imported before shape checking was switched on, not checked: theirs"]


@pytest.mark.parametrize(
    ("value", "on"), [("1", True), ("yes", True), ("0", False), ("", False), (None, False)]
)
def test_wanted(value: str | None, on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KAVA_SHAPE_CHECK", raising=False)
    if value is not None:
        monkeypatch.setenv("KAVA_SHAPE_CHECK", value)
    assert shapecheck.wanted() is on


def test_modules_to_hook(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(site))
    assert "theirs" in shapecheck.modules()
    assert len(set(shapecheck.modules())) == len(shapecheck.modules())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_finite_names_part_and_layers(bad: float) -> None:
    cache = Cache(keys=torch.zeros(2, 3, 2, 4, 5), values=torch.zeros(2, 3, 2, 4, 5))
    cache.values[1, 0, 1, 2, 3] = cache.values[0, 2, 0, 0, 0] = bad
    valid = torch.ones(2, 4, dtype=torch.bool)
    with pytest.raises(NonFiniteError) as caught:
        assert_finite(cache, valid, "somewhere")
    assert str(caught.value) == "somewhere: values of layers [0, 2] hold NaN or infinity at valid positions"


def test_finite_ignores_positions_that_are_not_valid() -> None:
    cache = Cache(keys=torch.zeros(2, 3, 2, 4, 5))
    cache.keys[0, :, :, 3] = math.nan
    valid = torch.ones(2, 4, dtype=torch.bool)
    valid[0, 3] = False
    assert_finite(cache, valid, "somewhere")


def test_finite_lets_meta_tensors_pass() -> None:
    assert_finite(
        Cache(keys=torch.zeros(1, 1, 1, 2, 1, device="meta")), torch.ones(1, 2, dtype=torch.bool), "meta"
    )
