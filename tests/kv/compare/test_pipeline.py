"""The whole way from caches to loss terms, against loops in float64, and what must not change it."""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from kava_core import shapecheck
from kava_core.build.pipeline import build_pipeline
from kava_core.errors import NonFiniteError, PluginError, SpecError
from kava_core.kv.align import aligner as aligner_module
from kava_core.kv.align.stage_order import CANONICAL
from kava_core.kv.compare.pipeline import KVPipeline
from kava_core.protocols.axes import Cache, Geometry
from kava_core.protocols.time_map import TimeMap
from kava_core.protocols.timeline import Timeline
from tests.support.pipeline_helpers import (
    DEEP,
    STUDENT,
    WIDE,
    FakeConfig,
    FakeLoss,
    Module,
    cache,
    fake_align,
    spec,
    timeline,
)

checked = pytest.mark.skipif(not shapecheck.active(), reason="shape checking is off")
SIZES = [(2, 3, 1), (1, 2, 2)]
T_SIZES = [(3, 4, 2), (1, 1, 1)]
ALL_LOSSES: list[Any] = [
    "mse",
    {"name": "mse", "scale": "example"},
    {"name": "smooth_l1", "beta": 0.3},
    {"name": "mercator", "parts": ["values"]},
    "relation",
]


def pipeline(
    *geometries: Geometry, aligns: list[dict] | None = None, losses: list[Any], **fields: Any
) -> KVPipeline:
    """A float64 pipeline with one teacher for each geometry."""
    made = spec(*(aligns or [{}] * len(geometries)), losses=losses, **fields)
    return build_pipeline(
        made, teachers=dict(zip("abcdef", geometries, strict=False)), student=STUDENT
    ).double()


def run(
    pipe: KVPipeline,
    ours: Cache,
    theirs: list[Cache],
    student: Timeline,
    teachers: list[Timeline],
    items: float = 7.0,
) -> dict[str, Tensor]:
    """The terms. Caches hold all layers; only those that are read are handed on."""
    read = [c.map(lambda x, _: x[:, list(a.sources)]) for c, a in zip(theirs, pipe.aligners, strict=True)]  # noqa: B023
    return pipe(ours.map(lambda x, _: x[:, list(pipe.layers)]), read, student, teachers, torch.tensor(items))


def tokens(side: Timeline, row: int) -> list[int]:
    return side.mask[row].nonzero().flatten().tolist()


def aligned_by_hand(x: Tensor, side: Timeline, student: Timeline, head: int) -> tuple[Tensor, Tensor]:
    """Depth-proportional layers, heads averaged in groups, the k-th token for the k-th token."""
    batch, t_layer, t_head, _, dim = x.shape
    target = torch.zeros(batch, STUDENT.layer, head, student.mask.shape[1], dim, dtype=x.dtype)
    valid = torch.zeros_like(student.mask)
    group = t_head // head
    for b in range(batch):
        for mine, its in zip(tokens(student, b), tokens(side, b), strict=False):
            valid[b, mine] = True
            for i in range(STUDENT.layer):
                j = math.floor((i + 1) * t_layer / STUDENT.layer + 0.5) - 1
                for h in range(head):
                    target[b, i, h, mine] = x[b, j, h * group : (h + 1) * group, its].mean(0)
    return target, valid


def distance(name: str, x: Tensor, target: Tensor) -> float:
    """The loss of two vectors."""
    if name == "mse":
        return float(sum((a - b) ** 2 for a, b in zip(x, target, strict=True)) / len(x))
    return float(1 - (x @ target) / (x.norm() * target.norm()))


def terms_by_hand(
    name: str,
    ours: Cache,
    theirs: list[Cache],
    student: Timeline,
    teachers: list[Timeline],
    shares: list[float],
    layers: tuple[int, ...] = (0, 1),
    items: float = 7.0,
) -> float:
    """Each teacher is compared; the losses are averaged with the shares of the valid ones."""
    total = 0.0
    for part in ("keys", "values"):
        x = getattr(ours, part)
        sides = [
            aligned_by_hand(getattr(c, part), t, student, 2) for c, t in zip(theirs, teachers, strict=True)
        ]
        for b in range(2):
            for t in range(student.mask.shape[1]):
                weights = [s * float(valid[b, t]) for s, (_, valid) in zip(shares, sides, strict=True)]
                for weight, (target, _) in zip(weights, sides, strict=True):
                    if weight:
                        each = [
                            distance(name, x[b, i, h, t], target[b, i, h, t])
                            for i in layers
                            for h in range(2)
                        ]
                        total += weight / sum(weights) * sum(each) / len(each)
    return total / items


