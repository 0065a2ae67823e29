"""Each warper against a loop over examples, positions and taps in float64; char_iou has its own file."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from kava_core.errors import KavaError
from kava_core.protocols.axes import Geometry
from kava_core.protocols.timeline import Timeline
from kava_plugins.time_warpers import kava_time_warpers

torch.set_num_threads(1)
GEOMETRY = Geometry(layer=2, head=2, dim=3, qhead=2, hidden=8)
NAMES = ("prompt", "reasoning", "answer")


def build(name, **fields):
    [declaration] = [one for one in kava_time_warpers() if one.component_name() == name]
    return declaration(**fields).build(teacher=GEOMETRY, student=GEOMETRY)


def timeline(sizes, *, left=0, length=None):
    """One example: so many tokens of each segment, and padding on the left and up to ``length``."""
    segments = [s for s, size in enumerate(sizes) for _ in range(size)]
    length = length or left + len(segments)
    segments = [-1] * left + segments + [-1] * (length - left - len(segments))
    segments = torch.tensor([segments], dtype=torch.long)
    mask = segments >= 0
    return Timeline(mask, (mask.long().cumsum(-1) - 1) * mask, segments, torch.zeros(1, length, 2).long())


def batched(examples):
    return Timeline(
        *(torch.cat([getattr(e, f) for e in examples]) for f in ("mask", "positions", "segments", "spans"))
    )


def spread(sizes, lefts, length):
    return batched([timeline(s, left=n, length=length) for s, n in zip(sizes, lefts, strict=True)])


TEACHER = spread([(3, 6, 2), (1, 9, 1), (4, 0, 3), (2, 2, 2), (0, 0, 0)], [0, 2, 3, 1, 0], 13)
STUDENT = spread([(2, 3, 2), (3, 2, 4), (2, 2, 0), (2, 5, 0), (3, 3, 3)], [2, 0, 1, 0, 0], 10)


def shares(u, n, t_n, mode):
    """Place to weight: what student place u of n reads of a block's ``t_n`` places."""
    if mode == "auto":
        mode = "area" if t_n > 2 * n else "interpolate"
    low, high = Fraction(u * t_n, n), Fraction((u + 1) * t_n, n)
    if mode == "area":
        return {j: float(max(min(high, j + 1) - max(low, j), 0) / (high - low)) for j in range(t_n)}
    centre = (low + high) / 2
    if mode == "nearest":
        return {math.floor(centre): 1.0}
    place = min(max(centre - Fraction(1, 2), Fraction(0)), Fraction(t_n - 1))
    low = math.floor(place)
    return {low: 1 - float(place - low), low + 1: float(place - low)}


