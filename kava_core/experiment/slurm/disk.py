"""Room for checkpoints: free space, and the user's quota where quota-tools know of one."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from kava_core.errors import KavaError
from kava_core.paths import make_folder

NUMBERS = 8
"""Columns of ``quota`` after the file system: blocks, quota, limit, grace; the same of files."""


def write_test(folder: Path) -> None:
    """Write, flush and delete a small file; KavaError where that fails."""
    make_folder(folder)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".kava-write-test-") as file:
            file.write(b"kava")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise KavaError(f"{folder}: cannot be written: {error.strerror}") from error


def room(folder: Path) -> tuple[int, str]:
    """Bytes that the user may still write there, and what sets the limit; KavaError without the folder."""
    try:
        found = [(shutil.disk_usage(folder).free, "free")]
    except OSError as error:
        raise KavaError(f"{folder}: {error.strerror}") from error
    left = quota_left(_quota_table(), folder.resolve())
    return min(found if left is None else [*found, (left, "left of the quota")])


def quota_left(table: str, folder: Path) -> int | None:
    """Bytes left in what ``quota`` prints for the file system that holds a folder; None without a limit."""
    limits: dict[Path, int] = {}
    for line in table.splitlines():
        words = line.split()
        numbers = [word.rstrip("*") for word in words[-NUMBERS:]]
        if len(words) > NUMBERS and all(number.isdigit() for number in numbers):
            used, soft, hard = (int(number) * 1024 for number in numbers[:3])
            if limit := hard or soft:
                limits[Path(" ".join(words[:-NUMBERS]))] = max(limit - used, 0)
    mine = [mount for mount in limits if folder.is_relative_to(mount)]
    return limits[max(mine, key=lambda mount: len(mount.parts))] if mine else None


def _quota_table() -> str:
    """By mount point, graces as numbers; empty where there is no such command or no answer."""
    command = ["quota", "--no-wrap", "--raw-grace", "--show-mntpoint", "--hide-device"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
