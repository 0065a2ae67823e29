"""Resample the time axis: of one tensor, and of blocks of positions between two timelines.

Positions are computed with integers, so no rounding depends on the device or on the length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kava_core.protocols.time_map import TimeMap, expand_ranges

Mode = Literal["interpolate", "area", "nearest"]
"""Weighted mean of the two neighbouring positions, of all positions covered, or the nearest one."""
BlockMode = Mode | Literal["auto"]
"""``auto``: ``area`` where the block shrinks to less than half, so that no position goes unread, else
``interpolate``."""


def safe_linear_indices(
    t_time: int, time: int, device: torch.device | str | None = None
) -> Int[Tensor, " time"]:
    """Return the positions to read, evenly spaced from the first to the last, rounded half up.

    The indices have dtype long and lie within ``[0, t_time − 1]``; a single one reads the middle. With
    ``t_time = 0`` there is nothing to read and all are 0.

    Args:
        t_time: number of positions that can be read.
        time: number of positions wanted.
        device: of the result.
    """
    last = max(t_time - 1, 0)
    if time == 1:
        return torch.full((1,), (last + 1) // 2, dtype=torch.long, device=device)
    steps = torch.arange(time, dtype=torch.long, device=device)
    return ((2 * steps * last + time - 1) // (2 * max(time - 1, 1))).clamp(0, last)


def safe_time_resample(
    x: Float[Tensor, " ..."], time: int, *, axis: int = -2, mode: Mode = "interpolate"
) -> Float[Tensor, " ..."]:
    """Resample ``x`` to ``time`` positions along ``axis``; other axes stay, of which there may be any number.

    ``interpolate`` and ``nearest`` keep the first and the last position; if a single one is wanted, it is the
    middle. ``area``: position i is the mean over ``[i, i + 1) · t_time / time``. No positions give zeros, one
    is repeated. Dtype and device stay; half precision is summed in float32. ``x`` itself is returned if
    nothing changes.
    """
    t_time = x.shape[axis]
    if t_time == 0:
        shape = list(x.shape)
        shape[axis] = time
        return x.new_zeros(shape)
    if t_time == time:
        return x
    if mode == "nearest":
        return x.index_select(axis, safe_linear_indices(t_time, time, x.device))
    return _average(x, time, axis) if mode == "area" else _interpolate(x, time, axis)


def _average(x: Float[Tensor, " ..."], time: int, axis: int) -> Float[Tensor, " ..."]:
    moved = x.movedim(axis, 0)
    t_time, *others = moved.shape
    block = torch.zeros(1, t_time, dtype=torch.long), torch.zeros(1, time, dtype=torch.long)
    rows = moved.reshape(1, 1, 1, t_time, math.prod(others))
    averaged = block_map(places(*block, 1), "area").to(x.device).apply(rows)
    return averaged.reshape(time, *others).movedim(0, axis)


def _interpolate(x: Float[Tensor, " ..."], time: int, axis: int) -> Float[Tensor, " ..."]:
    last, steps = x.shape[axis] - 1, time - 1
    step = torch.arange(time, device=x.device)
    if time == 1:
        step, steps = step + 1, 2  # half of the way: the middle
    low = step * last // steps
    wide = torch.promote_types(x.dtype, torch.float32)
    shape = [1] * x.ndim
    shape[axis] = time
    fraction = ((step * last - low * steps).to(wide) / steps).view(shape)
    left = x.index_select(axis, low).to(wide)
    right = x.index_select(axis, (low + 1).clamp(max=last)).to(wide)
    return torch.lerp(left, right, fraction).to(x.dtype)


@dataclass(frozen=True)
class Places:
    """Every student position's place in its block, and the extent of the teacher's same block."""

    offset: Int[Tensor, "batch time"]
    """Position within the student's block, from 0."""
    count: Int[Tensor, "batch time"]
    """Positions of the student's block."""
    t_start: Int[Tensor, "batch time"]
    """First position of the teacher's block."""
    t_count: Int[Tensor, "batch time"]
    """Positions of the teacher's block."""
    valid: Bool[Tensor, "batch time"]
    """True where the student position is in a block and the teacher has that block."""

    def only(self, kept: Bool[Tensor, "batch time"]) -> Places:
        """Return the same places, valid only where ``kept`` is True as well."""
        return replace(self, valid=self.valid & kept)


def places(t_block: Int[Tensor, "batch t_time"], block: Int[Tensor, "batch time"], blocks: int) -> Places:
    """Return each student position's place in its block, and the extent of the teacher's same block.

    The positions of a block are adjacent. Every example has its own borders.

    Args:
        t_block: block number of each teacher position, from 0; −1 belongs to no block.
        block: block number of each student position, likewise.
        blocks: how many blocks there are at most.
    """
    t_first, t_sizes = _extents(t_block, blocks)
    first, sizes = _extents(block, blocks)
    own = block.clamp_min(0)
    t_count = t_sizes.gather(1, own)
    position = torch.arange(block.shape[1], device=block.device)
    return Places(
        offset=position - first.gather(1, own),
        count=sizes.gather(1, own).clamp_min(1),
        t_start=t_first.gather(1, own),
        t_count=t_count,
        valid=(block >= 0) & (t_count > 0),
    )


