"""The control that knows tokens alone: what its vectors depend on, and that it trains like any teacher."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from kava_core.build.data import make_data
from kava_core.build.distiller import make_distiller
from kava_core.build.stored import store_ingredients
from kava_core.costs.plan import make_plan
from kava_core.data.store.index import store_digest
from kava_core.distill.calibration import aligned_targets
from kava_core.errors import SpecError
from kava_core.jobs.cache import write_store
from kava_core.jobs.profile.prepared_variant import check_can_profile
from kava_core.jobs.sample import SamplingOptions, sample_rationales
from kava_core.kv.capture.geometry import probe_geometry
from kava_core.models.stand_ins.token_identity import TokenTeacher, TokenVectors
from kava_core.protocols.axes import Cache
from kava_core.runs.metrics import read_metrics
from kava_core.train.run import run
from tests.support import tiny

IDS = torch.tensor([[5, 9, 5], [7, 5, 9]])


@cache
def config() -> Any:
    return AutoConfig.for_model(**tiny.llama(num_hidden_layers=3, num_key_value_heads=2, vocab_size=64))


def vectors(seed: int = 0) -> TokenVectors:
    return TokenVectors(config(), probe_geometry(config()), 64, seed=seed)


def test_a_token_has_one_vector_wherever_it_stands() -> None:
    keys = vectors().cache(IDS, (0, 2), ("keys", "queries")).keys
    assert keys is not None
    assert keys.shape == (2, 2, 2, 3, 8)
    assert torch.equal(keys[0, :, :, 0], keys[0, :, :, 2])
    assert torch.equal(keys[0, :, :, 0], keys[1, :, :, 1])
    assert not torch.equal(keys[0, :, :, 0], keys[0, :, :, 1])
    assert not torch.equal(keys[:, 0], keys[:, 1])


def test_vectors_do_not_depend_on_what_was_met_before() -> None:
    alone, after = vectors(), vectors()
    after.cache(torch.tensor([[1, 2, 3, 9]]), (1,), ("values",))
    assert torch.equal(
        alone.cache(IDS, (0, 1), ("values",)).any, after.cache(IDS, (0, 1), ("keys", "values")).values
    )
    assert not torch.equal(vectors(1).cache(IDS, (0,), ("keys",)).any, alone.cache(IDS, (0,), ("keys",)).any)


def test_entries_are_independent_standard_normal() -> None:
    every = vectors().cache(torch.arange(64)[None], (0, 1, 2), ("keys", "values"))
    flat = torch.cat([every.keys.flatten(), every.values.flatten()]).double().numpy()
    error = 5 / np.sqrt(flat.size)
    assert abs(flat.mean()) < error
    assert abs(flat.var() - 1) < 1.5 * error
    keys, values = every.keys.flatten().numpy(), every.values.flatten().numpy()
    assert abs(np.corrcoef(keys, values)[0, 1]) < 2 * error


def test_layer_by_layer_is_the_same_cache() -> None:
    teacher = TokenTeacher("t", vectors(), layers=(2, 0), parts=("keys", "values"))
    side = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    seen: dict[int, Cache] = {}
    teacher.read_by_layer(side, seen.__setitem__)
    whole = teacher.cache(side)
    for part, tensor in whole.items():
        assert torch.equal(torch.cat([getattr(seen[place], part) for place in (0, 1)], 1), tensor)


TOKENS = {"stand_in": {"kind": "token_identity"}}
RIDGE = {"name": "calibrated", "method": "ridge"}
ALIGN: dict[str, Any] = {"dim_projector": RIDGE, "time_warper": "char_iou"}


def identity_spec(folder: Path, align: dict[str, Any] = ALIGN, **changes: Any) -> Any:
    teachers = [teacher | TOKENS | {"align": align} for teacher in tiny.FIELDS["teachers"]]
    return tiny.spec(folder, teachers=teachers, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train": {"stream": True}},
        {"rotary": "match"},
        {"losses": [{"name": "attention_output"}], "target": "separate"},
        {"online": {"share": 0.5, "max_new_tokens": 4}},
    ],
    ids=str,
)
def test_a_run_trains_against_tokens_and_no_model_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    if "online" in changes or "attention_output" in str(changes):
        spec = identity_spec(tmp_path, {"time_warper": "segment"}, **changes)
    else:
        spec = identity_spec(tmp_path, **changes)
    monkeypatch.setattr("kava_core.models.stand_ins.load_teacher.load_model", _fail)
    result = run(spec, variant="main", seed=0)
    assert np.isfinite(result.results["ce"])
    record = json.loads((result.folder / "run.json").read_text())
    assert record["models"]["wide"]["stand_in"] == {"kind": "token_identity", "seed": 0}
    assert record["compute"]["flops_of"]["wide"] == 0 < record["compute"]["flops_of"]["alignment"]
    assert record["compute"]["teacher_tokens"] > 0


def _fail(*_: Any, **__: Any) -> None:
    raise AssertionError("a model was loaded")


def test_an_aligned_target_is_the_vectors_through_every_stage(tmp_path: Path) -> None:
    """With the same tokenizer, layers, heads and width the stages change nothing: brute force by hand."""
    same = {"name": "same", "config": tiny.llama(), "tokenizer": tiny.CHARS, **TOKENS}
    align = {"time_warper": "identity", "dim_projector": "identity", "sinks": "compare"}
    spec = tiny.spec(tmp_path, teachers=[same | {"align": align}], losses=[{"name": "mse"}])
    data = make_data(spec)
    distiller = make_distiller(spec, data, seed=0)
    batch = data.plain_collator(data.train_items.items[:3])
    (aligned,) = aligned_targets(distiller, batch)
    ids = batch["teachers"]["same"]["input_ids"]
    token, row = int(ids[1, 4]), 1
    drawn = np.random.default_rng([0, token]).standard_normal((2, 2 * 2 * 8 + 4 * 8 + 32), np.float32)
    for layer in range(2):
        expected = drawn[layer, 16:32].reshape(2, 8)
        assert np.array_equal(aligned.target.values[row, layer, :, 4].numpy(), expected)


def test_a_measured_layer_map_is_the_controls_own(tmp_path: Path) -> None:
    for compared in ("values", "hidden"):
        align = {"layer_mapper": {"name": "cka", "on": compared}, "time_warper": "segment"}
        result = run(identity_spec(tmp_path / compared, align), variant="main", seed=0)
        record = json.loads((result.folder / "layer_maps" / "wide.json").read_text())
        assert record["measured"]["teacher"]["stand_in"]["kind"] == "token_identity"


def test_a_store_of_the_control_is_another_and_gives_the_same_curve(tmp_path: Path) -> None:
    stored = {"store": {"folder": str(tmp_path / "stores"), "dtype": "float32"}}
    plain = {"align": {"time_warper": "segment"}}["align"]
    spec = identity_spec(tmp_path / "stored", plain, **stored)
    trained = tiny.spec(tmp_path / "trained", **stored)
    data = make_data(spec)
    digests = {store_digest(store_ingredients(each, data, seed=0)) for each in (spec, trained)}
    assert len(digests) == 2
    write_store(spec, seed=0)
    curves = []
    for each in (spec, identity_spec(tmp_path / "running", plain)):
        lines = read_metrics(run(each, variant="main", seed=0).folder / "metrics.jsonl")
        curves.append([line["loss"] for line in lines if "loss" in line])
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


def test_latent_tokens_are_compared_with_evicted_vectors(tmp_path: Path) -> None:
    """RKV chooses tokens by the vectors' queries and keys, and the run ends in finite numbers."""
    teacher = {"name": "gpt", "config": tiny.llama(), "tokenizer": tiny.CHARS, **TOKENS}
    align = {"time_warper": "rkv", "dim_projector": "identity"}
    spec = tiny.spec(
        tmp_path,
        teachers=[teacher | {"align": align}],
        trajectory="latent",
        latent={"count": 3, "passes": 2},
        losses=[{"name": "smooth_l1"}],
    )
    result = run(spec, variant="main", seed=0)
    assert np.isfinite(result.results["smooth_l1"])


