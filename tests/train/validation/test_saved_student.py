"""The saved student is the evaluated one, or the run fails."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from kava_core.data.encoding.encode import encode_text
from kava_core.data.examples import render_example
from kava_core.data.splits import load_splits
from kava_core.errors import KavaError
from kava_core.train.run import RunResult, run
from tests.support import tiny

TARGETS = [["q_proj", "lm_head"], ["q_proj", "embed_tokens"], ["embed_tokens", "lm_head"]]


def lora_run(tmp_path: Path, targets: list[str], **changes: Any) -> RunResult:
    student = {
        "config": tiny.llama(tie_word_embeddings=True),
        "tokenizer": tiny.CHARS,
        "lora": {"rank": 8, "targets": targets},
    }
    train = {"steps": 12, "learning_rate": 3e-2}
    spec = tiny.spec(tmp_path, student=student, teachers=[], losses=[], train=train, **changes)
    return run(spec, variant="main", seed=1)


@torch.no_grad()
def cross_entropy_of_saved(result: RunResult, spec_data: Any) -> float:
    """Nats a completion token, one text at a time, by transformers alone."""
    folder = result.folder / "student"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for example in load_splits(spec_data, root=Path()).validation[:8]:
        encoded = encode_text(render_example(example, spec_data.template), tokenizer)
        assert encoded is not None
        logits = model(encoded.input_ids[None]).logits[0, :-1].double()
        labels = encoded.labels[1:]
        total += float(F.cross_entropy(logits, labels, reduction="sum"))
        count += int(labels.ne(-100).sum())
    return total / count


@pytest.mark.parametrize("targets", TARGETS, ids="-".join)
def test_adapters_of_tied_layers_are_saved_as_they_were_trained(tmp_path: Path, targets: list[str]) -> None:
    result = lora_run(tmp_path, targets)
    data = tiny.spec(tmp_path).data
    assert result.results["ce"] == pytest.approx(cross_entropy_of_saved(result, data), rel=1e-4)


def test_another_student_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was before adapters of tied layers were told apart."""
    monkeypatch.setattr("kava_core.train.save_student._untie_adapted_embeddings", lambda student: None)
    with pytest.raises(KavaError, match=r"the saved student is not the trained one: .* merging its adapters"):
        lora_run(tmp_path, TARGETS[0])


def test_how_many_weights_moved_is_recorded(tmp_path: Path) -> None:
    """A bfloat16 weight of about 0.02 has steps of 1e-4: an update of 1e-6 does not move it."""
    shares = {}
    for dtype, rate in (("float32", 1e-6), ("bfloat16", 1e-6), ("bfloat16", 1e-1)):
        student = {"config": tiny.llama(), "tokenizer": tiny.CHARS, "dtype": dtype}
        train = {"steps": 2, "learning_rate": rate, "warmup_steps": 0, "weight_decay": 0.0}
        spec = tiny.spec(tmp_path / dtype / str(rate), student=student, teachers=[], losses=[], train=train)
        folder = run(spec, variant="main", seed=1).folder
        shares[dtype, rate] = json.loads((folder / "run.json").read_text())["moved_weights"]
    assert all(math.isfinite(share) for share in shares.values())
    assert shares["float32", 1e-6] > 0.8
    assert shares["bfloat16", 1e-6] < 0.2
    assert shares["bfloat16", 1e-1] > 0.8
