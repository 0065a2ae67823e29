"""Measure the space for checkpoints: what is free, and the user's quota if quota-tools know of one."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from kava_core.errors import KavaError
from kava_core.files import make_folder

QUOTA_COLUMNS = 8
"""Columns of ``quota`` after the file system: blocks, quota, limit, grace; the same of files."""


def check_writable(folder: Path) -> None:
    """Write, flush and delete a small file.

    Raises:
        KavaError: that fails.
    """
    make_folder(folder)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".kava-write-test-") as file:
            file.write(b"kava")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise KavaError(f"{folder}: cannot be written: {error.strerror}") from error


def free_space(folder: Path) -> tuple[int, str]:
    """Return the bytes that the user may still write in a folder, and what sets the limit.

    Raises:
        KavaError: there is no such folder.
    """
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise KavaError(f"{folder}: {error.strerror}") from error
    left = quota_left(_quota_table(), folder.resolve())
    if left is not None and left < free:
        return left, "left of the quota"
    return free, "free"


def quota_left(table: str, folder: Path) -> int | None:
    """Return the bytes that a quota leaves on the file system that holds a folder, None without a limit.

    Args:
        table: what ``quota`` prints.
        folder: absolute.
    """
    left_on_mounts: dict[Path, int] = {}
    for line in table.splitlines():
        words = line.split()
        numbers = [word.rstrip("*") for word in words[-QUOTA_COLUMNS:]]
        if len(words) > QUOTA_COLUMNS and all(number.isdigit() for number in numbers):
            used, soft, hard = (int(number) * 1024 for number in numbers[:3])
            limit = hard or soft
            if limit:
                mount = Path(" ".join(words[:-QUOTA_COLUMNS]))
                left_on_mounts[mount] = max(limit - used, 0)
    holding = [mount for mount in left_on_mounts if folder.is_relative_to(mount)]
    if not holding:
        return None
    innermost = max(holding, key=lambda mount: len(mount.parts))
    return left_on_mounts[innermost]


def _quota_table() -> str:
    """Return quotas by mount point, graces as numbers; nothing without such a command or an answer."""
    command = ["quota", "--no-wrap", "--raw-grace", "--show-mntpoint", "--hide-device"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