@pytest.mark.parametrize("name", ["mse", "mercator"])
def test_separate_targets_against_loops(name: str) -> None:
    student, teachers = timeline(*SIZES), [timeline(*T_SIZES, left=2), timeline((1, 1, 1), (2, 2, 2))]
    ours, theirs = cache(STUDENT, 6), [cache(WIDE, 11, seed=1), cache(DEEP, 6, seed=2)]
    pipe = pipeline(
        *(WIDE, DEEP),
        aligns=[{"time_warper": "pad"}] * 2,
        losses=[name],
        target="separate",
        fuser={"name": "fixed", "weights": {"a": 3.0, "b": 1.0}},
    )
    found = run(pipe, ours, theirs, student, teachers)[name]
    assert found.item() == pytest.approx(
        terms_by_hand(name, ours, theirs, student, teachers, [3, 1]), rel=1e-6
    )


def test_fused_target_against_loops() -> None:
    """The target of two teachers is their weighted mean where both are valid, else the valid one."""
    student, sides = timeline(*SIZES), [timeline(*T_SIZES), timeline((1, 1, 1), (2, 2, 2))]
    ours, theirs = cache(STUDENT, 6), [cache(WIDE, 9, seed=1), cache(DEEP, 6, seed=2)]
    pipe = pipeline(
        WIDE, DEEP, aligns=[{"time_warper": "pad"}] * 2, losses=[{"name": "mse", "parts": ["keys"]}]
    )
    total = 0.0
    (a, a_valid), (b, b_valid) = (
        aligned_by_hand(c.keys, side, student, 2) for c, side in zip(theirs, sides, strict=True)
    )
    for row in range(2):
        for t in range(6):
            both = [x[row, :, :, t] for x, valid in ((a, a_valid), (b, b_valid)) if valid[row, t]]
            if both:
                total += float((ours.keys[row, :, :, t] - sum(both) / len(both)).square().mean())
    assert run(pipe, ours, theirs, student, sides)["mse"].item() == pytest.approx(total / 7, rel=1e-6)


def test_one_teacher_fused_or_separate() -> None:
    ours, theirs, student, teacher = (
        cache(STUDENT, 6),
        cache(WIDE, 9, seed=1),
        timeline(*SIZES),
        timeline(*T_SIZES),
    )
    fused, separate = (
        run(pipeline(WIDE, losses=ALL_LOSSES, target=target), ours, [theirs], student, [teacher])
        for target in ("fused", "separate")
    )
    assert list(fused) == ["mse", "mse_2", "smooth_l1", "mercator", "relation"]
    assert {n: t.item() for n, t in fused.items()} == {n: t.item() for n, t in separate.items()}
    assert all(term > 0 for term in fused.values())


def test_layers_are_selected() -> None:
    student, teacher = timeline(*SIZES), timeline(*T_SIZES)
    ours, theirs = cache(STUDENT, 6), cache(WIDE, 9, seed=1)
    pipe = pipeline(WIDE, aligns=[{"time_warper": "pad"}], losses=[{"name": "mse", "layers": [-1]}])
    assert pipe.layers == (1,)
    assert pipe.aligners[0].sources == (3,)
    found = run(pipe, ours, [theirs], student, [teacher])["mse"].item()
    assert found == pytest.approx(
        terms_by_hand("mse", ours, [theirs], student, [teacher], [1], layers=(1,)), rel=1e-6
    )


def test_losses_of_one_name_and_their_weights() -> None:
    student, teacher = timeline(*SIZES), timeline(*T_SIZES)
    ours, theirs = cache(STUDENT, 6), cache(WIDE, 9, seed=1)
    losses = [
        {"name": "mse", "layers": [0], "weight": 2.0},
        {"name": "mercator", "weight": 0.0},
        {"name": "mse", "layers": [-1], "weight": 0.5},
    ]
    pipe = pipeline(WIDE, aligns=[{"time_warper": "pad"}], losses=losses)
    terms = run(pipe, ours, [theirs], student, [teacher])
    wanted = [terms_by_hand("mse", ours, [theirs], student, [teacher], [1], layers=(i,)) for i in (0, 1)]
    assert {n: t.item() for n, t in terms.items()} == pytest.approx(
        dict(zip(["mse", "mse_2"], wanted, strict=True))
    )
    assert pipe.weighted_total(terms).item() == pytest.approx(2 * wanted[0] + 0.5 * wanted[1])


