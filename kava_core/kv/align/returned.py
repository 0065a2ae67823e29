"""Check what components return: kind of value, shape, dtype, device, and what numbers may be in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kava_core.errors import NonFiniteError, PluginError
from kava_core.kv.align.finite import has_numbers_at_hand, raise_if, raise_unread_faults
from kava_core.protocols.axes import Cache
from kava_core.protocols.time_map import TimeMap
from kava_core.protocols.timeline import REASONING, Timeline

ROW_SUM_TOLERANCE = 1e-3
"""How far from 1 a row of weights may sum: far above rounding, far below a mistake."""


def require_shape(x: Any, extents: Sequence[int], axes: str) -> Tensor:
    """Return ``x`` unchanged if it is a tensor of this shape.

    Args:
        x: what a component returned.
        extents: the shape it must have.
        axes: names of the axes, separated by blanks, for the error.

    Raises:
        PluginError: ``x`` is no tensor, or has another shape.
    """
    named_extents = zip(axes.split(), extents, strict=True)
    wanted = ", ".join(f"{axis} {extent}" for axis, extent in named_extents)
    must_be = f"must be {list(extents)} ({wanted})" if extents else "must be a scalar"
    if not isinstance(x, Tensor):
        raise PluginError(f"returned {type(x).__name__}, not a tensor; its shape {must_be}")
    if tuple(x.shape) != tuple(extents):
        raise PluginError(f"returned shape {list(x.shape)}, {must_be}")
    return x


def require_device(x: Tensor, device: torch.device) -> None:
    """Check that a component left its result where its input is.

    Raises:
        PluginError: it is elsewhere, on the meta device for example.
    """
    if x.device != device:
        raise PluginError(f"returned a tensor on {x.device}, must be on {device}, as its input is")


def require_floats(x: Tensor, *, at_least: torch.dtype | None = None) -> None:
    """Check that a component returned real numbers.

    Args:
        x: what it returned.
        at_least: the narrowest dtype that will do; None: any.

    Raises:
        PluginError: the dtype is complex, integer or too narrow.
    """
    too_narrow = at_least is not None and x.dtype.itemsize < at_least.itemsize
    if not x.dtype.is_floating_point or too_narrow:
        wanted = "a real floating-point dtype" if at_least is None else f"{at_least} or wider"
        raise PluginError(f"returned {x.dtype}, must be {wanted}")


def require_like(x: Any, given: Tensor, extents: Sequence[int], axes: str) -> Tensor:
    """Return ``x`` if it has this shape, and dtype and device of what the component was given.

    Args:
        x: what a component returned.
        given: what it was given.
        extents: the shape it must have.
        axes: names of the axes, for the error.

    Raises:
        PluginError: it has not.
    """
    x = require_shape(x, extents, axes)
    if x.dtype != given.dtype:
        raise PluginError(f"returned {x.dtype}, must be {given.dtype}, as its input is")
    require_device(x, given.device)
    return x


# weights


def require_weights(weights: Tensor, axis: str) -> None:
    """Check that weights are finite and not negative.

    Args:
        weights: of teachers, layers or taps, with those that do not count set to 0.
        axis: what the weights are given to, for the error.

    Raises:
        NonFiniteError: a weight is NaN or infinite.
        PluginError: a weight is negative.
    """
    if weights.numel() == 0:
        return
    low, high = torch.aminmax(weights.detach())
    # NaN is neither.
    is_bad = ~((low >= 0) & (high < torch.inf))

    def make_error(_: list[int]) -> NonFiniteError | PluginError:
        least = float(low)
        if bool((low < 0) & torch.isfinite(low) & torch.isfinite(high)):
            return PluginError(f"weights must be at least 0, not {least:.3g}")
        return NonFiniteError(f"weights of {axis} must be finite, not {float(low + high):.3g}")

    raise_if(is_bad[None], make_error)


def require_means(
    matrix: Tensor, student_layers: Sequence[int] | Tensor, *, may_be_empty: bool = False
) -> None:
    """Check the rows of a layer mapper's matrix: finite, at least 0, and means.

    Args:
        matrix: ``layer t_layer``, of the layers that are read.
        student_layers: the student layer of every row, for the error.
        may_be_empty: let rows pass that read no layer.

    Raises:
        NonFiniteError: a weight is NaN or infinite.
        PluginError: a weight is negative, or a row does not sum to 1.
    """
    require_weights(matrix, "layers")
    sums = matrix.detach().sum(1)
    is_bad = (sums - 1).abs() > ROW_SUM_TOLERANCE
    if may_be_empty:
        is_bad = is_bad & matrix.ne(0).any(1)

    def make_error(rows: list[int]) -> PluginError:
        layers = [int(student_layers[row]) for row in rows]
        given = [round(float(sums[row]), 4) for row in rows]
        return PluginError(f"rows must be at least 0 and sum to 1, not {given} (student layers {layers})")

    raise_if(is_bad, make_error)


# losses


def require_finite_loss(loss: Tensor, caches: Sequence[Cache], weight: Tensor) -> None:
    """Check that a loss of finite caches is finite; of others it says nothing about the component.

    Args:
        loss: what the component returned.
        caches: the student's and the target's.
        weight: ``batch layer time``; positions of weight 0 do not count.

    Raises:
        NonFiniteError: the loss is NaN or infinite, and the caches are not.
    """
    is_bad = ~torch.isfinite(loss.detach())
    if loss.is_meta or (has_numbers_at_hand(loss) and not bool(is_bad)):
        return
    counts = weight.detach() != 0
    for cache in caches:
        for _, x in cache.items():
            is_bad = is_bad & ~_not_finite_where(x, counts)
    raise_if(is_bad[None], lambda _: NonFiniteError(f"returned {float(loss)} for finite caches"))


def _not_finite_where(x: Tensor, counts: Tensor) -> Tensor:
    """Return one bool: whether ``x`` holds NaN or infinity in a layer and position that counts."""
    return (~torch.isfinite(x.detach().sum(dim=(2, 4))) & counts).any()


# time maps


def require_time_map(time_map: Any, teacher: Timeline, student: Timeline, *, evicts: bool) -> TimeMap:
    """Return a time map if it keeps to its own examples and its rows are means.

    Args:
        time_map: what a time warper returned.
        teacher: the teacher's positions.
        student: the student's positions.
        evicts: whether the map reads slots, as many as the student has positions, not the teacher's own.

    Raises:
        PluginError: it is no ``TimeMap``, or its shapes, dtypes, device, starts, indices or weights are
            wrong.
        NonFiniteError: a weight is NaN or infinite.
    """
    if not isinstance(time_map, TimeMap):
        raise PluginError(f"must return a TimeMap, not {type(time_map).__name__}")
    _require_tensors_of_map(time_map, student)
    readable = student.mask if evicts else teacher.mask
    _require_starts(time_map)
    _require_indices(time_map, readable.shape[1])
    if time_map.index.numel():
        row = _row_of_tap(time_map)
        _require_rows_are_means(time_map, row)
        if not evicts:
            _require_real_positions(time_map, row, readable)
    is_served = (time_map.valid & ~student.mask).any(1)
    raise_if(is_served, lambda rows: PluginError(f"padding of the student is valid in examples {rows}"))
    if time_map.identity:
        _require_identity(time_map, readable.shape[1])
    if not has_numbers_at_hand(time_map.index):
        # At once: a GPU that follows a wrong index reads beyond its memory. Maps are seldom planned there.
        raise_unread_faults()
    return time_map


def _require_tensors_of_map(time_map: TimeMap, student: Timeline) -> None:
    batch, time = student.mask.shape
    taps = time_map.index.numel() if isinstance(time_map.index, Tensor) else 0
    shapes = {
        "valid": ((batch, time), "batch time"),
        "start": ((batch * time + 1,), "batch·time+1"),
        "index": ((taps,), "tap"),
        "weight": ((taps,), "tap"),
    }
    for field, (extents, axes) in shapes.items():
        tensor = getattr(time_map, field)
        try:
            require_device(require_shape(tensor, extents, axes), student.mask.device)
            _require_dtype_of_map(field, tensor.dtype)
        except PluginError as error:
            raise PluginError(f"{field} of the TimeMap: {error}") from None


def _require_dtype_of_map(field: str, dtype: torch.dtype) -> None:
    if field == "weight" and not dtype.is_floating_point:
        raise PluginError(f"returned {dtype}, must be torch.float32")
    if field == "valid" and dtype != torch.bool:
        raise PluginError(f"returned {dtype}, must be torch.bool")
    if field in ("index", "start") and dtype not in (torch.int64, torch.int32):
        raise PluginError(f"returned {dtype}, must be torch.int64")


def _require_starts(time_map: TimeMap) -> None:
    start, taps = time_map.start, time_map.index.numel()
    is_bad = (start[0] != 0) | (start[-1] != taps) | (start.diff() < 0).any()

    def make_error(_: list[int]) -> PluginError:
        ends = f"not from {int(start[0])} to {int(start[-1])}"
        falls = " with falls between" if bool((start.diff() < 0).any()) else ""
        return PluginError(
            f"start of the TimeMap must rise from 0 to the number of taps, {taps}, {ends}{falls}"
        )

    raise_if(is_bad[None], make_error)


def _row_of_tap(time_map: TimeMap) -> Tensor:
    """Return the row of every tap, also for wrong starts, which a GPU tells late."""
    number = torch.arange(time_map.index.numel(), device=time_map.start.device, dtype=time_map.start.dtype)
    row = torch.searchsorted(time_map.start[1:].contiguous(), number, right=True)
    return row.clamp_(max=time_map.valid.numel() - 1)


def _require_indices(time_map: TimeMap, t_time: int) -> None:
    if not time_map.index.numel():
        return
    if t_time == 0:
        # Nothing can be read; the constructors then write 0 as the index of positions that are not valid.
        raise_if(time_map.valid.any()[None], lambda _: PluginError("valid positions, but none to read"))
        return
    low, high = torch.aminmax(time_map.index)

    def make_error(_: list[int]) -> PluginError:
        wrong = int(low) if int(low) < 0 else int(high)
        return PluginError(
            f"index of the TimeMap must be from 0 to {t_time - 1}, inside its own example, not {wrong}"
        )

    raise_if(((low < 0) | (high >= t_time))[None], make_error)


def _require_rows_are_means(time_map: TimeMap, row: Tensor) -> None:
    valid = time_map.valid.flatten()
    # Whatever weights the other rows have is not read.
    weight = torch.where(valid[row], time_map.weight, 0)
    require_weights(weight, "taps")
    sums = weight.new_zeros(valid.numel(), dtype=torch.float64).index_add_(0, row, weight.double())
    is_bad = (((sums - 1).abs() > ROW_SUM_TOLERANCE) & valid).view(time_map.valid.shape)

    def make_error(examples: list[int]) -> PluginError:
        given = sorted({round(float(total), 4) for total in sums[is_bad.flatten()]})[:4]
        return PluginError(f"weights of a valid position must sum to 1, not {given}, in examples {examples}")

    raise_if(is_bad.any(1), make_error)


def _require_real_positions(time_map: TimeMap, row: Tensor, t_mask: Tensor) -> None:
    """Check that no valid position reads the teacher's padding."""
    batch, t_time = t_mask.shape
    if not t_mask.numel():
        return
    example = row // max(time_map.valid.shape[1], 1)
    place = example * t_time + time_map.index.clamp(0, t_time - 1)
    reads_padding = (time_map.weight != 0) & ~t_mask.flatten()[place] & time_map.valid.flatten()[row]
    examples_reading = torch.zeros(batch, device=row.device).index_add_(0, example, reads_padding.float()) > 0
    raise_if(examples_reading, lambda rows: PluginError(f"padding of the teacher is read in examples {rows}"))


