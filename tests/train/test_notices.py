"""What a run tells on stderr of spec and data before it trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kava_core.console import tell_once
from kava_core.train.run import run
from tests.support import tiny


def test_validation_prompts_that_are_training_prompts_and_special_tokens_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "d.jsonl"
    prompts = [f"{number}+1?" for number in range(8)]
    lines = [{"prompt": prompt, "reasoning": "a <eos> b", "answer": "7"} for prompt in prompts]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"name": "jsonl", "train": str(file), "validation": str(file), "validation_limit": 4}
    fields = tiny.fields(teachers=[], losses=[], train={"steps": 1}) | {"data": data}
    spec = tiny.spec(tmp_path).model_validate(fields | {"output": str(tmp_path)})
    tell_once.cache_clear()
    run(spec, variant="main", seed=1)
    told = capsys.readouterr().err.splitlines()
    assert "data: 4 of 4 validation examples have a prompt that is also a training prompt" in told
    special = (
        "student: the data's own text holds special tokens of its tokenizer, such as '<eos>', in 12 of 12"
    )
    assert f"{special} examples; they are read as text" in told
