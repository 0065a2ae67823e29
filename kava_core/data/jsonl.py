"""Examples from JSON-lines files. No torch here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from kava_core.data.examples import Example, from_fields
from kava_core.data.gsm8k import from_gsm8k
from kava_core.errors import SpecError
from kava_core.spec.model import JsonlData

READERS: dict[str, Callable[[dict[str, Any], str], Example]] = {"fields": from_fields, "gsm8k": from_gsm8k}
"""``format`` to the function that makes an example of a record and the words for where it stands."""


def jsonl_examples(data: JsonlData, root: Path) -> tuple[list[Example], list[Example]]:
    """Training and validation examples; relative paths are relative to ``root``."""
    train = read_examples(root / data.train, data.format, data.train_limit)
    return train, read_examples(root / data.validation, data.format, data.validation_limit)


def read_examples(path: Path, format: str = "fields", limit: int | None = None) -> list[Example]:
    """The first ``limit`` examples of a file, or all. SpecError ``file:line: …`` at the first bad line."""
    reader = READERS[format]
    examples = [reader(record, where) for record, where in islice(_records(path), limit)]
    if not examples:
        raise SpecError(f"{path}: no examples: the file is empty")
    return examples


def _records(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Every object and ``file:line``. Only ``\\n`` ends a line: JSON text may hold other separators."""
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _parse(line, f"{path}:{number}"), f"{path}:{number}"
    except OSError as error:
        raise SpecError(f"{path}: cannot read the examples: {error.strerror}") from error


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line.rstrip().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise SpecError(f"{where}: not UTF-8 at byte {error.start + 1}") from error
    except json.JSONDecodeError as error:
        raise SpecError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{where}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise SpecError(f"{where}: each line must be an object, not {type(record).__name__}")
    return record
