"""Reading ``metrics.jsonl``: one JSON object a line. No torch here."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from kava_core.errors import CheckpointError


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``; a last line cut off by a kill is left out.

    Raises:
        CheckpointError: there is no such file, or another line is damaged.
    """
    try:
        *whole, cut = path.read_bytes().split(b"\n")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    lines = [_metrics_line(line, f"{path}:{number}") for number, line in enumerate(whole, 1)]
    with suppress(CheckpointError):
        lines.append(_metrics_line(cut, str(path)))
    return lines


def _metrics_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line.decode("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{where}: unreadable: {error}; restore or delete the file") from error
    if not isinstance(found, dict) or not isinstance(found.get("step"), int):
        raise CheckpointError(f"{where}: not an object with a 'step'; restore or delete the file")
    return found
