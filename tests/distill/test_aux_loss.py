"""A mixture of experts is trained on its router's loss too: kava's loss is transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kava_core.build.data import make_data
from kava_core.build.distiller import make_distiller
from kava_core.distill.distiller import Distiller
from kava_core.train.run import run
from tests.support import tiny

MIXTURE = {
    "model_type": "mixtral",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.5,
    "max_position_embeddings": 128,
}


def mixture(tmp_path: Path, **config: Any) -> tuple[Distiller, dict[str, Any]]:
    student = {"config": MIXTURE | config, "tokenizer": tiny.CHARS}
    spec = tiny.spec(tmp_path, student=student, teachers=[], losses=[])
    data = make_data(spec)
    return make_distiller(spec, data, seed=0), data.collator([data.train_items[i] for i in range(6)])


@pytest.mark.parametrize("labels", ["all", "completion"])
def test_the_loss_is_that_of_transformers(tmp_path: Path, labels: str) -> None:
    distiller, batch = mixture(tmp_path, output_router_logits=True)
    side = dict(batch["student"])
    if labels == "all":
        side["labels"] = side["input_ids"].masked_fill(side["attention_mask"].eq(0), -100)
    found = distiller(side, {}, distiller.loss_denominators(batch | {"student": side}))
    student: Any = distiller.student
    own = student(**{name: side[name] for name in ("input_ids", "attention_mask", "labels")}, use_cache=False)
    torch.testing.assert_close(found["loss"], own.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["aux_loss"], own.aux_loss, rtol=1e-5, atol=1e-6)
    assert found["loss"] - found["ce"] > 0.4


def test_a_step_of_several_passes_weighs_them_by_their_tokens(tmp_path: Path) -> None:
    distiller, batch = mixture(tmp_path, output_router_logits=True)
    side, items = batch["student"], distiller.loss_denominators(batch)
    total, expected = 0.0, 0.0
    for rows in (slice(0, 2), slice(2, 6)):
        part = {name: value[rows] for name, value in side.items() if isinstance(value, torch.Tensor)}
        total += float(distiller(part, {}, items)["aux_loss"])
        student: Any = distiller.student
        loss = student(part["input_ids"], attention_mask=part["attention_mask"], use_cache=False).aux_loss
        expected += float(loss) * int(part["labels"][:, 1:].ne(-100).sum()) / float(items[0])
    assert total == pytest.approx(expected, rel=1e-5)


def test_without_router_logits_there_is_no_term(tmp_path: Path) -> None:
    distiller, batch = mixture(tmp_path)
    assert "aux_loss" not in distiller(batch["student"], {}, distiller.loss_denominators(batch))


def test_it_is_logged_and_evaluated(tmp_path: Path) -> None:
    student = {"config": MIXTURE | {"output_router_logits": True}, "tokenizer": tiny.CHARS}
    result = run(tiny.spec(tmp_path, student=student, teachers=[], losses=[]), variant="main", seed=1)
    assert 1.9 < result.results["aux_loss"] < 4  # two of four experts a token: 2 where they are used evenly
