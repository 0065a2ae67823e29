"""Wrong shapes from a component are errors without debug mode too (broadcasting would hide them)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from kava_core.build.aligner import build_time_plan
from kava_core.errors import PluginError
from kava_core.kv.align.returned import require_shape
from tests.support.pipeline_helpers import STUDENT, WIDE, FakeConfig, Module, fake_align
from tests.support.repository import ROOT

SCRIPT = """
import torch
from tests.kv.compare.test_pipeline import *
BROKEN = {
    "thin": {"dim_projector": fake(lambda x, part: x[..., :1])},
    "heads": {"head_adapter": with_views(lambda x, part: x[:, :, :1])},
    "layers": {"layer_mapper": FakeConfig(make=lambda **_: Module(lambda: torch.eye(3)))},
    "sums": {"layer_mapper": FakeConfig(make=lambda **_: Module(lambda: torch.full((2, 4), 0.5)))},
    "fuser": {"fuser": fake(lambda context: torch.ones(1, 1, 1, 1))},
    "negative": {"fuser": fake(lambda context: -torch.ones(1, 2, 2, 6))},
    "loss": {"losses": (FakeLoss(make=lambda **_: Module(lambda s, t, w: w)),)},
}
for name, parts in BROKEN.items():
    try:
        sides = timeline(*SIZES), [timeline(*T_SIZES)]
        run(broken(**parts), cache(STUDENT, 6), [cache(WIDE, 9, seed=1)], *sides)
        print(name, "passed")
    except Exception as error:
        print(name, type(error).__name__, error, *error.__notes__, sep="|")
"""

TOLD = """\
thin|PluginError|returned shape [2, 2, 2, 6, 1], must be [2, 2, 2, 6, 4] \
(batch 2, layer 2, head 2, time 6, dim 4)|in dim_projector 'fake', teacher 'a'
heads|PluginError|returned shape [2, 2, 1, 9, 4], must be [2, 2, 2, 9, 4] \
(batch 2, layer 2, head 2, time 9, dim 4)|in head_adapter 'fake', teacher 'a'
layers|PluginError|returned shape [3, 3], must be [2, 4] (layer 2, t_layer 4)|\
in layer_mapper 'fake', teacher 'a'
sums|PluginError|rows must be at least 0 and sum to 1, not [2.0, 2.0] (student layers [0, 1])|\
in layer_mapper 'fake', teacher 'a'
fuser|PluginError|returned shape [1, 1, 1, 1], must be [1, 2, 2, 6] \
(teacher 1, batch 2, layer 2, time 6)|in fuser 'fake'
negative|PluginError|weights must be at least 0, not -1|in fuser 'fake'
loss|PluginError|returned shape [2, 2, 6], must be a scalar|in kv_loss 'fake'
"""


def test_wrong_shapes_are_errors_with_debug_mode_off() -> None:
    root = ROOT
    environment = os.environ | {"KAVA_SHAPE_CHECK": "0", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, cwd=root, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == TOLD


def test_the_right_shape_is_passed_on() -> None:
    x = torch.zeros(2, 3)
    assert require_shape(x, (2, 3), "batch time") is x
    with pytest.raises(PluginError, match=r"returned shape \[2, 3\], must be \[3, 2\] \(batch 3, time 2\)"):
        require_shape(x, (3, 2), "batch time")


def test_a_time_warper_cannot_be_trained() -> None:
    """Its parameters would never get a gradient, as time maps are planned beside the batches."""
    warper = Module(lambda teacher, student: None)
    warper.weight = torch.nn.Parameter(torch.ones(1))
    spec = fake_align(time_warper=FakeConfig(make=lambda **_: warper))
    with pytest.raises(PluginError, match="has trained parameters, but time maps pass no gradient") as caught:
        build_time_plan(spec, name="a", teacher=WIDE, student=STUDENT)
    assert caught.value.__notes__ == ["in time_warper 'fake', teacher 'a'"]
