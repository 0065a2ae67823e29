"""What teachers that are trained on the spot have seen of their student's examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kava_core.train.pretrain import pretraining_report
from kava_core.train.run import run
from kava_core.train.summary import pretrained_scores
from tests.support import tiny

DATA = {"name": "chain", "steps": 2, "train": 32, "validation": 16}


def spec(output: Path | str = "runs", **data: Any) -> Any:
    plan = {"steps": 2, "batch_size": 8, "data": data}
    return tiny.spec(output, data=DATA, teachers=[tiny.FIELDS["teachers"][0] | {"pretrain": plan}])


@pytest.mark.parametrize(
    ("data", "train", "validation"),
    [({}, 32, 0), ({"train_skip": 32}, 0, 0), ({"train_skip": 24}, 8, 0), ({"train": 8}, 8, 0)],
)
def test_shared_examples_are_counted(data: dict[str, Any], train: int, validation: int) -> None:
    (found,) = pretraining_report(spec(**data)).values()
    assert (found["shared_with_train"], found["shared_with_validation"]) == (train, validation)


def test_a_teacher_of_another_seed_may_know_the_validation_examples() -> None:
    found = pretraining_report(spec(seed=1, train=5_000))["wide"]
    assert found["examples"] == 5_000
    assert found["shared_with_validation"] >= 12  # 5,000 of the 5,290 chains there are


def test_models_from_elsewhere_are_not_reported() -> None:
    assert pretraining_report(tiny.spec()) == {}


def test_the_run_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAVA_CACHE", str(tmp_path / "cache"))
    result = run(spec(tmp_path, train_skip=32), variant="main", seed=0)
    record = json.loads((result.folder / "run.json").read_text())
    assert record["pretraining_data"]["wide"]["shared_with_train"] == 0
    assert record["pretraining_data"]["wide"]["examples"] == 32
    skill = record["models"]["wide"]["results"]
    assert skill["ce"] > 0
    (told,) = pretrained_scores([result])
    assert told.startswith(f"wide: trained on the spot; validation cross-entropy {skill['ce']:.3g}, exact")