def test_layer_that_does_not_exist() -> None:
    with pytest.raises(SpecError) as caught:
        pipeline(WIDE, losses=[{"name": "mse", "layers": [0, 2, -3]}])
    assert str(caught.value) == "loss 'mse': layers [2, -3]: the student has layers 0 to 1"


def test_unequal_widths() -> None:
    with pytest.raises(SpecError) as caught:
        pipeline(WIDE.with_(dim=8), losses=["relation", "mse"])
    assert str(caught.value) == (
        "teacher 'a': aligned to 2 layers, 2 KV heads × 8 but the student has 2 layers, 2 KV heads × 4; "
        "loss 'mse' compares equal widths: use dim_projector calibrated, linear or elastic"
    )


def test_unequal_widths_suit_a_basis_free_loss() -> None:
    pipe = pipeline(WIDE.with_(dim=8), losses=["relation"])
    theirs = [cache(WIDE.with_(dim=8), 9, seed=1)]
    assert run(pipe, cache(STUDENT, 6), theirs, timeline(*SIZES), [timeline(*T_SIZES)])["relation"] > 0


def test_fused_target_of_different_views() -> None:
    with pytest.raises(SpecError) as caught:
        pipeline(WIDE, DEEP, aligns=[{}, {"head_adapter": "flat"}], losses=["relation"])
    assert str(caught.value) == (
        "target: fused needs one head adapter view and one width for all teachers, not "
        "a: 2 layers, 2 KV heads × 4; b: 2 layers, 1 KV heads × 8; "
        "use the same head_adapter and a dim_projector, or target: separate"
    )


WARPERS = [
    "pad",
    "linear",
    "segment",
    {"name": "segment", "smoothing": {"reasoning": 3}, "ratio": {"reasoning": 0.5}},
]


def padded(x: Cache, left: int, right: int, fill: float) -> Cache:
    return x.map(lambda t, _: torch.nn.functional.pad(t, (0, 0, left, right), value=fill))


@pytest.mark.parametrize("warper", WARPERS, ids=str)
@pytest.mark.parametrize("fill", [3.7, math.nan])
def test_padding_does_not_matter(warper: Any, fill: float) -> None:
    """Longer padding on either end and either side, whatever it holds, changes no term and no gradient."""
    pipe = pipeline(WIDE, DEEP, aligns=[{"time_warper": warper}] * 2, losses=ALL_LOSSES)
    ours, theirs = cache(STUDENT, 6), [cache(WIDE, 9, seed=1), cache(DEEP, 9, seed=2)]

    def measured(left: int, right: int) -> tuple[dict[str, float], Tensor]:
        x = ours.map(lambda t, _: t.clone().requires_grad_())
        teachers = [timeline(*T_SIZES, left=right, right=left), timeline(*T_SIZES, left=left, right=left)]
        caches = [padded(theirs[0], right, left, fill), padded(theirs[1], left, left, fill)]
        side = timeline(*SIZES, left=left, right=right)
        terms = run(pipe, padded(x, left, right, fill), caches, side, teachers)
        pipe.weighted_total(terms).backward()
        return {name: term.item() for name, term in terms.items()}, torch.stack([x.keys.grad, x.values.grad])

    (terms, gradient), (longer, same) = measured(0, 0), measured(3, 2)
    assert longer == pytest.approx(terms, rel=1e-12)
    torch.testing.assert_close(same, gradient, rtol=1e-10, atol=1e-14)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("warper", ["pad", "linear", "segment"])
