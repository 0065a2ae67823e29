"""Results and trained teachers belong to the examples they were made from."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from kava_core.errors import Preempted, SpecError
from kava_core.train import run as run_module
from kava_core.train.run import run
from kava_core.train.validation.evaluator import Evaluator
from tests.support import tiny


def write(file: Path, offset: int) -> None:
    numbers = range(offset, offset + 24)
    lines = [json.dumps({"prompt": f"{i}+1", "reasoning": f"{i + 1}", "answer": f"{i + 1}"}) for i in numbers]
    file.write_text("\n".join(lines))


def spec(folder: Path, **changes: object) -> object:
    """A tiny spec on a JSON-lines file, with one teacher that is trained on the spot."""
    file = str(folder / "data.jsonl")
    teacher = {"name": "made", "config": tiny.llama(), "tokenizer": tiny.CHARS, "pretrain": {"steps": 1}}
    made = tiny.fields(teachers=[teacher], train={"steps": 1}, evaluate={"max_new_tokens": 2}) | changes
    made["data"] = {"name": "jsonl", "train": file, "validation": file}
    return tiny._bound().model_validate(made | {"output": str(folder / "runs")})


def test_a_finished_run_is_not_shown_for_other_data(tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", 0)
    run(spec(tmp_path), variant="main", seed=0)
    write(tmp_path / "data.jsonl", 100)
    with pytest.raises(SpecError, match="the data changed since this run ended"):
        run(spec(tmp_path), variant="main", seed=0)


def test_a_teacher_trained_on_other_data_is_not_reused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KAVA_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "data.jsonl", 0)
    run(spec(tmp_path), variant="main", seed=0)
    run(spec(tmp_path, rotary="keep"), variant="main", seed=0)
    trained = tmp_path / "cache" / "pretrained"
    assert len(list(trained.iterdir())) == 1
    write(tmp_path / "data.jsonl", 100)
    run(spec(tmp_path, name="other"), variant="main", seed=0)
    assert len(list(trained.iterdir())) == 2


def test_a_signal_in_the_last_evaluation_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = Evaluator.__call__

    def interrupted(self: Evaluator, distiller: object) -> dict[str, float]:
        signal.raise_signal(signal.SIGTERM)
        return evaluate(self, distiller)

    monkeypatch.setattr(run_module.Evaluator, "__call__", interrupted)
    short = tiny.spec(tmp_path, losses=[], teachers=[], train={"steps": 2}, evaluate={"every": 50})
    with pytest.raises(Preempted, match="finished; SIGTERM stops what comes after it"):
        run(short, variant="main", seed=0)
    monkeypatch.undo()
    assert run(short, variant="main", seed=0).results["steps"] == 2
