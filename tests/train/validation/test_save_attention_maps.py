"""What a finished run's models attend to: kept by training, drawn by the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kava_core.errors import CheckpointError
from kava_core.experiment.report.write_report import write_report
from kava_core.runs.folder import Folder
from kava_core.train.run import run
from kava_core.train.validation.save_attention_maps import (
    LAYERS,
    compute_attention_maps,
    evenly_spaced_layers,
    save_attention_maps,
)
from tests.experiment.report.report_runs import declare, falling, write_run
from tests.support import tiny


@pytest.mark.parametrize(("count", "kept"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (7, [0, 3, 6])])
def test_layers_are_spread_from_the_first_to_the_last(count: int, kept: list[int]) -> None:
    assert evenly_spaced_layers(count) == kept


def test_a_run_keeps_what_its_models_attend_to(tmp_path: Path) -> None:
    kept = Folder(run(tiny.spec(tmp_path), variant="main", seed=0).folder)
    maps, told = load_file(kept.attention_maps), json.loads(kept.attention_tokens.read_text())
    assert maps.keys() == told.keys() == {"student", "wide", "gpt"}
    for name, one in told.items():
        layers, time = len(one["layers"]), len(one["tokens"])
        assert maps[name].shape == (layers, time, time)
        assert layers == min(LAYERS, {"student": 2, "wide": 4, "gpt": 3}[name])
        torch.testing.assert_close(maps[name].sum(-1).float(), torch.ones(layers, time), rtol=0, atol=5e-3)
        assert not maps[name].triu(1).any()
    assert told["wide"]["tokens"] != told["gpt"]["tokens"]  # each in its own tokens


def test_the_maps_are_softmax_of_the_layer_s_scores(tmp_path: Path) -> None:
    made = run(tiny.spec(tmp_path, teachers=[], losses=[]), variant="main", seed=0)
    model: Any = AutoModelForCausalLM.from_pretrained(made.folder / "student").train()
    tokenizer = AutoTokenizer.from_pretrained(made.folder / "student")
    ids = torch.tensor(tokenizer("1+2*3?")["input_ids"])
    layers, found = compute_attention_maps(model, ids)
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    attention, seen = model.model.layers[0].self_attn, []
    handle = attention.register_forward_pre_hook(
        lambda _, args, given: seen.append((given["hidden_states"], *given["position_embeddings"])),
        with_kwargs=True,
    )
    with torch.no_grad():
        model.eval()(input_ids=ids[None], use_cache=False)
    handle.remove()
    (hidden, cos, sin), width = seen[0], attention.head_dim
    queries, keys = (
        proj(hidden).view(1, len(ids), -1, width).transpose(1, 2)
        for proj in (attention.q_proj, attention.k_proj)
    )

    def turned(x: torch.Tensor) -> torch.Tensor:
        left, right = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat([-right, left], -1) * sin[:, None]

    keys = turned(keys).repeat_interleave(queries.shape[1] // keys.shape[1], 1)
    scores = turned(queries) @ keys.mT / width**0.5
    hidden_ones = torch.ones(len(ids), len(ids)).triu(1).bool()
    wanted = scores.masked_fill(hidden_ones, -torch.inf).softmax(-1).mean(1)[0]
    assert layers == [0, 1]
    torch.testing.assert_close(found[0], wanted.detach())


def test_a_model_that_cannot_tell_is_noted(tmp_path: Path) -> None:
    class Silent(torch.nn.Linear):
        config = type("Config", (), {"_attn_implementation": "sdpa"})

    side = {"input_ids": torch.ones(1, 3).long(), "attention_mask": torch.ones(1, 3).long()}
    folder = Folder(tmp_path)
    save_attention_maps(folder, {"student": Silent(1, 1)}, {"student": side, "teachers": {}}, {})
    told = json.loads(folder.attention_tokens.read_text())
    assert "set_attn_implementation" in told["student"]["unknown"]
    assert load_file(folder.attention_maps) == {}


def with_maps(folder: Path, tokens: int) -> Path:
    for variant in ("kv", "no_kv"):
        made = Folder(write_run(folder, variant, 0, falling(1.0)))
        told = {"student": {"layers": [0, 1], "tokens": ["$<b>"] * tokens}, "t5": {"unknown": "no"}}
        made.attention_tokens.write_text(json.dumps(told))
        weights = torch.rand(2, tokens, tokens).softmax(-1).half().numpy()
        save_arrays({"student": weights}, made.attention_maps)
    declare(folder, {"metric": "ce"}, "kv")
    return folder


@pytest.mark.parametrize("tokens", [1, 9, 64])
def test_the_report_draws_them(tmp_path: Path, tokens: int) -> None:
    list(write_report([with_maps(tmp_path / "x", tokens)], tmp_path / "out"))
    page = (tmp_path / "out" / "report.md").read_text()
    assert "Attention maps after training, kv seed 0: student (layers 0, 1)" in page
    assert {f.name for f in (tmp_path / "out" / "figures").glob("attention-*.png")} == {
        "attention-kv.png",
        "attention-no-kv.png",
    }


def test_damaged_maps_are_said(tmp_path: Path) -> None:
    folder = with_maps(tmp_path / "x", 3)
    Folder(next(folder.glob("run-*"))).attention_maps.write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r"attention\.safetensors: unreadable"):
        list(write_report([folder], tmp_path / "out"))
