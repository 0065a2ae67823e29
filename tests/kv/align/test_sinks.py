"""Attention sinks have no target unless a spec asks for it: first tokens, and those found by their values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kava_core.build.pipeline import build_pipeline
from kava_core.kv.compare.pipeline import KVPipeline
from kava_core.kv.compare.values import Aligned
from kava_core.kv.maths.sinks import is_first_token, leave_out
from kava_core.protocols.axes import Cache
from kava_core.protocols.time_map import TimeMap
from kava_core.protocols.timeline import Timeline
from kava_core.specfile.digest import spec_digest
from tests.support.pipeline_helpers import STUDENT, cache, spec, timeline

DEEP = STUDENT.with_(layer=2, dim=6)
SIZES, T_SIZES = [(3, 2, 1), (1, 2, 2)], [(4, 3, 2), (2, 5, 1)]


def pipeline(**align: Any) -> KVPipeline:
    made = spec({"time_warper": "segment", "sinks": "leave_out"} | align, losses=["mse"])
    return build_pipeline(
        made, teachers={"a": DEEP if "dim_projector" in align else STUDENT}, student=STUDENT
    )


def plan(pipe: KVPipeline, teacher: Timeline, student: Timeline) -> TimeMap:
    return pipe.teachers[0].plan(teacher, student)


def slow_valid(compared: TimeMap, teacher: Timeline, student: Timeline) -> Tensor:
    """Which positions stay, by loops over the map of a plan that compares all."""
    dense, valid = compared.dense(teacher.mask.shape[1]), compared.valid.clone()
    for b in range(len(valid)):
        first, t_first = (int(side.mask[b].int().argmax()) for side in (student, teacher))
        for i in range(valid.shape[1]):
            if i == first or float(dense[b, i, t_first]) > 0:
                valid[b, i] = False
    return valid


@pytest.mark.parametrize("padding", [{}, {"left": 2}, {"left": 1, "right": 2}])
@pytest.mark.parametrize("warper", ["segment", "pad", "linear", "identity"])
@pytest.mark.parametrize("sizes", [(SIZES, T_SIZES), (T_SIZES, SIZES)], ids=["longer", "shorter"])
def test_what_reads_a_first_token_has_no_target(warper: str, padding: dict[str, int], sizes: Any) -> None:
    student, teacher = (timeline(*side, **padding) for side in sizes)
    teacher = student if warper == "identity" else teacher
    compared = plan(pipeline(time_warper=warper, sinks="compare"), teacher, student)
    left_out = plan(pipeline(time_warper=warper), teacher, student)
    assert torch.equal(left_out.valid, slow_valid(compared, teacher, student))
    assert left_out.valid.sum() < compared.valid.sum()
    for mine, theirs in ((left_out.index, compared.index), (left_out.weight, compared.weight)):
        assert torch.equal(mine, theirs)


def test_a_latent_token_is_no_first_token() -> None:
    latents, text = timeline((0, 3, 0), (0, 2, 0)), timeline(*T_SIZES)
    time_map = TimeMap.gather(torch.full_like(latents.positions, 5), latents.mask)
    left_out = leave_out(time_map, is_first_token(text), is_first_token(latents))
    assert torch.equal(left_out.valid, latents.mask)


def with_huge_first_token(x: Cache, side: Timeline) -> Cache:
    first = (side.mask & (side.positions == 0))[:, None, None, :, None]
    return x.map(lambda tensor, _: torch.where(first, 1e3 * tensor, tensor))


def test_neither_calibration_nor_losses_see_a_massive_first_token() -> None:
    student, teacher = timeline(*SIZES), timeline(*T_SIZES)
    mine, theirs = cache(STUDENT, 6), cache(DEEP, 9, seed=1)
    results = {}
    for choice in ("leave_out", "compare"):
        for name, seen in (("usual", theirs), ("huge", with_huge_first_token(theirs, teacher))):
            pipe = pipeline(dim_projector="calibrated", sinks=choice).double()
            [aligner] = pipe.teachers
            aligner.observe(seen, mine, aligner.plan(teacher, student))
            aligner.dim_projector.finish()
            terms = pipe(mine, [seen], student, [teacher], torch.tensor(1.0))
            results[choice, name] = float(terms["mse"])
    assert results["leave_out", "usual"] == results["leave_out", "huge"]
    assert results["compare", "huge"] > 100 * results["compare", "usual"]


def drained(x: Cache, positions: list[tuple[int, int]]) -> Cache:
    """The cache with tiny values at some positions of some examples."""
    values = x.values.clone()
    for example, position in positions:
        values[example, :, :, position] *= 0.05
    return Cache(x.keys, values)


def test_sinks_of_either_side_have_no_target() -> None:
    student, teacher = timeline((4, 3, 2), (4, 3, 2)), timeline((4, 3, 2), (4, 3, 2))
    mine, theirs = cache(STUDENT, 9), cache(STUDENT, 9, seed=1)
    drained_student, drained_teacher = drained(mine, [(0, 4)]), drained(theirs, [(0, 6), (1, 2)])
    pipe = pipeline(time_warper="identity").double()
    [aligner] = pipe.teachers
    time_map = aligner.without_sinks(aligner.plan(teacher, student), drained_teacher, teacher.mask)
    [aligned] = pipe.without_student_sinks(
        [Aligned(drained_teacher, time_map.valid)], drained_student, student.mask
    )
    expected = student.mask.clone()
    for example, position in ((0, 0), (1, 0), (0, 4), (0, 6), (1, 2)):
        expected[example, position] = False
    assert torch.equal(aligned.valid, expected)


def test_terms_are_those_of_the_other_positions() -> None:
    """Only the first tokens and what is drained are left out, and what they hold has no influence."""
    sides = timeline((4, 3, 2), (4, 3, 2))
    mine, theirs = cache(STUDENT, 9), drained(cache(STUDENT, 9, seed=1), [(0, 6), (1, 2)])
    pipe = pipeline(time_warper="identity").double()
    term = pipe(mine, [theirs], sides, [sides], torch.tensor(1.0))["mse"]
    squares = ((mine.keys - theirs.keys) ** 2 + (mine.values - theirs.values) ** 2).mean(dim=(2, 4)).mean(1)
    counted = torch.ones(2, 9, dtype=torch.bool)
    counted[:, 0] = counted[0, 6] = counted[1, 2] = False
    torch.testing.assert_close(term, squares[counted].sum(), rtol=1e-12, atol=0)


def test_leave_out_first_looks_at_no_values() -> None:
    sides = timeline((4, 3, 2), (4, 3, 2))
    mine, theirs = cache(STUDENT, 9), drained(cache(STUDENT, 9, seed=1), [(0, 6), (1, 2)])
    terms = {}
    for choice in ("leave_out", "leave_out_first"):
        pipe = pipeline(time_warper="identity", sinks=choice).double()
        terms[choice] = pipe(mine, [theirs], sides, [sides], torch.tensor(1.0))["mse"]
    assert terms["leave_out_first"] > terms["leave_out"]


def test_the_choice_is_part_of_what_a_run_is() -> None:
    choices = ("leave_out", "leave_out_first", "compare")
    assert len({spec_digest(spec({"sinks": choice}, losses=["mse"])) for choice in choices}) == 3
