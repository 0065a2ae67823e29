"""Tell how many processes train together, let their threads sleep, guard imports, and leave safely."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from threading import Timer
from typing import NoReturn


def is_main() -> bool:
    """Return whether this process, of all that the launcher started, writes to disk."""
    return os.environ.get("RANK", "0") == "0"


def world_size() -> int:
    """Return how many processes the launcher started, torchrun's ``WORLD_SIZE``; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def processes_met() -> int:
    """Return how many processes have joined torch.distributed; 1 before any has."""
    import torch

    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def let_waiting_threads_sleep() -> None:
    """Ask OpenMP's threads to sleep while they wait for one another; call it before torch is imported.

    By default they spin. On a machine with other work two spinning threads then wait for each other's time
    slice: a quickstart run of 60 steps took 217 and 276 s beside a load of 5 to 10 on two cores, and 92 and
    77 s with this (torch 2.13, alternated). A setting of the user's own stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def leave(code: int) -> NoReturn:
    """End a process of several, with an exit code that says what happened.

    After torch.distributed with gloo an ordinary exit aborts in about one process of six (torch 2.13,
    "terminate called without an active exception"), also when the process group was destroyed before.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


SLOW_IMPORT_SECONDS = 5.0
"""After so long stderr names what is still being imported."""


@contextmanager
def guarded_import(who: str | None) -> Iterator[None]:
    """Keep what is imported inside from writing to stdout, and name it on stderr if it takes long.

    What it writes goes to stderr, also from C and from processes that it starts: a command's output may be
    JSON.

    Args:
        who: what is imported, for the line on stderr; None: it is kava's own, which imports torch.
    """
    told = f"{who}: its import has taken {SLOW_IMPORT_SECONDS:g} s and goes on; Ctrl-C stops kava"
    timer = Timer(SLOW_IMPORT_SECONDS, _print_on_stderr, [told])
    timer.daemon = True
    if who is not None:
        timer.start()
    try:
        with _descriptor_1_on_stderr(), redirect_stdout(sys.stderr):
            yield
    finally:
        timer.cancel()


def _print_on_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def _descriptor_1_on_stderr() -> Iterator[None]:
    """Let descriptor 1 be a copy of descriptor 2; a process without both is left as it is."""
    try:
        sys.stdout.flush()
        kept = os.dup(1)
    except (OSError, ValueError, AttributeError):
        yield
        return
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