def _extents(block: Int[Tensor, "batch time"], blocks: int) -> tuple[Tensor, Tensor]:
    """Return first position and size of every block, each ``[batch, blocks]``; a missing block has size 0."""
    inside = block[..., None] == torch.arange(blocks, device=block.device)
    return (inside.cumsum(1) == 0).sum(1), inside.sum(1)


def block_map(at: Places, mode: BlockMode = "auto") -> TimeMap:
    """Return the map that resamples each student block from the teacher's block, on half-pixel centres.

    ``interpolate``: student position u of n reads the teacher's place ``(u + ½) · t_count / n − ½``, as
    ``F.interpolate`` does with ``align_corners=False`` (``nearest``: as its ``nearest-exact``). ``area``: it
    averages the teacher's places ``[u, u + 1) · t_count / n``, each weighted by its overlap. ``auto``:
    ``area`` where ``t_count > 2 n``, else ``interpolate``, block by block. The shapes of ``interpolate`` and
    ``nearest`` do not depend on data.
    """
    if mode == "nearest":
        nearest = (2 * at.offset + 1) * at.t_count // (2 * at.count)
        return TimeMap.gather(at.t_start + nearest, at.valid)
    if mode == "interpolate":
        low, part = _neighbour(at)
        high = torch.minimum(low + 1, (at.t_count - 1).clamp_min(0))
        return TimeMap.between(at.t_start + low, at.t_start + high, part / (2 * at.count), at.valid)
    return _covered(at, at.t_count > (0 if mode == "area" else 2 * at.count))


def _neighbour(at: Places) -> tuple[Tensor, Tensor]:
    """Return the teacher's position below the place to read, and the distance to it, times ``2 · count``."""
    scaled = ((2 * at.offset + 1) * at.t_count - at.count).clamp_min(0)
    low = scaled // (2 * at.count)
    return low, scaled - low * 2 * at.count


def _covered(at: Places, averaged: Tensor) -> TimeMap:
    """Return exact area averages where ``averaged`` is True, interpolation elsewhere."""
    low, part = _neighbour(at)
    first = torch.where(averaged, at.offset * at.t_count // at.count, low)
    stop = torch.where(averaged, -(-(at.offset + 1) * at.t_count // at.count), low + 2)
    count = torch.where(at.valid, torch.minimum(stop, at.t_count) - first, 0)
    # One entry for every pair of a student position (u of n) and a teacher position (t_u of t_n).
    row, t_u = expand_ranges(first.flatten(), count.flatten())
    u, n = at.offset.flatten()[row], at.count.flatten()[row]
    t_start, t_n = at.t_start.flatten()[row], at.t_count.flatten()[row]
    low, part = low.flatten()[row], part.flatten()[row]
    overlap = torch.minimum((t_u + 1) * n, (u + 1) * t_n) - torch.maximum(t_u * n, u * t_n)
    between = torch.where(t_u == low, 2 * n - part, part)
    weight = torch.where(averaged.flatten()[row], overlap, between).double()
    return TimeMap.of_entries(row, t_start + t_u, weight, at.valid)


def moving_average(at: Places, window: Int[Tensor, "batch time"]) -> TimeMap:
    """Return the map to each position's mean over a window around it, truncated at the borders of its block.

    Args:
        at: the positions' places in their own blocks, ``places(block, block, blocks)``.
        window: odd number of positions that are averaged, for each position.
    """
    reach = window // 2
    first = (at.offset - reach).clamp_min(0)
    count = torch.where(at.valid, torch.minimum(at.offset + reach + 1, at.count) - first, 0)
    row, index = expand_ranges((at.t_start + first).flatten(), count.flatten())
    return TimeMap.of_entries(row, index, torch.ones_like(index, dtype=torch.float32), at.valid)


def evenly_kept(at: Places, millionths: Int[Tensor, "batch time"]) -> Bool[Tensor, "batch time"]:
    """Return which positions of a block remain when a share of it is kept, evenly spaced.

    Of n positions k = share·n, rounded half up and at least 1, remain: those that hold the centre of one of k
    equal parts of the block.

    Args:
        at: the positions' places in their blocks.
        millionths: the share to keep, in millionths.
    """
    kept = ((2 * at.count * millionths + 1_000_000) // 2_000_000).clamp_min(1)

    def centres_before(position: Tensor) -> Tensor:
        return (2 * kept * position + at.count - 1) // (2 * at.count)

    return centres_before(at.offset + 1) > centres_before(at.offset)
