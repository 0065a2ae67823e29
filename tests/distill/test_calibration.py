"""A teacher with NaN or infinity is found before anything is calibrated on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kava_core import shapecheck
from kava_core.errors import NonFiniteError
from kava_core.train.run import run
from tests.support import tiny


def broken_teacher(folder: Path, layer: int, value: float, **align: Any) -> dict[str, Any]:
    """A teacher of four layers in a folder, with one bad number in the keys of one layer."""
    config = AutoConfig.for_model(**tiny.llama(num_hidden_layers=4, vocab_size=64))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.model.layers[layer].self_attn.k_proj.weight[0, 0] = value
    model.save_pretrained(folder)
    return {"name": "bad", "path": str(folder), "tokenizer": tiny.CHARS, "align": align}


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "projector": (
        {},
        {"losses": ["mse"]},
        "teacher 'bad': its keys of layers [3] hold NaN or infinity; nothing can be calibrated on them",
    ),
    "loss": (
        {"dim_projector": "identity"},
        {"losses": [{"name": "shared_space", "parts": ["keys"]}]},
        "the aligned cache of teacher 'bad': keys of layers [1] hold NaN or infinity at valid positions",
    ),
    "share": (
        {"dim_projector": "identity"},
        {"losses": [{"name": "mse", "share": 0.3}]},
        "the aligned cache of teacher 'bad': keys of layers [1] hold NaN or infinity at valid positions",
    ),
    "layer mapper": (
        {"layer_mapper": {"name": "cka", "on": "keys"}},
        {"losses": ["mse"]},
        "the teacher's keys of layers [3] hold NaN or infinity; layers cannot be compared",
    ),
}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("case", CASES)
def test_a_teacher_that_is_not_finite_is_named_with_its_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, value: float
) -> None:
    """Debug mode would stop one stage earlier."""
    monkeypatch.setattr(shapecheck, "active", lambda: False)
    align, changes, expected = CASES[case]
    teacher = broken_teacher(tmp_path / "bad", 3, value, **align)
    spec = tiny.spec(tmp_path, teachers=[teacher], **changes)
    with pytest.raises(NonFiniteError) as told:
        run(spec, variant="main", seed=0)
    assert told.value.exit_code == 4
    assert str(told.value) == expected
