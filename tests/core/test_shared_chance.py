"""Variants of one seed share what is left to chance: weights, data order, dropout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kava_core.train.metrics import read_metrics
from kava_core.train.run import run
from tests import tiny

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
