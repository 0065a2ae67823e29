"""Parameters no loss reaches are frozen, and only those."""

from __future__ import annotations

import copy

import pytest
import torch

from kava_core.kv.axes import Geometry
from kava_core.train.assemble import make_pipeline
from tests import tiny

STUDENT = Geometry(layer=2, head=2, dim=8, qhead=4, hidden=32)
TEACHERS = {"wide": Geometry(4, 4, 16, 4, 64), "gpt": Geometry(3, 6, 8, 6, 48)}


def trained(align: dict, losses: list) -> set[str]:
    teachers = copy.deepcopy(tiny.FIELDS["teachers"])
    teachers[0]["align"] = align
    pipeline = make_pipeline(tiny.spec(teachers=teachers, losses=losses), TEACHERS, STUDENT, seed=0)
    return {name for name, parameter in pipeline.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("align", "parts", "expected"),
    [
        ({"dim_projector": "linear"}, ["values"], {"dim_projector.values"}),
        ({"dim_projector": "linear"}, ["keys", "values"], {"dim_projector.keys", "dim_projector.values"}),
        (
            {"dim_projector": {"name": "calibrated", "trainable": True}},
            ["values"],
            {"dim_projector.values_basis"},
        ),
        (
            {"head_adapter": {"name": "structured", "trainable": True, "share_kv": False}},
            ["keys"],
            {"head_adapter.keys_mix"},
        ),
        ({}, ["keys", "values"], set()),
    ],
)
def test_only_reached_parameters_are_trained(align: dict, parts: list[str], expected: set[str]) -> None:
    found = trained(align, [{"name": "mercator", "parts": parts}])
    assert found == {f"aligners.0.{name}" for name in expected}


def test_the_pipeline_itself_is_untouched() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    trained({"dim_projector": "linear"}, [{"name": "mse", "parts": ["values"]}])
    assert torch.equal(torch.get_rng_state(), before)
