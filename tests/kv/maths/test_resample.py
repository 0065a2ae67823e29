"""Time resampling against double loops."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from kava_core.kv.maths.resample import (
    block_map,
    evenly_kept,
    moving_average,
    places,
    safe_linear_indices,
    safe_time_resample,
)

torch.set_num_threads(1)
LENGTHS = [(1, 1), (1, 5), (5, 1), (6, 1), (2, 7), (7, 2), (5, 5), (9, 4), (3, 8)]


def even_place(i, t_time, time):
    return (t_time - 1) / 2 if time == 1 else i * (t_time - 1) / (time - 1)


def covered(i, t_time, time):
    """Every teacher place's share of ``[i, i + 1) · t_time / time``, exactly."""
    low, high = Fraction(i * t_time, time), Fraction((i + 1) * t_time, time)
    shares = [max(min(high, j + 1) - max(low, j), 0) / (high - low) for j in range(t_time)]
    return torch.tensor([float(share) for share in shares], dtype=torch.float64)


def slow_resample(x, time, mode):
    out = torch.zeros(*x.shape[:-2], time, x.shape[-1], dtype=torch.float64)
    for i in range(time):
        place = even_place(i, x.shape[-2], time)
        if mode == "area":
            out[..., i, :] = (covered(i, x.shape[-2], time)[:, None] * x.double()).sum(-2)
        elif mode == "nearest":
            out[..., i, :] = x[..., math.floor(place + 0.5), :]
        else:
            low, high = math.floor(place), math.ceil(place)
            out[..., i, :] = x[..., low, :] + (place - low) * (x[..., high, :] - x[..., low, :])
    return out


@pytest.mark.parametrize(("t_time", "time"), LENGTHS)
def test_indices_are_the_rounded_even_places(t_time, time):
    indices = safe_linear_indices(t_time, time)
    assert indices.dtype == torch.long
    assert indices.tolist() == [math.floor(even_place(i, t_time, time) + 0.5) for i in range(time)]


def test_indices_of_nothing():
    assert safe_linear_indices(0, 3).tolist() == [0, 0, 0]
    assert safe_linear_indices(4, 0).tolist() == []
    assert safe_linear_indices(3, 4, device="meta").is_meta


@pytest.mark.parametrize("mode", ["interpolate", "area", "nearest"])
@pytest.mark.parametrize("lead", [(2,), (2, 3), (2, 3, 2)])
@pytest.mark.parametrize(("t_time", "time"), LENGTHS)
def test_resample_is_the_double_loop(t_time, time, lead, mode):
    x = torch.randn(*lead, t_time, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = safe_time_resample(x, time, mode=mode)
    torch.testing.assert_close(found, slow_resample(x, time, mode), rtol=1e-6, atol=1e-6)
    half = x.bfloat16()
    found = safe_time_resample(half, time, mode=mode)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(
        found.double(), slow_resample(half.double(), time, mode), rtol=2**-8, atol=1e-6
    )


@pytest.mark.parametrize("mode", ["interpolate", "area", "nearest"])
def test_resample_other_axis_and_gradient(mode):
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    found = safe_time_resample(x, 8, axis=0, mode=mode)
    wanted = slow_resample(x.permute(1, 0, 2), 8, mode).permute(1, 0, 2)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    weight = torch.randn(8, 2, 3, dtype=torch.float64)
    (mine,) = torch.autograd.grad((found * weight).sum(), x)
    (theirs,) = torch.autograd.grad((wanted * weight).sum(), x)
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["interpolate", "area", "nearest"])
def test_resample_at_the_edges(mode):
    assert torch.equal(safe_time_resample(torch.randn(2, 0, 3), 4, mode=mode), torch.zeros(2, 4, 3))
    one = torch.randn(2, 1, 3)
    assert torch.equal(safe_time_resample(one, 4, mode=mode), one.expand(2, 4, 3))
    assert safe_time_resample(torch.randn(2, 5, 3), 0, mode=mode).shape == (2, 0, 3)
    assert safe_time_resample(torch.randn(2, 5, 3, device="meta"), 4, mode=mode).shape == (2, 4, 3)


