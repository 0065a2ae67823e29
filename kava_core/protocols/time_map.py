"""One sparse, row-stochastic map from a teacher's positions to a student's, per example.

Every time warp is such a map: student position i is a weighted mean of a few teacher positions (its
*taps*). The rows of a whole batch lie one after the other, as in a compressed sparse row (CSR) matrix, so a
position may have any number of taps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kava_core.protocols.weighted_rows import weighted_rows


@dataclass(frozen=True)
class TimeMap:
    """Taps of all student positions, row after row; the weights of a valid position sum to 1."""

    index: Int[Tensor, " tap"]
    """Teacher position of each tap, counted within its example."""
    weight: Float[Tensor, " tap"]
    """Its weight; float32 when kava made it."""
    start: Int[Tensor, " _"]
    """Where each row's taps begin, and their number at the end: ``batch · time + 1`` of them."""
    valid: Bool[Tensor, "batch time"]
    """Which student positions the map serves; whatever taps the others have is not read."""
    identity: bool = False
    """True where position i reads exactly position i: applying the map costs nothing."""

    @classmethod
    def same(cls, valid: Bool[Tensor, "batch time"]) -> TimeMap:
        """Position i reads position i."""
        index = torch.arange(valid.shape[1], device=valid.device).expand_as(valid)
        return replace(cls.gather(index, valid), identity=True)

    @classmethod
    def gather(cls, index: Int[Tensor, "batch time"], valid: Bool[Tensor, "batch time"]) -> TimeMap:
        """Position i reads one teacher position."""
        return cls.of_taps(index[..., None], torch.ones_like(index, dtype=torch.float32)[..., None], valid)

    @classmethod
    def between(
        cls,
        low: Int[Tensor, "batch time"],
        high: Int[Tensor, "batch time"],
        fraction: Float[Tensor, "batch time"],
        valid: Bool[Tensor, "batch time"],
    ) -> TimeMap:
        """Position i reads ``(1 − fraction) · low + fraction · high``."""
        fraction = fraction.float()
        return cls.of_taps(torch.stack([low, high], -1), torch.stack([1 - fraction, fraction], -1), valid)

    @classmethod
    def of_taps(
        cls,
        index: Int[Tensor, "batch time tap"],
        weight: Float[Tensor, "batch time tap"],
        valid: Bool[Tensor, "batch time"],
    ) -> TimeMap:
        """Equal numbers of taps, whose weights sum to 1. No shape depends on data.

        Taps of weight 0 stay, but repeat a tap that has weight: what they named is not read.
        """
        heaviest = index.gather(2, weight.argmax(2, keepdim=True))
        index = torch.where(valid[..., None], torch.where(weight > 0, index, heaviest), 0)
        taps = index.shape[2]
        start = torch.arange(0, index.numel() + 1, taps, device=index.device)
        return cls(index.flatten(), torch.where(valid[..., None], weight, 0).flatten(), start, valid)

    @classmethod
    def of_entries(
        cls,
        row: Int[Tensor, " tap"],
        index: Int[Tensor, " tap"],
        weight: Float[Tensor, " tap"],
        valid: Bool[Tensor, "batch time"],
    ) -> TimeMap:
        """Any number of taps in a row; each row is divided by its sum.

        Args:
            row: ascending, ``example · time + position``.
            index: teacher position of each tap.
            weight: at least 0. Taps of weight 0 are dropped; a position left without any is not valid.
            valid: which positions may be; taps of the others are dropped.
        """
        rows = valid.numel()
        kept = (weight > 0) & valid.flatten().index_select(0, row)
        if not kept.all():
            row, index, weight = row[kept], index[kept], weight[kept]
        weight = weight.double()
        total = weight.new_zeros(rows).index_add_(0, row, weight)
        start = F.pad(torch.bincount(row, minlength=rows).cumsum(0), (1, 0))
        weight = (weight / total.index_select(0, row)).float()
        return cls(index, weight, start, (total > 0).view(valid.shape))

    @property
    def taps(self) -> int:
        """Mean number of taps of a position, rounded up; from shapes alone."""
        return -(-self.index.numel() // max(self.valid.numel(), 1))

    @property
    def rows(self) -> Int[Tensor, " tap"]:
        """The row of each tap: ``example · time + position``."""
        return torch.repeat_interleave(self.start.diff(), output_size=self.index.numel())

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> TimeMap:
        """The map on another device."""
        index, weight, start, valid = (
            each.to(device, non_blocking=non_blocking)
            for each in (self.index, self.weight, self.start, self.valid)
        )
        return TimeMap(index, weight, start, valid, self.identity)

    def pin_memory(self) -> TimeMap:
        """The map in page-locked memory, from where copies to a GPU need not be waited for."""
        index, weight, start, valid = (
            each.pin_memory() for each in (self.index, self.weight, self.start, self.valid)
        )
        return TimeMap(index, weight, start, valid, self.identity)

    def apply(
        self, x: Float[Tensor, "batch layer head t_time dim"]
    ) -> Float[Tensor, "batch layer head time dim"]:
        """The warped tensor, in ``x``'s dtype and summed in float32 or better. Invalid positions hold zeros.

        The identity returns ``x`` as it is.
        """
        if self.identity:
            return x
        batch, layer, head, t_time, dim = x.shape
        if t_time == 0:
            return x.new_zeros(batch, layer, head, self.valid.shape[1], dim)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        # Measured: where few positions are read, copying all of them costs more than naming the taps of
        # every head; else whole positions are read and written in one piece, up to twice as fast.
        reads_few = 2 * self.index.numel() < batch * t_time
        return (self._by_head(wide) if reads_few else self._by_position(wide)).to(x.dtype)

    def _by_position(self, x: Tensor) -> Tensor:
        """All layers and heads of a position as one row."""
        layer, head, t_time = x.shape[1:4]
        rows = rearrange(x, "batch layer head time dim -> (batch time) (layer head dim)")
        place = self.index + self.rows // max(self.valid.shape[1], 1) * t_time
        warped = weighted_rows(rows, place, self.weight.to(x.dtype), self.start, self.valid.flatten())
        # Not by einops, which cannot divide by the extents of an empty tensor.
        return warped.view(*self.valid.shape, layer, head, x.shape[4]).permute(0, 2, 3, 1, 4)

    def _by_head(self, x: Tensor) -> Tensor:
        """Every head of every layer as rows of their own: the map's rows, once for each."""
        batch, layer, head, t_time, dim = x.shape
        time, copies = self.valid.shape[1], layer * head
        first, count, valid = (
            each.view(batch, 1, time).expand(-1, copies, -1).flatten()
            for each in (self.start[:-1], self.start.diff(), self.valid)
        )
        owner, taken = expand_ranges(first, count, total=self.index.numel() * copies)
        place = self.index[taken] + owner // max(time, 1) * t_time
        start = F.pad(count.cumsum(0), (1, 0))
        rows = rearrange(x, "batch layer head time dim -> (batch layer head time) dim")
        warped = weighted_rows(rows, place, self.weight[taken].to(x.dtype), start, valid)
        return warped.view(batch, layer, head, time, dim)

    def dense(self, t_time: int) -> Float[Tensor, "batch time t_time"]:
        """The map as a matrix; rows of invalid positions are zero."""
        matrix = self.weight.new_zeros(self.valid.numel(), t_time)
        row = self.rows
        live = self.valid.flatten()[row]
        matrix.index_put_((row[live], self.index[live]), self.weight[live], accumulate=True)
        return matrix.view(*self.valid.shape, t_time)

    def then(self, second: TimeMap) -> TimeMap:
        """This map followed by ``second``, whose teacher positions are this map's rows, as one map.

        What ``second`` reads from positions that are not valid here is left out, and the rest of the row
        divided by its sum; a position left without any is not valid. Taps of one row at the same teacher
        position become one.
        """
        if second.identity:
            return replace(self, valid=self.valid & second.valid)
        row = second.rows
        live = second.valid.flatten()[row]
        row = row[live]
        via = row // max(second.valid.shape[1], 1) * self.valid.shape[1] + second.index[live]
        count = torch.where(self.valid.flatten()[via], self.start.diff()[via], 0)
        owner, place = expand_ranges(self.start[via], count)
        weight = second.weight[live][owner].double() * self.weight[place].double()
        return TimeMap.of_entries(*_merge_equal_taps(row[owner], self.index[place], weight), second.valid)


def expand_ranges(
    first: Int[Tensor, " _"], count: Int[Tensor, " _"], total: int | None = None
) -> tuple[Int[Tensor, " tap"], Int[Tensor, " tap"]]:
    """All numbers of the ranges ``first[k] … first[k] + count[k] − 1``: which k each is from, and itself.

    With ``total``, the sum of ``count``, nothing waits for a GPU.
    """
    owner = torch.repeat_interleave(count, output_size=total)
    shift = first - count.cumsum(0) + count
    return owner, torch.arange(len(owner), device=count.device) + shift.index_select(0, owner)


def _merge_equal_taps(row: Tensor, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each (row, index) once, in order, with the sum of its weights."""
    pairs, which = torch.unique(torch.stack([row, index]), dim=1, return_inverse=True)
    return pairs[0], pairs[1], weight.new_zeros(pairs.shape[1]).index_add_(0, which, weight)
