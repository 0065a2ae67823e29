"""Read ``metrics.jsonl``: one JSON object a line. No torch here."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from kava_core.errors import CheckpointError


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a ``metrics.jsonl``; a last line cut off by a kill is left out.

    Raises:
        CheckpointError: there is no such file, or another line is damaged.
    """
    try:
        *whole_lines, last = path.read_bytes().split(b"\n")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    lines = [_parse_line(line, f"{path}:{number}") for number, line in enumerate(whole_lines, 1)]
    # The last line is empty, or was cut off.
    with suppress(CheckpointError):
        lines.append(_parse_line(last, str(path)))
    return lines


def _parse_line(raw: bytes, where: str) -> dict[str, Any]:
    try:
        line = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: unreadable: {error}; restore or delete the file") from error
    if not isinstance(line, dict) or not isinstance(line.get("step"), int):
        raise CheckpointError(f"{where}: not an object with a 'step'; restore or delete the file")
    return line