@pytest.mark.parametrize(("t_count", "count"), [*LENGTHS, (40, 7), (7, 40), (311, 97)])
def test_block_map_is_torchs_interpolation(t_count, count):
    """Half-pixel centres: ``F.interpolate`` without corner alignment, and ``nearest-exact``."""
    at = one_block(t_count, count)
    x = torch.randn(1, 1, 1, t_count, 3, dtype=torch.float64)
    rows = x[0, 0].mT
    wanted = F.interpolate(rows, size=count, mode="linear").mT[0]
    torch.testing.assert_close(block_map(at, "interpolate").apply(x)[0, 0, 0], wanted, rtol=1e-5, atol=1e-6)
    wanted = F.interpolate(rows, size=count, mode="nearest-exact").mT[0]
    assert torch.equal(block_map(at, "nearest").apply(x)[0, 0, 0], wanted)


def one_block(t_count, count):
    return places(torch.zeros(1, t_count).long(), torch.zeros(1, count).long(), 1)


@pytest.mark.parametrize(("t_count", "count"), [*LENGTHS, (40, 7), (7, 40), (311, 97), (97, 311)])
def test_area_weighs_every_place_by_its_overlap(t_count, count):
    dense = block_map(one_block(t_count, count), "area").dense(t_count)[0].double()
    wanted = torch.stack([covered(i, t_count, count) for i in range(count)])
    torch.testing.assert_close(dense, wanted, rtol=0, atol=1e-7)


def test_area_of_a_long_block_is_exact():
    """A running sum in float32 would be off by thousandths here."""
    t_count, count = 100_000, 33_333
    rows = block_map(one_block(t_count, count), "area")
    wanted = covered_long(count - 1, t_count, count)
    own = slice(rows.start[-2], rows.start[-1])
    assert rows.index[own].tolist() == list(wanted)
    assert rows.weight[own].tolist() == pytest.approx(list(wanted.values()), rel=1e-7)


def covered_long(i, t_time, time):
    low, high = Fraction(i * t_time, time), Fraction((i + 1) * t_time, time)
    shares = {j: min(high, j + 1) - max(low, j) for j in range(math.floor(low), math.ceil(high))}
    return {j: float(share / (high - low)) for j, share in shares.items()}


@pytest.mark.parametrize(
    ("t_count", "count", "mode"), [(9, 4, "area"), (8, 4, "interpolate"), (3, 8, "interpolate")]
)
def test_auto_averages_what_shrinks_to_less_than_half(t_count, count, mode):
    at = one_block(t_count, count)
    assert torch.equal(block_map(at).dense(t_count), block_map(at, mode).dense(t_count))


def test_auto_reads_every_position_of_a_shrinking_block():
    assert block_map(one_block(50, 3)).dense(50).sum(1).gt(0).all()
    assert not block_map(one_block(50, 3), "interpolate").dense(50).sum(1).gt(0).all()


@pytest.mark.parametrize("window", [1, 3, 5, 99])
def test_moving_average_stays_within_its_block(window):
    block = torch.tensor([[-1, 0, 0, 0, 0, 1, 1, -1], [2, 2, 2, 2, 2, 2, 2, 2]])
    found = moving_average(places(block, block, 3), torch.full_like(block, window))
    wanted = torch.zeros(2, 8, 8)
    for b, i in (block >= 0).nonzero().tolist():
        near = [j for j in range(8) if block[b, j] == block[b, i] and abs(i - j) <= window // 2]
        wanted[b, i, near] = 1 / len(near)
    assert torch.equal(found.valid, block >= 0)
    torch.testing.assert_close(found.dense(8), wanted)


def test_places_of_scattered_blocks():
    t_block = torch.tensor([[-1, 0, 0, 2], [1, 1, 1, -1]])
    block = torch.tensor([[0, 0, 1, 2, -1], [-1, 1, 1, 2, 2]])
    at = places(t_block, block, 3)
    valid = [[True, True, False, True, False], [False, True, True, False, False]]
    assert at.valid.tolist() == valid
    read = lambda field: field[at.valid].tolist()  # noqa: E731
    assert read(at.offset) == [0, 1, 0, 0, 1]
    assert read(at.count) == [2, 2, 1, 2, 2]
    assert read(at.t_start) == [1, 1, 3, 0, 0]
    assert read(at.t_count) == [2, 2, 1, 3, 3]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 13, 40])
@pytest.mark.parametrize("percent", [1, 10, 25, 30, 50, 70, 99, 100])
def test_kept_positions_are_the_centres_of_equal_parts(count, percent):
    at = places(torch.zeros(1, 3).long(), torch.zeros(1, count).long(), 1)
    kept = evenly_kept(at, torch.full((1, count), percent * 10_000))
    parts = max(1, (2 * count * percent + 100) // 200)
    assert kept[0].nonzero().flatten().tolist() == [
        ((2 * j + 1) * count) // (2 * parts) for j in range(parts)
    ]
