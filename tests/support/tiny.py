"""Specs so small that a training run takes a second."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

from kava_core.registry import Registry
from kava_core.specfile.bind import bind_spec_model
from kava_core.specfile.sections.pipeline import PipelineSpec


def llama(**changes: Any) -> dict[str, Any]:
    """A two-layer Llama config with grouped-query attention."""
    fields = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    return fields | changes


def gpt2(**changes: Any) -> dict[str, Any]:
    """A three-layer GPT-2 config, six heads wide."""
    return {"model_type": "gpt2", "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 128} | changes


CHARS = {"kind": "chars", "vocab_size": 64}
BPE = {"kind": "bpe", "vocab_size": 300}

FIELDS: dict[str, Any] = {
    "name": "tiny",
    "student": {"config": llama(), "tokenizer": CHARS},
    "teachers": [
        {
            "name": "wide",
            "config": llama(num_hidden_layers=4, hidden_size=64, num_key_value_heads=4),
            "tokenizer": BPE,
        },
        {"name": "gpt", "config": gpt2(), "tokenizer": CHARS},
    ],
    "target": "separate",
    "losses": [{"name": "mercator", "weight": 0.5}, {"name": "relation"}],
    "data": {"name": "chain", "steps": 2, "train": 64, "validation": 16},
    "train": {
        "steps": 6,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "log_every": 1,
        "save_every": 2,
        "calibration_examples": 32,
    },
    "evaluate": {"every": 3, "examples": 8, "max_new_tokens": 6},
}


@cache
def _bound() -> type[PipelineSpec]:
    return bind_spec_model(Registry.build())


def fields(**changes: Any) -> dict[str, Any]:
    """The tiny spec's fields; a dict given for a section changes only the keys it names."""
    made = copy.deepcopy(FIELDS)
    for name, value in changes.items():
        made[name] = (
            made[name] | value if isinstance(value, dict) and isinstance(made.get(name), dict) else value
        )
    return made


def spec(output: Path | str = "runs", **changes: Any) -> PipelineSpec:
    """The tiny spec, bound to the installed components."""
    return _bound().model_validate(fields(**changes) | {"output": str(output)})
