"""The char_iou warper on spans of every kind, against a double loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kava_core.protocols.timeline import Timeline
from tests.plugins.time_warpers.char_iou_reference import check, timeline, warper

torch.set_num_threads(1)
SPAN = st.tuples(st.integers(0, 12), st.integers(0, 5)).map(lambda pair: (pair[0], sum(pair)))
ANY_ORDER = st.lists(SPAN, max_size=8)
RISING = ANY_ORDER.map(sorted)
REPEATED = RISING.map(lambda spans: [span for span in spans for _ in range(2)])
ZERO_AT_END = RISING.map(lambda spans: [*spans, (0, 0), (0, 0)])
EXAMPLE = st.one_of(ANY_ORDER, RISING, REPEATED, ZERO_AT_END)
BATCH = st.lists(st.tuples(EXAMPLE, EXAMPLE), min_size=1, max_size=3)
FIELDS = st.fixed_dictionaries(
    {"mode": st.sampled_from(["soft", "hard"]), "min_overlap": st.sampled_from([0.0, 0.25, 0.5, 1.0])}
)


@given(BATCH, FIELDS, st.integers(0, 2), st.integers(0, 2))
@settings(max_examples=150, deadline=None)
def test_any_spans(batch, fields, t_left, left):
    teachers, students = zip(*batch, strict=True)
    check(timeline(teachers, left=t_left, right=1), timeline(students, left=left), **fields)


@pytest.mark.parametrize("mode", ["soft", "hard"])
@pytest.mark.parametrize(("t_time", "time"), [(0, 3), (3, 0), (0, 0), (1, 1), (1, 4), (4, 1)])
def test_short_sides(mode, t_time, time):
    teacher = timeline([[(k, k + 2) for k in range(t_time)]])
    student = timeline([[(k, k + 1) for k in range(time)]])
    found = check(teacher, student, mode=mode).apply(torch.ones(1, 1, 1, t_time, 2))
    assert found.shape == (1, 1, 1, time, 2)


def test_padding_with_text_under_it_is_not_read():
    teacher = timeline([[(0, 2), (2, 4)]])
    teacher.mask[0, 1] = False
    assert check(teacher, timeline([[(0, 4), (3, 4)]])).valid.tolist() == [[True, False]]


@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_padding_and_neighbours_change_nothing(mode):
    one, t_one = [(0, 3), (3, 7), (9, 9), (7, 12)], [(0, 4), (4, 6), (6, 12)]
    alone = warper(mode=mode)(timeline([t_one]), timeline([one])).dense(3)[0]
    teacher = timeline([[(0, 99)] * 5, t_one], left=2, right=3)
    student = timeline([[(5, 6)], one], left=1, right=2)
    among = warper(mode=mode)(teacher, student).dense(10)[1]
    assert torch.equal(among[1:5, 2:5], alone)
    assert among.sum() == alone.sum()


def test_rows_hold_few_taps_however_long_the_text():
    one = timeline([[(2 * k, 2 * k + 2) for k in range(3000)]])
    other = timeline([[(3 * k, 3 * k + 3) for k in range(2000)]])
    assert warper()(other, one).index.numel() <= 5000


def test_bfloat16_and_gradient():
    time_map = warper()(timeline([[(0, 2), (2, 5), (5, 6)]]), timeline([[(0, 3), (3, 6)]]))
    x = torch.randn(1, 2, 2, 3, 2).bfloat16().requires_grad_()
    found = time_map.apply(x)
    found.sum().backward()
    dense = time_map.dense(3).double()
    wanted = torch.einsum("bij,blhjd->blhid", dense, x.double())
    torch.testing.assert_close(found.double(), wanted, rtol=2**-8, atol=1e-6)
    wanted = dense.sum(1).view(1, 1, 1, 3, 1).expand_as(x)
    torch.testing.assert_close(x.grad.double(), wanted, rtol=2**-8, atol=1e-6)


def test_characters_of_a_batch_may_exceed_32_bits() -> None:
    """Four examples whose texts end near character 2³⁰ each."""
    far = 2**30
    spans = torch.tensor([[[far, far + 2], [far + 2, far + 5]]]).expand(4, -1, -1)
    mask = torch.ones(4, 2, dtype=torch.bool)
    side = Timeline(mask, mask.long(), mask.long(), spans)
    found = warper(mode="soft")(side, side).dense(2)
    torch.testing.assert_close(found, torch.eye(2).expand(4, -1, -1))
