"""Fixed weights, and the errors of their names."""

from __future__ import annotations

import pytest
import torch

from kava_core.errors import SpecError
from kava_core.protocols.axes import Cache, Geometry
from kava_core.protocols.fuser import FusionContext
from kava_plugins.fusers import kava_fusers

GEOMETRY = Geometry(layer=3, head=1, dim=2, qhead=1, hidden=4)


def build(teachers, **fields):
    [declaration] = [one for one in kava_fusers() if one.component_name() == "fixed"]
    return declaration(**fields).build(teachers=teachers, student=GEOMETRY)


def context(teacher, batch=2, layer=3, time=4):
    cache = Cache(keys=torch.randn(batch, layer, 1, time, 2))
    return FusionContext(torch.ones(teacher, batch, time, dtype=torch.bool), (cache,) * teacher, cache)


def test_weights_stand_by_teacher_name():
    weights = build(("big", "small"), weights={"small": 3.0, "big": 0.5})(context(2))
    assert weights.shape == (2, 2, 3, 4)
    assert torch.equal(weights[0], torch.full((2, 3, 4), 0.5))
    assert torch.equal(weights[1], torch.full((2, 3, 4), 3.0))


def test_equal_by_default():
    assert torch.equal(build(("a", "b", "c"))(context(3)), torch.ones(3, 2, 3, 4))


def test_unknown_teacher():
    with pytest.raises(SpecError) as caught:
        build(("small", "large"), weights={"smal": 1.0, "large": 1.0})
    wanted = "fuser fixed: weights: no teacher 'smal'; possible: large, small; did you mean 'small'?"
    assert str(caught.value) == wanted


def test_missing_teacher():
    with pytest.raises(SpecError) as caught:
        build(("small", "large"), weights={"large": 1.0})
    assert str(caught.value) == "fuser fixed: weights: none for small; every teacher needs one"
