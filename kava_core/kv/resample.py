"""Resampling of the time axis: of one tensor, and of blocks of positions between two timelines.

Positions are computed with integers, so no rounding depends on the device or on the length.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kava_core.kv.timemap import TimeMap

Mode = Literal["interpolate", "nearest"]
"""Mean of the two neighbouring positions, or the nearer one."""


def safe_linear_indices(
    t_time: int, time: int, device: torch.device | str | None = None
) -> Int[Tensor, " time"]:
    """The positions to read, evenly spaced from the first to the last, rounded half up.

    Long, within ``[0, t_time − 1]``; a single one reads the middle. With ``t_time = 0`` there is nothing to
    read and all are 0. Earlier name: ``build_safe_linear_indices``.
    """
    last = max(t_time - 1, 0)
    if time == 1:
        return torch.full((1,), (last + 1) // 2, dtype=torch.long, device=device)
    steps = torch.arange(time, dtype=torch.long, device=device)
    return ((2 * steps * last + time - 1) // (2 * max(time - 1, 1))).clamp(0, last)


def safe_time_resample(
    x: Float[Tensor, " ..."], time: int, *, axis: int = -2, mode: Mode = "interpolate"
) -> Float[Tensor, " ..."]:
    """``x`` with ``time`` positions along ``axis``, the first and the last kept; other axes as they are.

    No positions give zeros, one is repeated, and a single wanted one is the middle. Dtype and device stay;
    half precision is interpolated in float32. For any number of axes (the earlier ``safe_time_resample``
    took 3, 4 or 5). ``x`` itself is returned where nothing changes.
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
    return _interpolate(x, time, axis)


def _interpolate(x: Float[Tensor, " ..."], time: int, axis: int) -> Float[Tensor, " ..."]:
    last, steps = x.shape[axis] - 1, time - 1
    moved = torch.arange(time, device=x.device)
    if time == 1:
        moved, steps = moved + 1, 2  # half of the way: the middle
    low = moved * last // steps
    wide = torch.promote_types(x.dtype, torch.float32)
    shape = [1] * x.ndim
    shape[axis] = time
    fraction = ((moved * last - low * steps).to(wide) / steps).view(shape)
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
        """The same places, valid only where also ``kept``."""
        return replace(self, valid=self.valid & kept)


def places(t_block: Int[Tensor, "batch t_time"], block: Int[Tensor, "batch time"], blocks: int) -> Places:
    """Where each student position stands; block ids count from 0, −1 belongs to no block.

    The positions of a block are adjacent. Every example has its own borders.
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
    """First position and size of every block, each ``[batch, blocks]``; a missing one has size 0."""
    inside = block[..., None] == torch.arange(blocks, device=block.device)
    return (inside.cumsum(1) == 0).sum(1), inside.sum(1)


def block_map(
    at: Places,
    mode: Mode = "interpolate",
    window: Int[Tensor, "batch time"] | None = None,
    widest: int = 1,
) -> TimeMap:
    """Each student block resampled from the teacher's block, on half-pixel centres.

    Student position u of n reads the teacher's place ``(u + ½) · t_count / n − ½``, as ``F.interpolate`` does
    with ``align_corners=False`` (``nearest``: as its ``nearest-exact``). An odd ``window`` first replaces the
    teacher's positions by their moving average, truncated at the borders of the block; ``widest`` is the
    largest window, so that the number of taps does not depend on data.
    """
    last = (at.t_count - 1).clamp_min(0)
    if mode == "nearest":
        low, fraction = (2 * at.offset + 1) * at.t_count // (2 * at.count), None
    else:
        scaled = ((2 * at.offset + 1) * at.t_count - at.count).clamp_min(0)
        low = scaled // (2 * at.count)
        fraction = (scaled - low * 2 * at.count).float() / (2 * at.count)
    low = torch.minimum(low.clamp_min(0), last)
    reach = torch.zeros_like(low) if window is None else window // 2
    return _taps(at, low, fraction, last, reach, widest // 2)


def _taps(
    at: Places, low: Tensor, fraction: Tensor | None, last: Tensor, reach: Tensor, widest: int
) -> TimeMap:
    """Taps from ``low − widest`` on; the weight of each is its share of both neighbours' averages."""
    taps = 2 * widest + (1 if fraction is None else 2)
    place = low[..., None] + torch.arange(-widest, taps - widest, device=low.device)
    weight = _share(place, low, last, reach)
    if fraction is not None:
        high = torch.minimum(low + 1, last)
        weight = torch.lerp(weight, _share(place, high, last, reach), fraction[..., None])
    place = torch.minimum(place.clamp_min(0), last[..., None]) + at.t_start[..., None]
    index = torch.where(at.valid[..., None], place, 0)
    return TimeMap(index, weight * at.valid[..., None], at.valid)


def _share(place: Tensor, centre: Tensor, last: Tensor, reach: Tensor) -> Tensor:
    """Weight of each tap in the average around ``centre``: 1/size of the truncated window, or 0."""
    start, stop = (centre - reach).clamp_min(0), torch.minimum(centre + reach, last)
    inside = (place >= start[..., None]) & (place <= stop[..., None])
    return inside.float() / (stop - start + 1)[..., None]


def evenly_kept(at: Places, millionths: Int[Tensor, "batch time"]) -> Bool[Tensor, "batch time"]:
    """Which positions of a block remain when a share of it, in millionths, is kept, evenly spaced.

    Of n positions k = share·n, rounded half up and at least 1, remain: those that hold the centre of one of
    k equal parts of the block.
    """
    kept = ((2 * at.count * millionths + 1_000_000) // 2_000_000).clamp_min(1)

    def centres_before(place: Tensor) -> Tensor:
        return (2 * kept * place + at.count - 1) // (2 * at.count)

    return centres_before(at.offset + 1) > centres_before(at.offset)
