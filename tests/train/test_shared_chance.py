"""Variants of one seed share what is left to chance: weights, data order, dropout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kava_core.build.data import make_data
from kava_core.errors import SpecError
from kava_core.runs.metrics import read_metrics
from kava_core.train.run import run
from tests.support import tiny

DROPS = tiny.gpt2(resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)
TINY = 1e-30
"""A weight that changes no bit of the student."""


def curve(folder: Path, seed: int = 0, **changes: Any) -> list[float]:
    spec = tiny.spec(
        folder,
        student={"config": DROPS, "tokenizer": tiny.CHARS},
        train={"accumulate": 2, "steps": 4, "save_every": 4, "clip": 1e9},
        **changes,
    )
    lines = read_metrics(run(spec, variant="main", seed=seed).folder / "metrics.jsonl")
    return [line["ce"] for line in lines if "ce" in line]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return curve(tmp_path_factory.mktemp("alone"), losses=[])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"fuser": {"name": "fixed", "sample": 1}},
        {"fuser": {"name": "reinforce"}},
        {"target": "fused", "fuser": {"name": "learnable"}},
    ],
    ids=["all", "drawn", "reinforced", "learnable"],
)
def test_dropout_and_order_do_not_depend_on_the_teachers(
    alone: list[float], tmp_path: Path, changes: dict[str, Any]
) -> None:
    losses = [{"name": "mercator", "weight": TINY}]
    assert curve(tmp_path, losses=losses, **changes) == alone


def test_another_seed_is_another_run(alone: list[float], tmp_path: Path) -> None:
    other = curve(tmp_path, seed=1, losses=[])
    assert len(set(other) & set(alone)) == 0


def test_dropout_differs_between_passes_and_steps(tmp_path: Path) -> None:
    """With no learning and one batch seen again and again only dropout is left to vary."""
    data = {"name": "chain", "steps": 2, "train": 8, "validation": 8}
    train = {"steps": 4, "batch_size": 8, "learning_rate": 1e-20, "save_every": 4}
    spec = tiny.spec(
        tmp_path, student={"config": DROPS, "tokenizer": tiny.CHARS}, losses=[], data=data, train=train
    )
    lines = read_metrics(run(spec, variant="main", seed=0).folder / "metrics.jsonl")
    seen = [line["ce"] for line in lines if "ce" in line]
    assert len(set(seen)) == len(seen) == 4


def mixed(folder: Path, **changes: Any) -> Any:
    """A teacher of characters needs more tokens than its student."""
    train = {"max_length": 14, "steps": 2, "save_every": 2}
    student = {"config": tiny.llama(), "tokenizer": tiny.BPE}
    data = {"name": "chain", "steps": 2, "modulus": 12, "train": 64, "validation": 16}
    return tiny.spec(folder, student=student, train=train, data=data, **changes)


def test_all_variants_see_the_same_examples_whichever_teachers_run(tmp_path: Path) -> None:
    """A teacher that runs in one variant alone leaves out what is too long for it in all of them."""
    kept = []
    for losses in ([], tiny.FIELDS["losses"]):
        spec = mixed(tmp_path, losses=losses)
        record = json.loads((run(spec, variant="main", seed=0).folder / "run.json").read_text())
        kept.append((record["data"]["kept"], record["data"]["too_long"], record["compute"]["student_tokens"]))
    assert kept[0] == kept[1]
    assert kept[0][1]["train"] > 0
    fewer = make_data(mixed(tmp_path, losses=[])).train_items
    assert fewer.dropped < kept[0][1]["train"]


def test_a_frozen_probe_trains_its_aligner_alone(tmp_path: Path) -> None:
    align = {"dim_projector": "linear", "time_warper": "segment"}
    teacher = tiny.FIELDS["teachers"][0] | {"align": align}
    folders = [
        run(
            tiny.spec(
                tmp_path,
                student=tiny.FIELDS["student"] | {"frozen": True},
                teachers=[teacher],
                train={"steps": steps, "save_every": steps, "learning_rate": 1e-2},
            ),
            variant="main",
            seed=0,
        ).folder
        for steps in (1, 6)
    ]
    weights = [load_file(folder / "student" / "model.safetensors") for folder in folders]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    results = [json.loads((folder / "run.json").read_text())["results"] for folder in folders]
    assert results[0]["ce"] == results[1]["ce"]
    assert results[1]["mercator"] < results[0]["mercator"]


def test_a_frozen_student_without_an_aligner_to_train_is_refused(tmp_path: Path) -> None:
    spec = tiny.spec(tmp_path, student=tiny.FIELDS["student"] | {"frozen": True})
    with pytest.raises(SpecError, match=r"student\.frozen: no aligner or router is trained either"):
        run(spec, variant="main", seed=0)
