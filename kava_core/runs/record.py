"""Read a run's record, ``run.json``, and describe the process that writes it."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Any

from kava_core.errors import CheckpointError
from kava_core.processes import world_size
from kava_core.versions import versions

REQUIRED = ("name", "variant", "seed", "spec_digest", "status", "data", "versions", "world_size")
"""What every ``run.json`` holds."""

STORE = "store"
"""In the record's ``flops_of``: what making the store took, spent before the first step."""


def read_record(file: Path) -> dict[str, Any]:
    """Return a ``run.json``, checked to hold everything that a run writes into it.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(file, f"unreadable: {error}") from error
    if not isinstance(record, dict):
        raise _damaged(file, f"holds a {type(record).__name__}, not an object")
    missing = [name for name in REQUIRED if name not in record]
    if missing:
        raise _damaged(file, f"says nothing of {', '.join(missing)}")
    if record["status"] == "complete" and not _are_results(record.get("results")):
        raise _damaged(file, "the run is complete, but its results are missing or no numbers")
    return record


def _damaged(file: Path, fault: str) -> CheckpointError:
    return CheckpointError(f"{file}: {fault}; restore it, or delete {file.parent} to train anew")


def _are_results(results: Any) -> bool:
    """Return whether these are numbers by name, the step among them."""
    if not isinstance(results, dict) or "steps" not in results:
        return False
    return all(isinstance(value, int | float) for value in results.values())


def environment() -> dict[str, Any]:
    """Return versions, machine and command of this process."""
    import torch

    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: version for name, version in versions().items() if version},
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "world_size": world_size(),
    }