def slow_row(u, n, t_n, mode, window):
    """Weights over a block's ``t_n`` teacher places, each replaced by its moving average."""
    row = torch.zeros(t_n, dtype=torch.float64)
    for centre, share in shares(u, n, t_n, mode).items():
        near = [k for k in range(t_n) if abs(k - centre) <= window // 2]
        for k in near if share else ():
            row[k] += share / len(near)
    return row


def slow_map(teacher, student, blocks, *, mode="auto", windows=(1, 1, 1), ratio=(1, 1, 1), wanted=(0, 1, 2)):
    """Dense map and validity; ``blocks(timeline)`` gives one list of block ids for each example."""
    dense = torch.zeros(*student.mask.shape, teacher.mask.shape[1], dtype=torch.float64)
    valid = torch.zeros(student.mask.shape, dtype=torch.bool)
    for b, (theirs, mine) in enumerate(zip(blocks(teacher), blocks(student), strict=True)):
        for s in wanted:
            t_at = [j for j, block in enumerate(theirs) if block == s]
            at = [i for i, block in enumerate(mine) if block == s]
            keep = max(1, math.floor(Fraction(str(ratio[s])) * len(at) + Fraction(1, 2)))
            places = {(2 * j + 1) * len(at) // (2 * keep) for j in range(keep)}
            for u, i in enumerate(at):
                if t_at and u in places:
                    valid[b, i] = True
                    dense[b, i, t_at[0] : t_at[-1] + 1] = slow_row(u, len(at), len(t_at), mode, windows[s])
    return dense, valid


def by_segment(side):
    return side.segments.tolist()


def as_one(side):
    return (side.mask.long() - 1).tolist()


def check(time_map, dense, valid):
    t_time = dense.shape[-1]
    assert torch.equal(time_map.valid, valid)
    torch.testing.assert_close(time_map.dense(t_time).double(), dense, rtol=0, atol=1e-6)
    x = torch.randn(dense.shape[0], 2, 2, t_time, 3, dtype=torch.float64, requires_grad=True)
    found, wanted = time_map.apply(x), torch.einsum("bij,blhjd->blhid", dense, x)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    upstream = torch.randn_like(wanted)
    (mine,), (theirs,) = (torch.autograd.grad(y, x, upstream) for y in (found, wanted))
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["auto", "interpolate", "area", "nearest"])
def test_linear(mode):
    dense, valid = slow_map(TEACHER, STUDENT, as_one, mode=mode, wanted=(0,))
    check(build("linear", mode=mode)(TEACHER, STUDENT), dense, valid)


@pytest.mark.parametrize("mode", ["auto", "interpolate", "area", "nearest"])
@pytest.mark.parametrize("windows", [(1, 1, 1), (3, 1, 5), (1, 7, 1)])
@pytest.mark.parametrize("ratio", [(1, 1, 1), (1, 0.5, 0.3)])
@pytest.mark.parametrize("wanted", [(0, 1, 2), (1,), (0, 2)])
def test_segment(mode, windows, ratio, wanted):
    warper = build(
        "segment",
        mode=mode,
        smoothing=dict(zip(NAMES, windows, strict=True)),
        ratio=dict(zip(NAMES, ratio, strict=True)),
        segments=[NAMES[s] for s in wanted],
    )
    options = {"mode": mode, "windows": windows, "ratio": ratio, "wanted": wanted}
    check(warper(TEACHER, STUDENT), *slow_map(TEACHER, STUDENT, by_segment, **options))


def test_segment_by_default_keeps_everything():
    check(build("segment")(TEACHER, STUDENT), *slow_map(TEACHER, STUDENT, by_segment))


def test_pad_pairs_the_real_tokens_in_order():
    time_map = build("pad")(TEACHER, STUDENT)
    dense = torch.zeros(*STUDENT.mask.shape, 13, dtype=torch.float64)
    for b in range(len(dense)):
        pairs = zip(STUDENT.mask[b].nonzero().flatten(), TEACHER.mask[b].nonzero().flatten(), strict=False)
        for i, j in pairs:
            dense[b, i, j] = 1
    check(time_map, dense, dense.sum(-1) > 0)


def test_identity_costs_nothing_and_is_valid_on_both():
    short = spread([(1, 2, 1), (2, 2, 2)], [0, 2], 9)
    other = spread([(2, 2, 2), (1, 1, 1)], [0, 0], 9)
    time_map = build("identity")(short, other)
    x = torch.randn(2, 1, 1, 9, 2)
    assert time_map.apply(x) is x
    assert time_map.valid.tolist() == [[i < 4 for i in range(9)], [2 <= i < 3 for i in range(9)]]


def test_identity_refuses_other_lengths():
    with pytest.raises(KavaError) as caught:
        build("identity")(TEACHER, STUDENT)
    assert str(caught.value) == (
        "time_warper identity: the teacher has 13 positions and the student 10, they must be equal; "
        "other warpers: segment, pad, linear"
    )


@pytest.mark.parametrize("name", ["pad", "linear", "segment", "streaming"])
@pytest.mark.parametrize(("t_left", "left"), [(0, 4), (3, 0), (2, 3)])
def test_padding_changes_nothing(name, t_left, left):
    sizes, t_sizes = (2, 4, 2), (3, 5, 1)
    warper, x = build(name), torch.randn(1, 2, 2, 9, 3)
    tight = warper(timeline(t_sizes), timeline(sizes)).apply(x)
    padded = torch.full((1, 2, 2, t_left + 11, 3), torch.nan)
    padded[:, :, :, t_left : t_left + 9] = x
    time_map = warper(
        timeline(t_sizes, left=t_left, length=t_left + 11), timeline(sizes, left=left, length=left + 9)
    )
    found = time_map.apply(padded)
    assert torch.equal(found[:, :, :, left : left + 8], tight)
    assert not torch.cat([found[:, :, :, :left], found[:, :, :, left + 8 :]], 3).any()


@pytest.mark.parametrize("name", ["pad", "linear", "segment", "streaming"])
def test_nothing_to_read(name):
    empty, some = timeline((0, 0, 0), length=0), timeline((1, 2, 1))
    time_map = build(name)(empty, some)
    assert not time_map.valid.any()
    assert torch.equal(time_map.apply(torch.randn(1, 1, 2, 0, 3)), torch.zeros(1, 1, 2, 4, 3))
    assert build(name)(some, empty).apply(torch.randn(1, 1, 2, 4, 3)).shape == (1, 1, 2, 0, 3)


@pytest.mark.parametrize("name", ["pad", "linear", "segment", "streaming"])
def test_one_token_is_repeated(name):
    time_map = build(name)(timeline((0, 1, 0)), timeline((0, 3, 0)))
    x = torch.randn(1, 1, 1, 1, 2)
    reach = 3 if name in ("linear", "segment") else 1

    assert torch.equal(time_map.apply(x)[0, 0, 0, :reach], x[0, 0, 0].expand(reach, -1))
    assert time_map.valid.sum() == reach


@pytest.mark.parametrize("name", ["identity", "pad", "linear", "segment", "char_iou", "streaming"])
def test_maps_move_to_the_meta_device(name):
    time_map = build(name)(STUDENT, STUDENT).to("meta")
    assert time_map.apply(torch.empty(5, 2, 2, 10, 3, device="meta")).shape == (5, 2, 2, 10, 3)


@pytest.mark.parametrize("name", ["linear", "segment"])
@pytest.mark.parametrize("mode", ["auto", "area", "nearest"])
def test_half_precision(name, mode):
    time_map = build(name, mode=mode)(TEACHER, STUDENT)
    x = torch.randn(5, 2, 2, 13, 3).bfloat16()
    wanted = torch.einsum("bij,blhjd->blhid", time_map.dense(13).double(), x.double())
    torch.testing.assert_close(time_map.apply(x).double(), wanted, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("sinks", "window"), [(4, 512), (2, 3), (0, 1), (3, 2)])
def test_streaming(seed, sinks, window):
    generator = torch.Generator().manual_seed(seed)
    t_sizes, sizes = torch.randint(0, 9, (2, 6, 1), generator=generator).tolist()
    lefts = torch.randint(0, 3, (2, 6), generator=generator).tolist()
    teacher, student = spread(t_sizes, lefts[0], 12), spread(sizes, lefts[1], 11)
    dense = torch.zeros(6, 11, 12, dtype=torch.float64)
    for b, ((t_n,), (n,)) in enumerate(zip(t_sizes, sizes, strict=True)):
        for u in range(n):
            read = u if u < sinks else t_n - (n - u) if n - u <= window else -1
            if 0 <= read < t_n:
                dense[b, lefts[1][b] + u, lefts[0][b] + read] = 1
    check(build("streaming", sinks=sinks, window=window)(teacher, student), dense, dense.sum(-1) > 0)
