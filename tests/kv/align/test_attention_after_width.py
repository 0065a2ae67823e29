"""A width projection that loses nothing leaves a model's attention as it was, on whichever side it works."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kava_core.build.pipeline import build_pipeline
from kava_core.errors import SpecError
from kava_core.kv.compare.pipeline import KVPipeline
from kava_core.protocols.attention_logits import AttentionLogits
from kava_core.protocols.axes import Cache, Geometry
from tests.support.pipeline_helpers import spec, timeline

SIDE = timeline((2, 3, 1), (1, 2, 2))
NARROW = Geometry(layer=2, head=2, dim=4, qhead=4, hidden=16)
BROAD = NARROW.with_(dim=7)
LINEAR = {"name": "linear", "trainable": False}
PCA = {"name": "calibrated", "method": "pca"}
LOSSES: dict[str, Any] = {
    "attention_kl": {"name": "attention_kl"},
    "structural": {"name": "structural", "alpha_k": 0, "alpha_v": 0, "alpha_attn": 1},
}


def draw(seed: int = 0) -> Cache:
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for part in ("keys", "values", "queries"):
        shape = (2, 2, NARROW.heads(part), SIDE.mask.shape[1], NARROW.dim)  # type: ignore[arg-type]
        parts[part] = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return Cache(**parts)


def in_broad_model(cache: Cache) -> Cache:
    """The cache of a model with wider heads that attends alike: more channels, queries longer."""
    padded = cache.map(lambda x, _: torch.nn.functional.pad(x, (0, BROAD.dim - NARROW.dim)))
    assert padded.queries is not None
    return Cache(padded.keys, padded.values, padded.queries * (BROAD.dim / NARROW.dim) ** 0.5)


def pipeline(align: dict[str, Any], teacher: Geometry, student: Geometry, **fields: Any) -> KVPipeline:
    made = spec({"time_warper": "identity"} | align, **fields)
    return build_pipeline(made, teachers={"a": teacher}, student=student).double()


def term(pipe: KVPipeline, teacher: Cache, student: Cache) -> float:
    parts = pipe.parts
    terms = pipe(student.pick(parts), [teacher.pick(parts)], SIDE, [SIDE], torch.tensor(1.0))
    return float(next(iter(terms.values())))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("projector", [LINEAR, PCA], ids=lambda projector: projector["name"])
@pytest.mark.parametrize("direction", ["to_student", "to_teacher"])
def test_a_lossless_projection_has_divergence_0(loss: str, projector: dict[str, Any], direction: str) -> None:
    narrow, broad = draw(), in_broad_model(draw())
    lifts = direction == "to_teacher"
    models = (BROAD, NARROW) if lifts else (NARROW, BROAD)
    teacher, student = (broad, narrow) if lifts else (narrow, broad)
    align = {"dim_projector": projector, "direction": direction}
    pipe = pipeline(align, *models, losses=[LOSSES[loss]])
    [aligner] = pipe.teachers
    if aligner.wants_calibration:
        parts = pipe.parts
        aligner.observe(teacher.pick(parts), student.pick(parts), aligner.plan(SIDE, SIDE))
        aligner.dim_projector.finish()
    assert term(pipe, teacher, student) == pytest.approx(0, abs=1e-9)
    other = in_broad_model(draw(3)) if lifts else draw(3)
    assert term(pipe, other, student) > 0.1


def test_queries_of_equal_widths_are_not_touched() -> None:
    pipe = pipeline({"dim_projector": "identity"}, NARROW, NARROW, losses=["attention_kl"])
    cache, [aligner] = draw(), pipe.teachers
    target = aligner.align(cache, aligner.plan(SIDE, SIDE))
    assert target.queries is not None
    assert cache.queries is not None
    assert torch.equal(target.queries, cache.queries)


CAPPED = AttentionLogits(softcap=2.0)


def capped(cache: Cache) -> torch.Tensor:
    """Maps of attention whose logits are capped, ``batch layer qhead time t_time``."""
    assert cache.queries is not None
    assert cache.keys is not None
    logits = cache.queries @ cache.keys.repeat_interleave(2, 2).mT / NARROW.dim**0.5
    dead = torch.ones(6, 6, dtype=torch.bool).triu(1) | ~SIDE.mask[:, None, None, None]
    return (2 * torch.tanh(logits / 2)).masked_fill(dead, -torch.inf).softmax(-1)


def plain(cache: Cache) -> torch.Tensor:
    assert cache.queries is not None
    assert cache.keys is not None
    logits = cache.queries @ cache.keys.repeat_interleave(2, 2).mT / NARROW.dim**0.5
    dead = torch.ones(6, 6, dtype=torch.bool).triu(1) | ~SIDE.mask[:, None, None, None]
    return logits.masked_fill(dead, -torch.inf).softmax(-1)


@pytest.mark.parametrize("capped_side", ["teacher", "student"])
def test_the_cap_of_either_model_reaches_the_loss(capped_side: str) -> None:
    odd = Geometry(2, 2, 4, 4, 16, CAPPED)
    teacher, student = (odd, NARROW) if capped_side == "teacher" else (NARROW, odd)
    pipe = pipeline({"dim_projector": "identity"}, teacher, student, losses=["attention_kl"])
    theirs, mine = draw(1), draw(2)
    p, q = (capped(theirs), plain(mine)) if capped_side == "teacher" else (plain(theirs), capped(mine))
    gap = torch.where(p > 0, p.clamp_min(1e-300).log() - q.clamp_min(1e-300).log(), 0)
    wanted = ((p * gap).sum(-1).mean((1, 2)) * SIDE.mask).sum()
    assert term(pipe, theirs, mine) == pytest.approx(float(wanted), rel=1e-9)


def test_fused_targets_of_models_that_cap_differently_are_refused_where_attention_is_compared() -> None:
    odd = Geometry(2, 2, 4, 4, 16, CAPPED)
    teachers = {"a": NARROW, "b": odd}
    identity = {"time_warper": "identity", "dim_projector": "identity"}
    with pytest.raises(SpecError, match=r"a: 2 layers, 2 KV heads × 4; b: .*, attention logits capped at 2"):
        build_pipeline(spec(identity, identity, losses=["attention_kl"]), teachers=teachers, student=NARROW)
    build_pipeline(spec(identity, identity, losses=["mse"]), teachers=teachers, student=NARROW)
