"""The collapse monitor tells an aligner that moved from a student that moved."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kava_core.kv.maths.rank_and_cosine import (
    absorbed_share,
    effective_rank,
    mean_cosine,
    mean_variance,
    valid_rows,
)
from kava_core.train.run import RunResult, run
from kava_core.train.summary import collapse_warnings
from tests.support import tiny

ALIGN = {"dim_projector": "linear"}


def rank_by_hand(rows: np.ndarray) -> float:
    values = np.linalg.svd(rows - rows.mean(0), compute_uv=False) ** 2
    share = values[values > 0] / values.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


@pytest.mark.parametrize(("positions", "dim"), [(40, 6), (5, 12), (1, 4)])
def test_effective_rank_is_that_of_the_singular_values(positions: int, dim: int) -> None:
    rows = torch.randn(2, 3, positions, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = effective_rank(rows)
    if positions == 1:
        assert torch.equal(found, torch.zeros(2, 3, dtype=torch.float64))
        return
    for layer in range(2):
        for head in range(3):
            assert found[layer, head].item() == pytest.approx(rank_by_hand(rows[layer, head].numpy()))


def test_effective_rank_of_known_spectra() -> None:
    line = torch.outer(torch.linspace(-1, 1, 50), torch.ones(4))
    square = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    assert effective_rank(line[None, None]).item() == pytest.approx(1, abs=1e-4)
    assert effective_rank(square[None, None]).item() == pytest.approx(2, abs=1e-6)
    assert effective_rank(torch.ones(1, 1, 3, 4)).item() == 0


def test_rows_leave_out_what_is_not_valid() -> None:
    x = torch.arange(2 * 1 * 2 * 3 * 1).view(2, 1, 2, 3, 1).float()
    valid = torch.tensor([[True, False, True], [False, False, True]])
    assert valid_rows(x, valid).flatten().tolist() == [0, 2, 8, 3, 5, 11]
    assert valid_rows(x, torch.zeros_like(valid)).shape == (1, 2, 0, 1)


def test_variance_and_cosine() -> None:
    rows = torch.tensor([[[[1.0, 0], [3.0, 0]]]])
    assert mean_variance(rows).item() == 0.5
    assert mean_cosine(rows, torch.tensor([[[[0.0, 1], [6.0, 0]]]])).item() == pytest.approx(0.5)
    assert mean_cosine(rows, torch.zeros_like(rows)).item() == 0


def test_absorbed_share() -> None:
    def share(*losses: float) -> float:
        return float(absorbed_share(*map(torch.tensor, losses)))

    assert share(4.0, 1.0, 0.0) == 0.75
    assert share(4.0, 4.0, 1.0) == 0
    assert np.isnan(share(1.0, 0.5, 2.0))


def trained(folder: Path, *, learning_rate: float, own: float | None) -> RunResult:
    """A run whose student hardly moves, or moves as its aligner does."""
    projector = {"name": "linear", "learning_rate": own}
    teacher = tiny.fields()["teachers"][0] | {"align": {"dim_projector": projector}}
    return run(
        tiny.spec(
            folder,
            teachers=[teacher],
            losses=["mse"],
            train={"learning_rate": learning_rate, "schedule": "constant", "steps": 12},
        ),
        variant="main",
        seed=0,
    )


def test_an_aligner_that_does_all_the_work_is_pointed_out(tmp_path: Path) -> None:
    absorbing = trained(tmp_path / "absorbing", learning_rate=1e-6, own=3e-2)
    honest = trained(tmp_path / "honest", learning_rate=1e-2, own=1e-7)
    assert absorbing.results["collapse/absorbed"] > 0.9
    assert abs(honest.results["collapse/absorbed"]) < 0.1
    assert [line.split(":")[0] for line in collapse_warnings([absorbing, honest])] == ["main seed 0"]
    moved = (
        absorbing.results["collapse/wide/keys/cosine"] - absorbing.results["collapse/wide/keys/frozen_cosine"]
    )
    assert moved > 0.05
    assert (
        absorbing.results["collapse/wide/values/variance"] < honest.results["collapse/wide/values/variance"]
    )


def test_every_evaluation_is_watched_and_frozen_aligners_absorb_nothing(tmp_path: Path) -> None:
    result = run(tiny.spec(tmp_path, losses=["mercator"]), variant="main", seed=0)
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    watched = [line for line in lines if "eval_collapse/wide/keys/rank" in line]
    assert [line["step"] for line in watched] == [3, 6]
    assert {"eval_collapse/gpt/values/variance", "eval_collapse/gpt/keys/cosine"} <= watched[0].keys()
    assert not any("absorbed" in name or "frozen" in name for name in watched[0])
    assert 1 <= watched[0]["eval_collapse/wide/keys/rank"] <= 8


@pytest.mark.parametrize("fuser", ["learnable", "attention", "reinforce"])
def test_routers_are_watched_with_trained_aligners(tmp_path: Path, fuser: str) -> None:
    align = {"dim_projector": "linear", "sinks": "compare"}
    teachers = [teacher | {"align": align} for teacher in tiny.fields()["teachers"]]
    result = run(tiny.spec(tmp_path, teachers=teachers, fuser=fuser), variant="main", seed=0)
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    shares = [line["weight/wide"] + line["weight/gpt"] for line in lines if "loss" in line]
    assert shares == pytest.approx([1.0] * len(shares), abs=1e-5)
    assert all("router" in line for line in lines if "loss" in line)
    assert "collapse/wide/keys/rank" in result.results
