"""Parameters no loss reaches are frozen, and only those."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from kava_core.build.data import make_data
from kava_core.build.distiller import make_distiller
from kava_core.build.pipeline import make_pipeline
from kava_core.errors import SpecError
from kava_core.protocols.axes import Geometry
from tests.support import tiny

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


LOSSES = [
    {"name": "mse"},
    {"name": "smooth_l1"},
    {"name": "mercator"},
    {"name": "relation"},
    {"name": "relation", "form": "softmax"},
    {"name": "attention_kl", "parts": ["keys", "queries"]},
    {"name": "attention_output", "parts": ["keys", "values", "queries"]},
    {"name": "structural", "parts": ["keys", "values", "queries"]},
]


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.parametrize("fuser", ["learnable", "attention"])
def test_a_router_learns_from_every_loss(fuser: str, loss: dict) -> None:
    spec = tiny.spec(fuser=fuser, losses=[loss])
    pipeline = make_pipeline(spec, TEACHERS, STUDENT, seed=0)
    assert all(parameter.requires_grad for parameter in pipeline.fuser.parameters())


def test_a_router_without_gradient_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would stay at equal weights, like one that found no difference."""
    from kava_plugins.kv_losses.mse import MSE

    plain = MSE.forward
    monkeypatch.setattr(MSE, "forward", lambda self, s, t, weight: plain(self, s, t, weight.detach()))
    spec = tiny.spec(fuser="learnable", losses=[{"name": "mse"}])
    with pytest.raises(SpecError, match=r"fuser 'learnable' is trained, but no loss \(mse\) gives it"):
        make_pipeline(spec, TEACHERS, STUDENT, seed=0)


def test_what_belongs_to_a_teacher_of_weight_0_is_frozen() -> None:
    fuser = {"name": "fixed", "weights": {"wide": 0, "gpt": 1}}
    align = {"dim_projector": "linear"}
    teachers = [one | {"align": align} for one in tiny.FIELDS["teachers"]]
    spec = tiny.spec(fuser=fuser, losses=[{"name": "mercator"}], teachers=teachers)
    pipeline = make_pipeline(spec, TEACHERS, STUDENT, seed=0)
    trained = {name for name, parameter in pipeline.named_parameters() if parameter.requires_grad}
    assert trained == {"aligners.1.dim_projector.keys", "aligners.1.dim_projector.values"}


@pytest.mark.parametrize("stream", [False, True])
def test_every_parameter_has_a_gradient_whoever_is_drawn(tmp_path: Path, stream: bool) -> None:
    """Processes that train together wait for the gradients of all."""
    align = {"dim_projector": "linear"}
    teachers = [one | {"align": align} for one in tiny.FIELDS["teachers"]]
    spec = tiny.spec(
        tmp_path, fuser={"name": "fixed", "sample": 1}, teachers=teachers, train={"stream": stream}
    )
    data = make_data(spec)
    distiller = make_distiller(spec, data, seed=0).train()
    batch = data.plain_collator([data.train_items[index] for index in range(3)])
    for _ in range(4):
        distiller.zero_grad()
        distiller(batch["student"], batch["teachers"], torch.ones(4))["loss"].backward()
        for name, parameter in distiller.named_parameters():
            assert not parameter.requires_grad or parameter.grad is not None, name


def test_a_router_of_lifted_students_reads_the_student(tmp_path: Path) -> None:
    teachers = [one | {"align": {"direction": "to_teacher"}} for one in tiny.FIELDS["teachers"]]
    pipeline = make_pipeline(tiny.spec(teachers=teachers, fuser="learnable"), TEACHERS, STUDENT, seed=0)
    assert pipeline.fuser.inner.in_features == STUDENT.hidden
