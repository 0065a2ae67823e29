"""λ of every term: schedules, and shares of cross-entropy's gradient."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from kava_core.build.data import Data, make_data
from kava_core.build.distiller import make_distiller
from kava_core.distill.distiller import Distiller
from kava_core.runs.metrics import read_metrics
from kava_core.train.run import run
from kava_core.train.validation.gradient_shares import gradient_norms, gradient_shares, set_weights_by_share
from kava_core.train.weights import load_weights, save_weights
from tests.support import tiny

FROZEN = {"dim_projector": {"name": "linear", "trainable": False}}
TEACHERS = [teacher | {"align": FROZEN} for teacher in tiny.fields()["teachers"]]


OTHER_TERMS: dict[str, dict[str, Any]] = {
    "logits": {
        "teachers": [{"name": "t", "config": tiny.llama(num_hidden_layers=3), "tokenizer": tiny.CHARS}]
    },
    "cross_logits": {
        "teachers": [{"name": "t", "config": tiny.llama(num_hidden_layers=3), "tokenizer": tiny.BPE}]
    },
    "hidden": {
        "teachers": [
            {
                "name": "t",
                "config": tiny.gpt2(),
                "tokenizer": tiny.BPE,
                "align": {"dim_projector": {"name": "linear", "trainable": False}},
            }
        ]
    },
    "codi": {
        "trajectory": "latent",
        "latent": {"count": 3, "passes": 2},
        "teachers": [{"name": "t", "config": tiny.llama(rms_norm_eps=0.1), "tokenizer": tiny.CHARS}],
    },
}
"""A run of each term that compares no caches: all but the term itself."""


def made(losses: list, **fields: Any) -> tuple[Distiller, dict]:
    spec = tiny.spec(**({"teachers": TEACHERS, "losses": losses} | fields))
    data: Data = make_data(spec)
    batch = data.plain_collator([data.train_items[i] for i in range(6)])
    return make_distiller(spec, data, seed=0), batch


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [2.0] * 5),
        ("linear", [2.0, 1.75, 1.5, 1.25, 1.0]),
        ("cosine", [1.5 + 0.5 * math.cos(math.pi * i / 4) for i in range(5)]),
    ],
)
def test_weights_follow_their_schedule(tmp_path: Path, schedule: str, expected: list[float]) -> None:
    losses = [{"name": "mercator", "weight": 2.0, "schedule": schedule, "end": 0.5}]
    train = {"steps": 5, "log_every": 1}
    result = run(tiny.spec(tmp_path, teachers=TEACHERS, losses=losses, train=train), variant="main", seed=0)
    lines = [line for line in read_metrics(result.folder / "metrics.jsonl") if "loss" in line]
    found = [(line["loss"] - line["ce"]) / line["mercator"] for line in lines]
    assert found == pytest.approx(expected, rel=1e-4)


def test_norms_are_those_of_separate_backward_passes() -> None:
    distiller, batch = made(["mercator", {"name": "relation", "weight": 3.0}])
    norms = gradient_norms(distiller.eval(), batch)
    side = batch["student"]
    items = torch.tensor([float((side["labels"][:, 1:] != -100).sum()), float(side["attention_mask"].sum())])

    def norm(value: Tensor) -> float:
        distiller.zero_grad()
        value.backward()
        squares = sum(
            float(p.grad.square().sum()) for p in distiller.student.parameters() if p.grad is not None
        )
        return squares**0.5

    for name in ("ce", "mercator", "relation"):
        ce, terms = distiller.terms(side, batch["teachers"], items)
        assert float(norms[name]) == pytest.approx(norm({"ce": ce, **terms}[name]), rel=1e-4)
    found = gradient_shares(distiller, batch)
    assert found["share/relation"] == pytest.approx(3 * float(norms["relation"] / norms["ce"]), rel=1e-5)


def test_a_share_sets_the_weight() -> None:
    distiller, batch = made([{"name": "mercator", "share": 0.25}, {"name": "relation", "weight": 3.0}])
    set_weights_by_share(distiller.eval(), [batch])
    assert gradient_shares(distiller, batch)["share/mercator"] == pytest.approx(0.25, rel=1e-4)
    assert distiller.pipeline.weights[1] == 3.0


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("mercator", {"losses": [{"name": "mercator", "share": 0.5}]}),
        ("logits", OTHER_TERMS["logits"] | {"losses": [], "logits": {"share": 0.5}}),
    ],
)
def test_a_share_is_set_before_the_first_step(tmp_path: Path, name: str, fields: dict[str, Any]) -> None:
    spec = tiny.spec(tmp_path, **fields, train={"steps": 3, "log_every": 1})
    result = run(spec, variant="main", seed=0)
    lines = [line for line in read_metrics(result.folder / "metrics.jsonl") if "loss" in line]
    weights = [(line["loss"] - line["ce"]) / line[name] for line in lines]
    assert weights == pytest.approx([weights[0]] * 3, rel=1e-3)
    assert weights[0] != pytest.approx(1.0, rel=0.05)
    assert f"share/{name}" in result.results


def test_share_and_weight_exclude_one_another() -> None:
    with pytest.raises(ValidationError, match="'share' sets the weight; leave 'weight' out"):
        tiny.spec(losses=[{"name": "mercator", "share": 0.5, "weight": 2.0}])


@pytest.mark.parametrize("name", OTHER_TERMS)
def test_logits_and_hidden_states_follow_their_schedule(name: str) -> None:
    term = {"weight": 2.0, "schedule": "linear", "end": 0.5}
    distiller, batch = made([], **OTHER_TERMS[name], **{name: term})
    items = distiller.loss_denominators(batch)
    found = []
    for progress in (0.0, 0.5, 1.0):
        distiller.set_progress(progress)
        terms = distiller.eval()(batch["student"], batch["teachers"], items)
        found.append(float((terms["loss"].detach() - terms["ce"]) / terms[name]))
    assert found == pytest.approx([2.0, 1.5, 1.0], rel=1e-4)


@pytest.mark.parametrize("name", OTHER_TERMS)
def test_logits_and_hidden_states_are_given_a_share_of_the_gradient(name: str, tmp_path: Path) -> None:
    """The share is λ · the term's own gradient over cross-entropy's; a checkpoint keeps λ."""
    fields = OTHER_TERMS[name] | {name: {"share": 0.25}}
    distiller, batch = made([], **fields)
    set_weights_by_share(distiller.eval(), [batch])
    weight = float(distiller.current_weights()[name])

    def slopes(factor: float) -> Tensor:
        distiller.set_first_weight(name, torch.tensor(factor))
        loss = distiller(batch["student"], batch["teachers"], distiller.loss_denominators(batch))["loss"]
        trained = [weight for weight in distiller.student.parameters() if weight.requires_grad]
        gradients = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
        return torch.cat([gradient.flatten().double() for gradient in gradients])

    without = slopes(0.0)
    assert float((slopes(weight) - without).norm() / without.norm()) == pytest.approx(0.25, rel=1e-3)
    assert gradient_shares(distiller, batch)[f"share/{name}"] == pytest.approx(0.25, rel=1e-3)
    distiller.set_first_weight(name, torch.tensor(weight))
    save_weights(distiller, tmp_path)
    other, _ = made([], **fields)
    assert float(other.current_weights()[name]) == 1.0
    load_weights(other, tmp_path)
    assert float(other.current_weights()[name]) == weight
