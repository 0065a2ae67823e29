"""Peak memory of one piece of work: alone, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

MIB = 2**20


def largest_resident() -> int:
    """Bytes of this process's largest resident size since it was last reset."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def growth(work: Callable[[], object], device: str) -> float:
    """MiB that ``work`` takes at its peak beside what was there before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    Path("/proc/self/clear_refs").write_text("5")
    before = largest_resident()
    work()
    return (largest_resident() - before) / MIB


def fresh(script: str, *arguments: str) -> float:
    """The number that a script prints in a process of its own.

    Every block above 64 KiB goes back to the system as soon as it is freed, so that the resident size is what
    is alive.
    """
    surroundings = {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "MALLOC_MMAP_THRESHOLD_": str(2**16),
    }
    done = subprocess.run(
        [sys.executable, script, *arguments],
        env=os.environ | surroundings,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(done.stdout.split()[-1])
