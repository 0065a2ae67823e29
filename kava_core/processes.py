"""Tell how many processes train together and which one this is, and leave them safely."""

from __future__ import annotations

import atexit
import os
import sys
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


def leave(code: int) -> NoReturn:
    """End a process of several, with an exit code that says what happened.

    After torch.distributed with gloo an ordinary exit aborts in about one process of six (torch 2.13,
    "terminate called without an active exception"), also when the process group was destroyed before.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
