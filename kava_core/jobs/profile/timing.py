"""Time and memory of a piece of work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from statistics import median
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

R = TypeVar("R")

REPEATS = 5
"""Passes whose median is taken, after one that warms up."""


@runtime_checkable
class Gauge(Protocol):
    """Does some work, and says what it took beside what it gave."""

    def __call__(self, work: Callable[[], R]) -> tuple[float, R]:
        """Measure and result."""
        ...


class Stopwatch:
    """Seconds; a GPU is waited for before and after."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __call__(self, work: Callable[[], R]) -> tuple[float, R]:
        """Seconds and result."""
        begin = self._now()
        result = work()
        return self._now() - begin, result


class Memory:
    """Bytes: on a GPU how far the peak lies above what was there before; elsewhere of all tensors made.

    The latter counts every new storage, also of what is soon given back, so it is at least the peak.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, work: Callable[[], R]) -> tuple[float, R]:
        """Bytes and result."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            result = work()
            return float(torch.cuda.max_memory_allocated(self.device) - before), result
        with _Made() as made:
            result = work()
        return float(made.bytes), result


class _Made(TorchDispatchMode):
    """Adds up the storages that operations return and were not given."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Mapping[str, Any] | None = None
    ) -> Any:
        found = function(*arguments, **(keywords or {}))
        given = {_storage(x) for x in tree_leaves((arguments, keywords)) if isinstance(x, Tensor)}
        made = {
            _storage(x): x.untyped_storage().nbytes() for x in tree_leaves(found) if isinstance(x, Tensor)
        }
        self.bytes += sum(size for place, size in made.items() if place not in given)
        return found


def _storage(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


def repeated(
    work: Callable[[Gauge], Iterator[tuple[str, float]]], device: torch.device
) -> dict[str, tuple[float, float]]:
    """Milliseconds, the median of ``REPEATS`` passes, and MiB, by the name of what was measured."""
    list(work(Stopwatch(device)))
    passes = [list(work(Stopwatch(device))) for _ in range(REPEATS)]
    sizes = list(work(Memory(device)))
    return {
        name: (1e3 * median(one[place][1] for one in passes), size / 2**20)
        for place, (name, size) in enumerate(sizes)
    }