@pytest.mark.parametrize("target", ["fused", "separate"])
def test_nan_where_a_teacher_is_not_valid(warper: str, target: str) -> None:
    """Padding inside the batch: row 1 of teacher a has 3 real tokens of 9."""
    pipe = pipeline(WIDE, DEEP, aligns=[{"time_warper": warper}] * 2, losses=ALL_LOSSES, target=target)
    ours, teachers = cache(STUDENT, 6), [timeline(*T_SIZES), timeline(*T_SIZES[::-1])]
    theirs = [cache(WIDE, 9, seed=1), cache(DEEP, 9, seed=2)]

    def gradient(fill: float) -> Tensor:
        x = ours.map(lambda t, _: t.clone().requires_grad_())
        filled = [
            c.map(lambda t, _, m=side.mask: torch.where(m[:, None, None, :, None], t, fill))
            for c, side in zip(theirs, teachers, strict=True)
        ]
        pipe.weighted_total(run(pipe, x, filled, timeline(*SIZES), teachers)).backward()
        return torch.stack([x.keys.grad, x.values.grad])

    assert torch.equal(gradient(math.nan), gradient(0.0))


@pytest.mark.parametrize("target", ["fused", "separate"])
def test_parts_of_a_batch_add_up(target: str) -> None:
    pipe = pipeline(WIDE, DEEP, losses=ALL_LOSSES, target=target)
    sizes, t_sizes = [*SIZES, (1, 3, 1)], [*T_SIZES, (2, 2, 2)]
    ours, theirs = (
        cache(STUDENT, 6, batch=3),
        [cache(g, 9, batch=3, seed=s) for s, g in ((1, WIDE), (2, DEEP))],
    )

    def summed(rows: list[int]) -> dict[str, float]:
        def some(side: Timeline) -> Timeline:
            return Timeline(side.mask[rows], side.positions[rows], side.segments[rows], side.spans[rows])

        caches = [c.map(lambda x, _: x[rows]) for c in (ours, *theirs)]
        sides = [some(timeline(*t_sizes))] * 2
        terms = run(pipe, caches[0], caches[1:], some(timeline(*sizes)), sides, items=float(len(rows)))
        return {name: term.item() * len(rows) for name, term in terms.items()}

    whole, one, two = summed([0, 1, 2]), summed([1]), summed([0, 2])
    assert {name: one[name] + two[name] for name in one} == pytest.approx(whole, rel=1e-10)


