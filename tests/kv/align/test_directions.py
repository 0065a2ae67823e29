"""Ways to compare: the student lifted, several layers side by side, layers merged, tokens first, rotation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kava_core.build.data import make_data
from kava_core.build.distiller import make_distiller
from kava_core.build.pipeline import build_pipeline
from kava_core.errors import SpecError
from kava_core.kv.compare.pipeline import KVPipeline
from kava_core.protocols.axes import Cache, Geometry
from tests.support import tiny
from tests.support.pipeline_helpers import DEEP, STUDENT, WIDE, cache, spec, timeline

SIZES = [(2, 3, 1), (1, 2, 2)]
BROAD = WIDE.with_(dim=6)
"""Four layers, four heads six wide; the student has two layers, two heads four wide."""


def pipeline(*geometries: Geometry, align: dict[str, Any], losses: list[Any], **fields: Any) -> KVPipeline:
    made = spec(*[align] * len(geometries), losses=losses, **fields)
    return build_pipeline(
        made, teachers=dict(zip("abcdef", geometries, strict=False)), student=STUDENT
    ).double()


def terms(pipe: KVPipeline, ours: Cache, *theirs: Cache) -> dict[str, Tensor]:
    """Loss terms for caches of all layers, the teachers' as long as the student's."""
    side = timeline(*SIZES)
    read = [c.map(lambda x, _: x[:, list(a.sources)]) for c, a in zip(theirs, pipe.teachers, strict=True)]  # noqa: B023
    return pipe(ours, read, side, [side] * len(read), torch.tensor(float(side.mask.sum())))


def masked_mse(x: Tensor, y: Tensor) -> float:
    """Mean over real positions, layers, heads and width."""
    mask = timeline(*SIZES).mask
    return float((x - y).square().mean(dim=(1, 2, 4))[mask].mean())


# lifting the student


def lifted() -> KVPipeline:
    align = {"direction": "to_teacher", "time_warper": "identity", "dim_projector": "linear"}
    return pipeline(BROAD, align=align, losses=[{"name": "mse", "parts": ["values"]}])


def test_the_student_is_lifted_and_the_teacher_stays_as_it_is() -> None:
    pipe, ours, theirs = lifted(), cache(STUDENT, 6), cache(BROAD, 6, seed=1)
    [aligner] = pipe.teachers
    assert (aligner.target.head, aligner.target.dim) == (aligner.view.head, aligner.view.dim) == (4, 6)
    target = theirs.values[:, [1, 3]]
    aligned = pipe.align_with_map(
        aligner, theirs.map(lambda x, _: x[:, [1, 3]]), aligner.plan(timeline(*SIZES), timeline(*SIZES))
    )
    real = timeline(*SIZES).mask[:, None, None, :, None]
    assert torch.equal(aligned.target.values * real, target * real)
    matrix = aligner.dim_projector.values.detach()
    mapped = torch.einsum("blhtd,led->blhte", ours.values.repeat_interleave(2, 2), matrix[:, 0])
    expected = masked_mse(mapped, target)
    assert terms(pipe, ours, theirs)["mse"].item() == pytest.approx(expected, rel=1e-6)


def test_lifting_trains_the_student_and_the_map_but_not_the_target() -> None:
    pipe, theirs = lifted(), cache(BROAD, 6, seed=1).map(lambda x, _: x.requires_grad_())
    ours = cache(STUDENT, 6).map(lambda x, _: x.requires_grad_())
    terms(pipe, ours, theirs)["mse"].backward()
    assert ours.values.grad.abs().sum() > 0
    assert torch.isfinite(ours.values.grad).all()
    assert pipe.teachers[0].dim_projector.values.grad.abs().sum() > 0


@pytest.mark.parametrize("teacher", [DEEP, WIDE, BROAD.with_(head=1), BROAD.with_(layer=1)])
def test_lifting_to_any_geometry(teacher: Geometry) -> None:
    align = {"direction": "to_teacher", "dim_projector": "linear"}
    pipe = pipeline(teacher, align=align, losses=["mse", "mercator", "relation"])
    found = terms(pipe, cache(STUDENT, 6), cache(teacher, 6, seed=1))
    assert all(torch.isfinite(term) and term > 0 for term in found.values())


# several teacher layers side by side


def test_layers_side_by_side_are_all_there_for_the_projector() -> None:
    align = {
        "layers": "concat",
        "layer_mapper": {"name": "ratio", "sources": 2},
        "time_warper": "identity",
        "dim_projector": "linear",
    }
    pipe = pipeline(WIDE, align=align, losses=[{"name": "mse", "parts": ["keys"]}])
    ours, theirs = cache(STUDENT, 6), cache(WIDE, 6, seed=1)
    [aligner] = pipe.teachers
    assert aligner.sources == (0, 1, 2, 3)
    assert aligner.adapted.dim == 8
    matrix = aligner.dim_projector.keys.detach()[:, 0]
    mixed = theirs.keys.view(2, 4, 2, 2, 6, 4).mean(3)
    beside = torch.cat([mixed[:, [0, 2]], mixed[:, [1, 3]]], dim=-1)
    expected = masked_mse(ours.keys, torch.einsum("blhtd,led->blhte", beside, matrix))
    assert terms(pipe, ours, theirs)["mse"].item() == pytest.approx(expected, rel=1e-6)


def test_layers_side_by_side_need_fixed_and_equal_numbers() -> None:
    align = {"layers": "concat", "layer_mapper": "learned", "dim_projector": "linear"}
    with pytest.raises(SpecError, match="layers: concat needs a layer mapper with fixed layers"):
        pipeline(WIDE, align=align, losses=["mse"])


# all layers merged into one


FLAT = {
    "head_adapter": {"name": "flat", "layers": True},
    "dim_projector": "linear",
    "time_warper": "identity",
}


def test_layers_merged_into_one_wide_vector() -> None:
    pipe = pipeline(WIDE, align=FLAT, losses=[{"name": "mse", "parts": ["keys"]}])
    ours, theirs = cache(STUDENT, 6), cache(WIDE, 6, seed=1)
    matrix = pipe.teachers[0].dim_projector.keys.detach()[0, 0]
    assert matrix.shape == (2 * 2 * 4, 2 * 4 * 4)
    wide = theirs.keys[:, [1, 3]].permute(0, 3, 1, 2, 4).flatten(2) @ matrix.T
    own = ours.keys.permute(0, 3, 1, 2, 4).flatten(2)
    expected = float((own - wide).square().mean(-1)[timeline(*SIZES).mask].mean())
    assert terms(pipe, ours, theirs)["mse"].item() == pytest.approx(expected, rel=1e-6)


def test_merged_layers_are_compared_by_all_losses_or_none() -> None:
    losses = [{"name": "mse", "layers": [0]}, {"name": "mercator"}]
    with pytest.raises(SpecError) as caught:
        pipeline(WIDE, align=FLAT, losses=losses)
    assert str(caught.value) == (
        "loss 'mse' looks at layers [0], but the head adapter merges layers [0, 1] into one: all losses must "
        "look at the same layers"
    )
    alone = pipeline(WIDE, align=FLAT, losses=[{"name": "mse", "layers": [1]}])
    assert terms_of_one_layer(alone) > 0


def terms_of_one_layer(pipe: KVPipeline) -> float:
    ours = cache(STUDENT, 6).map(lambda x, _: x[:, [1]])
    return float(terms(pipe, ours, cache(WIDE, 6, seed=1))["mse"])


# tokens first, then time


def test_tokens_then_segments_are_one_map() -> None:
    """Through the student's tokens to a thinned reasoning; here tokens agree, so char_iou is the identity."""
    thin = {"name": "segment", "ratio": {"reasoning": 0.4}}
    both = pipeline(WIDE, align={"token_warper": "char_iou", "time_warper": thin}, losses=["mse"])
    one = pipeline(WIDE, align={"time_warper": thin}, losses=["mse"])
    side = timeline((2, 5, 1), (1, 3, 2))
    found, expected = both.teachers[0].plan(side, side), one.teachers[0].plan(side, side)
    assert found.valid.tolist() == expected.valid.tolist()
    assert int(found.valid[0].sum()) == 2 + 2 + 1
    torch.testing.assert_close(found.dense(8), expected.dense(8))


