"""Read examples from JSON-lines files. No torch here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from kava_core.data.examples import Example, example_from_fields
from kava_core.data.gsm8k import example_from_gsm8k
from kava_core.data.pal import example_from_pal
from kava_core.errors import SpecError
from kava_core.specfile.sections.data import JsonlData

RECORD_READERS: dict[str, Callable[..., Example]] = {
    "fields": example_from_fields,
    "gsm8k": example_from_gsm8k,
    "gsm8k_equations": partial(example_from_gsm8k, equations=True),
    "pal": example_from_pal,
}
"""``format`` to the function that makes an example of a record, of its name in errors, and of
``separator``."""


def jsonl_examples(data: JsonlData, root: Path) -> tuple[list[Example], list[Example]]:
    """Return training and validation examples; relative paths are relative to ``root``.

    Raises:
        SpecError: as for ``read_examples``.
    """
    read = partial(read_examples, format=data.format, separator=data.separator)
    train = read(root / data.train, limit=data.train_limit, skip=data.train_skip)
    validation = read(root / data.validation, limit=data.validation_limit)
    return train, validation


def read_examples(
    path: Path,
    format: str = "fields",
    limit: int | None = None,
    *,
    separator: str = "\n",
    skip: int = 0,
) -> list[Example]:
    """Read the examples of a file.

    Args:
        path: the file, one JSON object a line.
        format: a key of ``RECORD_READERS``.
        limit: most examples that are read; default: all.
        separator: text between two steps of the reasoning.
        skip: number of examples left out before the first.

    Raises:
        SpecError: ``file:line: …`` at the first bad line; or there is no example.
    """
    read_record = RECORD_READERS[format]
    stop = None if limit is None else skip + limit
    examples = []
    for record, where in islice(_read_records(path), skip, stop):
        examples.append(read_record(record, where, separator=separator))
    if not examples:
        after = f" after {skip}" if skip else ""
        raise SpecError(f"{path}: no examples: the file is empty{after}")
    return examples


def _read_records(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Iterate over objects and ``file:line``. Only ``\\n`` ends a line: JSON text may hold other
    separators."""
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                where = f"{path}:{number}"
                if line.strip():
                    yield _parse_record(line, where), where
    except OSError as error:
        raise SpecError(f"{path}: cannot read the examples: {error.strerror}") from error
    except ValueError as error:  # a NUL in the name
        raise SpecError(f"{str(path)!r}: cannot read the examples: {error}") from error


class _RepeatedKeyError(Exception):
    """An object has a key twice, of which json would keep the last."""


def _object_of_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of these keys and values."""
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _RepeatedKeyError(next(key for key in keys if keys.count(key) > 1))
    return record


def _parse_record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line.rstrip().decode("utf-8-sig"), object_pairs_hook=_object_of_pairs)
    except UnicodeDecodeError as error:
        raise SpecError(f"{where}: not UTF-8 at byte {error.start + 1}") from error
    except _RepeatedKeyError as error:
        raise SpecError(f"{where}: key {error.args[0]!r} is given twice in one object") from error
    except json.JSONDecodeError as error:
        raise SpecError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{where}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise SpecError(f"{where}: each line must be an object, not {type(record).__name__}")
    return record