@pytest.mark.parametrize("share_heads", [True, False])
def test_order_does_not_change_the_target(share_heads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    align = {"dim_projector": {"name": "linear", "share_heads": share_heads}}
    pipe = pipeline(WIDE.with_(dim=8), aligns=[align], losses=["mse"])
    [one] = pipe.aligners
    theirs = cache(WIDE.with_(dim=8), 9, seed=1).map(lambda x, _: x[:, list(one.sources)])
    time_map = one.plan(timeline(*T_SIZES), timeline(*SIZES))
    targets = {}
    for order in permutations(CANONICAL):
        if one.commuting.allows(order):
            monkeypatch.setattr(aligner_module, "cheapest_order", lambda extents, freedom, order=order: order)
            targets[order] = one.align(theirs, time_map)
            assert [name for name, _ in one.steps(theirs, time_map)] == ["layers", *order]
    assert len(targets) == (6 if share_heads else 3)
    for target in targets.values():
        torch.testing.assert_close(target.keys, targets[CANONICAL].keys, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(target.values, targets[CANONICAL].values, rtol=1e-10, atol=1e-12)


def by_stages(
    teacher: Geometry, student: Timeline, side: Timeline, **replaced: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Aligned keys, and the same before any stage but layers, with the time map as a matrix."""
    [one] = broken(geometry=teacher, **replaced).aligners
    theirs = cache(teacher, side.mask.shape[1], seed=1).map(lambda x, _: x[:, list(one.sources)])
    time_map = one.plan(side, student)
    matrix = time_map.dense(side.mask.shape[1]).double()
    return one.align(theirs, time_map).keys, theirs.keys, matrix


def test_a_projector_that_is_not_linear_stays_last() -> None:
    """The square of a mean is no mean of squares, though projecting the short teacher first were cheaper."""
    squares = fake(lambda x, part: x[..., :4] ** 2)
    student, side = timeline((6, 8, 6), (5, 5, 5)), timeline((1, 2, 1), (1, 1, 1))
    aligned, x, matrix = by_stages(WIDE.with_(dim=64), student, side, dim_projector=squares)
    warped = torch.einsum("bst,bihtd->bihsd", matrix, x)
    torch.testing.assert_close(aligned, warped.unflatten(2, (2, 2)).mean(3)[..., :4] ** 2)


def test_an_adapter_that_is_not_linear_stays_first() -> None:
    """The same for heads, though shortening the long teacher first were cheaper."""
    squares = with_views(lambda x, part: x.unflatten(2, (2, 2)).mean(3) ** 2)
    student, side = timeline((1, 1, 1), (1, 1, 1)), timeline((6, 8, 6), (5, 5, 5))
    aligned, x, matrix = by_stages(WIDE, student, side, head_adapter=squares)
    mixed = x.unflatten(2, (2, 2)).mean(3) ** 2
    torch.testing.assert_close(aligned, torch.einsum("bst,bihtd->bihsd", matrix, mixed))


def test_half_precision_is_compared_in_float32() -> None:
    pipe = pipeline(WIDE, losses=ALL_LOSSES).float()
    sides = (timeline(*SIZES), [timeline(*T_SIZES)])
    ours, theirs = cache(STUDENT, 6, dtype=torch.bfloat16), cache(WIDE, 9, seed=1, dtype=torch.bfloat16)
    half = run(pipe, ours, [theirs], *sides)
    wide = run(pipe, ours.map(lambda x, _: x.float()), [theirs.map(lambda x, _: x.float())], *sides)
    assert {name: (term.dtype, term.item()) for name, term in half.items()} == {
        name: (torch.float32, term.item()) for name, term in wide.items()
    }


def broken(geometry: Geometry = WIDE, **replaced: Any) -> KVPipeline:
    """A pipeline of one teacher, some of whose components are replaced by fakes."""
    made = spec({}, losses=["mse"])
    outside = {name: replaced.pop(name) for name in ("losses", "fuser") if name in replaced}
    teacher = made.teachers[0].model_copy(update={"align": fake_align(**replaced)})
    made = made.model_copy(update={"teachers": (teacher,), **outside})
    return build_pipeline(made, teachers={"a": geometry}, student=STUDENT).double()


def fake(function: Any) -> FakeConfig:
    return FakeConfig(make=lambda **_: Module(function))


def with_views(function: Any) -> FakeConfig:
    def make(*, teacher: Geometry, student: Geometry) -> Module:
        module = Module(function)
        module.teacher_view, module.student_view = (
            teacher.with_(head=student.head, qhead=student.qhead),
            student,
        )
        module.fold = lambda x: x
        return module

    return FakeConfig(make=make)


BROKEN = {
    "head_adapter 'fake', teacher 'a'": {"head_adapter": with_views(lambda x, part: x[:, :, :1])},
    "time_warper 'fake', teacher 'a'": {
        "time_warper": fake(lambda teacher, student: TimeMap.same(teacher.mask))
    },
    "dim_projector 'fake', teacher 'a'": {"dim_projector": fake(lambda x, part: x[..., 1:])},
    "fuser 'fake'": {"fuser": fake(lambda context: torch.ones(1, 2, 3, 6))},
    "kv_loss 'fake'": {"losses": (FakeLoss(make=lambda **_: Module(lambda s, t, w: w)),)},
}


@pytest.mark.parametrize("who", BROKEN)
def test_broken_component_is_named(who: str) -> None:
    """Alike in debug mode and without."""
    pipe = broken(**BROKEN[who])
    with pytest.raises(PluginError, match=r"returned shape .*, must be") as caught:
        run(pipe, cache(STUDENT, 6), [cache(WIDE, 9, seed=1)], timeline(*SIZES), [timeline(*T_SIZES)])
    assert f"in {who}" in caught.value.__notes__


def test_mapper_that_reads_nothing() -> None:
    def make(**_: Any) -> Module:
        return Module(lambda: torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]]))

    with pytest.raises(PluginError) as caught:
        broken(layer_mapper=FakeConfig(make=make))
    assert str(caught.value) == "student layers [1] read no teacher layer; choose others with 'layers'"
    assert caught.value.__notes__ == ["in layer_mapper 'fake', teacher 'a'"]


def test_nan_at_a_valid_position_is_reported() -> None:
    pipe = pipeline(WIDE, losses=["mse"])
    theirs = cache(WIDE, 9, seed=1)
    theirs.values[0, 3, 1, 2, 0] = math.inf
    with pytest.raises(NonFiniteError) as caught:
        run(pipe, cache(STUDENT, 6), [theirs], timeline(*SIZES), [timeline(*T_SIZES)])
    assert str(caught.value) == (
        "the aligned cache of teacher 'a': values of layers [1] hold NaN or infinity at valid positions"
    )
