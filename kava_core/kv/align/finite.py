"""Check values, not only shapes, without waiting for a GPU.

On the CPU, and in debug mode everywhere, a fault is an error at once. On a GPU the answer is a flag that
stays there; ``raise_unread_faults`` reads all flags together, where a step waits for the device anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kava_core import shapecheck
from kava_core.config import Part
from kava_core.errors import KavaError, NonFiniteError
from kava_core.kv.maths.masks import widen
from kava_core.protocols.axes import Cache

MOST_UNREAD = 512
"""Flags that may wait; the next one reads them all, so a caller that never does keeps little."""

MakeError = Callable[[list[int]], KavaError]
"""Makes the error from the indices at which something is wrong."""

MakeNote = Callable[[], str]
"""Makes a note that says whose fault it is."""


@dataclass(frozen=True)
class _UnreadFault:
    """A flag on a GPU, and what it means if it is set."""

    is_bad: Tensor
    make_error: MakeError
    notes: tuple[MakeNote, ...]


_unread: list[_UnreadFault] = []
_notes: list[MakeNote] = []


@contextmanager
def noted_faults(make_note: MakeNote) -> Iterator[None]:
    """Add a note to every fault that is found inside and read later."""
    _notes.append(make_note)
    try:
        yield
    finally:
        _notes.pop()


def has_numbers_at_hand(x: Tensor) -> bool:
    """Return whether a tensor may be read now: on the CPU, and in debug mode everywhere."""
    return x.device.type == "cpu" or shapecheck.active()


def raise_if(is_bad: Bool[Tensor, " _"], make_error: MakeError) -> None:
    """Raise an error if something is wrong; on a GPU leave it to ``raise_unread_faults``.

    Args:
        is_bad: True at every index at which something is wrong. Tensors on the meta device pass.
        make_error: called with the indices, if there are any.
    """
    if is_bad.is_meta:
        return
    if has_numbers_at_hand(is_bad):
        if is_bad.any():
            raise make_error(is_bad.nonzero().flatten().tolist())
        return
    _unread.append(_UnreadFault(is_bad, make_error, tuple(reversed(_notes))))
    if len(_unread) >= MOST_UNREAD:
        raise_unread_faults()


def raise_unread_faults() -> None:
    """Raise the first fault that was found on a GPU since the last call; it waits for the device.

    Raises:
        PluginError: a component broke its contract.
        NonFiniteError: a component returned NaN or infinity.
    """
    faults = _unread[:]
    _unread.clear()
    of_device: dict[torch.device, list[Tensor]] = {}
    for fault in faults:
        of_device.setdefault(fault.is_bad.device, []).append(fault.is_bad.any())
    # One wait for each device, however many flags there are.
    if not any(bool(torch.stack(flags).any()) for flags in of_device.values()):
        return
    for fault in faults:
        indices = fault.is_bad.nonzero().flatten().tolist()
        if indices:
            error = fault.make_error(indices)
            for note in fault.notes:
                error.add_note(note())
            raise error


def layers_not_finite(
    x: Float[Tensor, "batch layer head time dim"], valid: Bool[Tensor, "batch time"]
) -> Bool[Tensor, " layer"]:
    """Return which layers hold NaN or infinity at a valid position.

    Sums over heads and width are looked at, which are many fewer numbers; they overflow only where a loss
    would as well.
    """
    sums = x.detach().sum(dim=(2, 4))
    return (~torch.isfinite(sums) & valid[:, None]).any(dim=2).any(dim=0)


def assert_finite(
    cache: Cache, valid: Bool[Tensor, "batch time"], where: str, *, first_layer: int = 0
) -> None:
    """Check that a cache holds no NaN or infinity at valid positions; tensors on the meta device pass.

    Args:
        cache: each part ``batch layer head time dim``.
        valid: the positions that count.
        where: how the error names the cache.
        first_layer: the index, for the error, of the cache's first layer.

    Raises:
        NonFiniteError: names the part and the layers.
    """
    for part, x in cache.items():
        if x.is_meta:
            continue

        def make_error(layers: list[int], part: Part = part) -> KavaError:
            named = [first_layer + layer for layer in layers]
            return NonFiniteError(
                f"{where}: {part} of layers {named} hold NaN or infinity at valid positions"
            )

        raise_if(layers_not_finite(x, valid), make_error)


def part_at_least_float32(x: Tensor, _: Part) -> Tensor:
    """Cast half precision to float32, in which caches are aligned and compared; leave wider dtypes alone."""
    return widen(x)
