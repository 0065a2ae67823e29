"""Read examples from the ``datasets`` hub or a local dataset folder (extra ``hub``). No torch here."""

from __future__ import annotations

from functools import partial
from typing import Any

from kava_core.data.examples import Example
from kava_core.data.jsonl import RECORD_READERS
from kava_core.errors import SpecError
from kava_core.specfile.sections.data import HubData


def hub_examples(data: HubData) -> tuple[list[Example], list[Example]]:
    """Return training and validation examples.

    Raises:
        SpecError: ``datasets`` is not installed, or cannot load the name, the configuration or a split (or
            finds it empty), or a column is missing or contains no text.
    """
    return _read_split(data, data.train), _read_split(data, data.validation)


def _read_split(data: HubData, split: str) -> list[Example]:
    read_record = partial(RECORD_READERS[data.format], separator=data.separator)
    if data.format == "fields":
        read_record = partial(read_record, columns=data.columns)
    examples = []
    for index, row in enumerate(_load_split(data, split)):
        examples.append(read_record(row, f"{data.path}:{split}[{index}]"))
    return examples


def _load_split(data: HubData, split: str) -> Any:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise SpecError("data: 'hub' needs the package datasets: pip install 'kava[hub]'") from error
    try:
        return load_dataset(data.path, data.config, split=split, revision=data.revision)
    except Exception as error:  # datasets raises its own, pyarrow's, fsspec's and the network's errors
        raise SpecError(f"{data.path}:{split}: cannot load the data: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    """Return the first line of an error, and of the first cause in its chain, which says more."""
    first = next(iter(str(error).splitlines()), type(error).__name__)
    cause: BaseException = error
    while (earlier := cause.__cause__) is not None:
        cause = earlier
    if cause is error:
        return first
    reason = next(iter(str(cause).splitlines()), "no message")
    return f"{first}; the cause: {type(cause).__name__}: {reason}"