def test_a_map_measured_on_the_control_is_refused_for_the_teacher(tmp_path: Path) -> None:
    align = {"layer_mapper": {"name": "cka", "on": "keys"}, "time_warper": "segment"}
    measured = run(identity_spec(tmp_path, align), variant="main", seed=0).folder / "layer_maps"
    align["layer_mapper"] = {"name": "cka", "on": "keys", "map": str(measured / "wide.safetensors")}
    wide = tiny.FIELDS["teachers"][0] | {"align": align}
    with pytest.raises(SpecError, match=r"was measured with another teacher \(stand_in differ\)"):
        run(tiny.spec(tmp_path / "trained", teachers=[wide]), variant="main", seed=0)


def test_what_needs_a_model_is_refused_by_name(tmp_path: Path) -> None:
    spec = identity_spec(tmp_path)
    with pytest.raises(SpecError, match="teacher 'wide': stand_in 'token_identity' has no model"):
        check_can_profile(spec)
    with pytest.raises(SpecError, match=r"teacher 'wide' is a control \(stand_in\)"):
        sample_rationales(spec, "wide", tmp_path / "out.jsonl", SamplingOptions())


def test_a_plan_holds_no_weights_for_it(tmp_path: Path) -> None:
    plan = make_plan(identity_spec(tmp_path), time=16, t_time=16)
    assert [cost.name for cost in plan.models] == ["student"]
    assert set(plan.flops) == {"student", "alignment"}