# rotation


def distiller_terms(rotary: str, losses: list[Any], **student: Any) -> dict[str, Tensor]:
    teacher = tiny.fields()["teachers"][0] | {
        "tokenizer": tiny.CHARS,
        "align": {"time_warper": "identity", "dim_projector": {"name": "linear", "trainable": False}},
    }
    made = tiny.spec(teachers=[teacher], losses=losses, rotary=rotary, student=student)
    data = make_data(made)
    distiller = make_distiller(made, data, seed=0).eval()
    batch = data.plain_collator([data.train_items[i] for i in range(4)])
    items = torch.tensor([1.0, float(batch["student"]["attention_mask"].sum())])
    return distiller(batch["student"], batch["teachers"], items)


def test_matched_rotation_keeps_distances_and_changes_nothing_else() -> None:
    """A common rotation leaves mean squared error and cosine as they are without any rotation."""
    losses = [{"name": name, "parts": ["keys"]} for name in ("mse", "mercator")]
    strip, match, keep = (distiller_terms(rotary, losses) for rotary in ("strip", "match", "keep"))
    for name in ("mse", "mercator"):
        assert match[name].item() == pytest.approx(strip[name].item(), rel=1e-5)
        assert abs(keep[name].item() - strip[name].item()) > 1e-4 * strip[name].item()


def test_matched_rotation_scales_as_the_student_does() -> None:
    """YaRN multiplies keys by its attention factor a: both sides, and so squared error by a²."""
    scaled = tiny.llama(
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "attention_factor": 1.5,
            "original_max_position_embeddings": 32,
        }
    )
    losses = [{"name": "mse", "parts": ["keys"]}]
    strip, match = (distiller_terms(rotary, losses, config=scaled) for rotary in ("strip", "match"))
    assert match["mse"].item() == pytest.approx(1.5**2 * strip["mse"].item(), rel=1e-4)


@pytest.mark.parametrize(
    "align", [{"head_adapter": "flat", "dim_projector": "linear"}, {"direction": "to_teacher"}]
)
def test_rotation_can_only_be_matched_at_the_student_s_heads(align: dict[str, Any]) -> None:
    with pytest.raises(
        SpecError, match=r"rotary: match: teacher 'a' is compared at .*use head_adapter structured"
    ):
        pipeline(BROAD, align={"dim_projector": "linear"} | align, losses=["mse"], rotary="match")
