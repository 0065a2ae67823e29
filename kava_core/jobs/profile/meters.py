"""Measure the time and memory of a piece of work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
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
class Meter(Protocol):
    """Anything that does some work and measures what it took."""

    def __call__(self, work: Callable[[], R]) -> tuple[float, R]:
        """Return the measure and the work's result."""
        ...


class Stopwatch:
    """A meter of seconds; it waits for a GPU before and after."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __call__(self, work: Callable[[], R]) -> tuple[float, R]:
        """Return the seconds and the work's result."""
        begin = self._now()
        result = work()
        return self._now() - begin, result


class MemoryMeter:
    """A meter of bytes.

    On a GPU: how far the peak is above what was there before. Elsewhere: the bytes of all tensors made; this
    counts every new storage, also of what is soon given back, so it is at least the peak.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, work: Callable[[], R]) -> tuple[float, R]:
        """Return the bytes and the work's result."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            result = work()
            return float(torch.cuda.max_memory_allocated(self.device) - before), result
        with _NewStorages() as made:
            result = work()
        return float(made.bytes), result


class _NewStorages(TorchDispatchMode):
    """Adds up the storages that operations return and were not given."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Mapping[str, Any] | None = None
    ) -> Any:
        result = function(*arguments, **(keywords or {}))
        given = _storage_sizes(tree_leaves((arguments, keywords)))
        made = _storage_sizes(tree_leaves(result))
        self.bytes += sum(size for storage, size in made.items() if storage not in given)
        return result


def _storage_sizes(values: Iterable[Any]) -> dict[int, int]:
    """Return the bytes of every storage that one of the tensors among the values views."""
    sizes = {}
    for value in values:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            sizes[int(storage._cdata)] = storage.nbytes()
    return sizes


def measure_repeatedly(
    work: Callable[[Meter], Iterator[tuple[str, float]]], device: torch.device
) -> dict[str, tuple[float, float]]:
    """Return milliseconds, the median of ``REPEATS`` passes, and MiB, by the name of what was measured.

    Args:
        work: uses a meter for each of its steps, and yields the step's name and measure.
        device: where the work runs.
    """
    list(work(Stopwatch(device)))
    passes = [list(work(Stopwatch(device))) for _ in range(REPEATS)]
    sizes = list(work(MemoryMeter(device)))
    measures = {}
    for index, (name, size) in enumerate(sizes):
        seconds = median(steps[index][1] for steps in passes)
        measures[name] = (1e3 * seconds, size / 2**20)
    return measures