def _require_identity(time_map: TimeMap, t_time: int) -> None:
    batch, time = time_map.valid.shape
    if t_time != time:
        raise PluginError(f"an identity TimeMap needs equal lengths: the teacher has {t_time}, not {time}")
    if time_map.index.numel() != batch * time:
        raise PluginError(f"an identity TimeMap has one tap a position, not {time_map.index.numel()}")
    position = torch.arange(time, device=time_map.index.device).expand(batch, time)
    moves = (time_map.index.view(batch, time) != position) & time_map.valid
    raise_if(
        moves.any(1), lambda rows: PluginError(f"an identity TimeMap moves positions in examples {rows}")
    )


# evictions


def require_evictions(positions: Any, extents: Sequence[int], timeline: Timeline, filled: Tensor) -> Tensor:
    """Return the positions that an evictor chose, if filled slots name reasoning tokens in time order.

    Args:
        positions: what it returned.
        extents: ``batch t_layer t_head slot``.
        timeline: the teacher's positions.
        filled: ``batch slot``, True where a slot holds a token.

    Raises:
        PluginError: they have another shape, dtype or device, or name other tokens, or one twice.
    """
    positions = require_shape(positions, extents, "batch t_layer t_head slot")
    if positions.dtype != torch.int64:
        raise PluginError(f"returned {positions.dtype}, must be torch.int64")
    require_device(positions, timeline.mask.device)
    t_time = timeline.mask.shape[1]
    if not positions.numel() or not t_time:
        return positions
    is_inside = (positions >= 0) & (positions < t_time)
    outside = ~is_inside.all(dim=3).all(dim=2).all(dim=1)
    raise_if(
        outside,
        lambda rows: PluginError(
            f"positions must be from 0 to {t_time - 1}, they are not in examples {rows}"
        ),
    )
    is_filled = filled[:, None, None]
    is_reasoning = (timeline.mask & (timeline.segments == REASONING))[:, None, None].expand(*extents[:3], -1)
    names_other = is_filled & ~is_reasoning.gather(3, positions.clamp(0, t_time - 1))
    goes_back = is_filled[..., 1:] & (positions.diff(dim=3) <= 0)
    is_wrong = names_other.flatten(1).any(1) | goes_back.flatten(1).any(1)
    raise_if(
        is_wrong,
        lambda rows: PluginError(
            f"filled slots must name different reasoning tokens in time order; not so in examples {rows}"
        ),
    )
    return positions
