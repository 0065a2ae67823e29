"""Define the sparse, row-stochastic map from a teacher's positions to a student's, for each example.

Every time warp is such a map: student position i is a weighted mean of a few teacher positions (its
*taps*). The rows of a whole batch follow one another, as in a compressed sparse row (CSR) matrix, so a
position may have any number of taps.
"""

from __future__ import annotations

from collections.abc import Callable
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
        """Return the map by which position i reads position i."""
        index = torch.arange(valid.shape[1], device=valid.device).expand_as(valid)
        return replace(cls.gather(index, valid), identity=True)

    @classmethod
    def gather(cls, index: Int[Tensor, "batch time"], valid: Bool[Tensor, "batch time"]) -> TimeMap:
        """Return the map by which position i reads the one teacher position ``index[i]``."""
        return cls.of_taps(index[..., None], torch.ones_like(index, dtype=torch.float32)[..., None], valid)

    @classmethod
    def between(
        cls,
        low: Int[Tensor, "batch time"],
        high: Int[Tensor, "batch time"],
        fraction: Float[Tensor, "batch time"],
        valid: Bool[Tensor, "batch time"],
    ) -> TimeMap:
        """Return the map by which position i reads ``(1 − fraction) · low + fraction · high``."""
        fraction = fraction.float()
        return cls.of_taps(torch.stack([low, high], -1), torch.stack([1 - fraction, fraction], -1), valid)

    @classmethod
    def of_taps(
        cls,
        index: Int[Tensor, "batch time tap"],
        weight: Float[Tensor, "batch time tap"],
        valid: Bool[Tensor, "batch time"],
    ) -> TimeMap:
        """Return a map of equal numbers of taps, whose weights sum to 1. No shape depends on data.

        Taps of weight 0 stay, but repeat a tap that has weight: the position they named is not read.
        """
        heaviest = index.gather(2, weight.argmax(2, keepdim=True))
        read_index = torch.where(weight > 0, index, heaviest)
        index = torch.where(valid[..., None], read_index, 0)
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
        """Return a map of any number of taps in a row; each row is divided by its sum.

        Args:
            row: ascending, ``example · time + position``.
            index: teacher position of each tap.
            weight: at least 0. Taps of weight 0 are dropped; a position left without any is not valid.
            valid: which positions may be valid; taps of the others are dropped.
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
        """Return the mean number of taps of a position, rounded up, from shapes alone."""
        return -(-self.index.numel() // max(self.valid.numel(), 1))

    @property
    def rows(self) -> Int[Tensor, " tap"]:
        """Return the row of each tap: ``example · time + position``."""
        return torch.repeat_interleave(self.start.diff(), output_size=self.index.numel())

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> TimeMap:
        """Return the map on another device."""
        return self._change_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TimeMap:
        """Return the map in page-locked memory, from where copies to a GPU need not be waited for."""
        return self._change_tensors(lambda tensor: tensor.pin_memory())

    def _change_tensors(self, change: Callable[[Tensor], Tensor]) -> TimeMap:
        return TimeMap(
            index=change(self.index),
            weight=change(self.weight),
            start=change(self.start),
            valid=change(self.valid),
            identity=self.identity,
        )

    def apply(
        self, x: Float[Tensor, "batch layer head t_time dim"]
    ) -> Float[Tensor, "batch layer head time dim"]:
        """Return the warped tensor, in ``x``'s dtype and summed in float32 or better.

        Invalid positions hold zeros. The identity returns ``x`` as it is.
        """
        if self.identity:
            return x
        batch, layer, head, t_time, dim = x.shape
        if t_time == 0:
            return x.new_zeros(batch, layer, head, self.valid.shape[1], dim)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        # Measured: if few positions are read, copying all of them costs more than listing the taps of
        # every head; else whole positions are read and written in one piece, up to twice as fast.
        reads_few = 2 * self.index.numel() < batch * t_time
        warped = self._apply_by_head(wide) if reads_few else self._apply_by_position(wide)
        return warped.to(x.dtype)

    def _apply_by_position(self, x: Tensor) -> Tensor:
        """Warp all layers and heads of a position as one row."""
        layer, head, t_time = x.shape[1:4]
        rows = rearrange(x, "batch layer head time dim -> (batch time) (layer head dim)")
        example = self.rows // max(self.valid.shape[1], 1)
        row_index = self.index + example * t_time
        warped = weighted_rows(rows, row_index, self.weight.to(x.dtype), self.start, self.valid.flatten())
        # Not by einops, which cannot divide by the extents of an empty tensor.
        return warped.view(*self.valid.shape, layer, head, x.shape[4]).permute(0, 2, 3, 1, 4)

    def _apply_by_head(self, x: Tensor) -> Tensor:
        """Warp every head of every layer as rows of their own: the map's rows, once for each head."""
        batch, layer, head, t_time, dim = x.shape
        time, copies = self.valid.shape[1], layer * head

        def for_every_head(of_position: Tensor) -> Tensor:
            return of_position.view(batch, 1, time).expand(-1, copies, -1).flatten()

        first, count = for_every_head(self.start[:-1]), for_every_head(self.start.diff())
        row, tap = expand_ranges(first, count, total=self.index.numel() * copies)
        row_index = self.index[tap] + row // max(time, 1) * t_time
        start = F.pad(count.cumsum(0), (1, 0))
        rows = rearrange(x, "batch layer head time dim -> (batch layer head time) dim")
        weight = self.weight[tap].to(x.dtype)
        warped = weighted_rows(rows, row_index, weight, start, for_every_head(self.valid))
        return warped.view(batch, layer, head, time, dim)

    def dense(self, t_time: int) -> Float[Tensor, "batch time t_time"]:
        """Return the map as a matrix; rows of invalid positions are zero."""
        matrix = self.weight.new_zeros(self.valid.numel(), t_time)
        row = self.rows
        is_read = self.valid.flatten()[row]
        matrix.index_put_((row[is_read], self.index[is_read]), self.weight[is_read], accumulate=True)
        return matrix.view(*self.valid.shape, t_time)

    def then(self, second: TimeMap) -> TimeMap:
        """Combine this map with a ``second`` one, whose teacher positions are this map's rows, to one map.

        Taps of ``second`` at positions that are not valid here are left out, and the rest of the row is
        divided by its sum; a position left without any is not valid. Taps of one row at the same teacher
        position become one.
        """
        if second.identity:
            return replace(self, valid=self.valid & second.valid)
        row = second.rows
        is_read = second.valid.flatten()[row]
        row = row[is_read]
        example = row // max(second.valid.shape[1], 1)
        own_row = example * self.valid.shape[1] + second.index[is_read]
        count = torch.where(self.valid.flatten()[own_row], self.start.diff()[own_row], 0)
        second_tap, tap = expand_ranges(self.start[own_row], count)
        weight = second.weight[is_read][second_tap].double() * self.weight[tap].double()
        taps = _merge_equal_taps(row[second_tap], self.index[tap], weight)
        return TimeMap.of_entries(*taps, second.valid)


def expand_ranges(
    first: Int[Tensor, " _"], count: Int[Tensor, " _"], total: int | None = None
) -> tuple[Int[Tensor, " tap"], Int[Tensor, " tap"]]:
    """Return all numbers of the ranges ``first[k] … first[k] + count[k] − 1``: the k of each, and itself.

    With ``total``, the sum of ``count``, nothing waits for a GPU.
    """
    range_of_number = torch.repeat_interleave(count, output_size=total)
    shift = first - count.cumsum(0) + count
    numbers = torch.arange(len(range_of_number), device=count.device)
    return range_of_number, numbers + shift.index_select(0, range_of_number)


def _merge_equal_taps(row: Tensor, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each (row, index) once, in order, with the sum of its weights."""
    pairs, pair_of_tap = torch.unique(torch.stack([row, index]), dim=1, return_inverse=True)
    summed = weight.new_zeros(pairs.shape[1]).index_add_(0, pair_of_tap, weight)
    return pairs[0], pairs[1], summed
