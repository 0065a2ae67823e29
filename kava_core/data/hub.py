"""Examples from a ``datasets`` hub name or a local dataset folder (extra ``hub``). No torch here."""

from __future__ import annotations

from typing import Any

from kava_core.data.examples import Example, from_fields
from kava_core.data.gsm8k import from_gsm8k
from kava_core.errors import SpecError
from kava_core.spec.model import HubData


def hub_examples(data: HubData) -> tuple[list[Example], list[Example]]:
    """Training and validation examples.

    SpecError where ``datasets`` is not installed, cannot load the name, the configuration or a split (or
    finds it empty), or where a column is missing or holds no text.
    """
    return _read(data, data.train), _read(data, data.validation)


def _read(data: HubData, split: str) -> list[Example]:
    rows = _load(data, split)
    return [_example(data, row, f"{data.path}:{split}[{index}]") for index, row in enumerate(rows)]


def _example(data: HubData, row: dict[str, Any], where: str) -> Example:
    return from_gsm8k(row, where) if data.format == "gsm8k" else from_fields(row, where, data.columns)


def _load(data: HubData, split: str) -> Any:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise SpecError("data: 'hub' needs the package datasets: pip install 'kava[hub]'") from error
    try:
        return load_dataset(data.path, data.config, split=split, revision=data.revision)
    except Exception as error:  # datasets raises its own, pyarrow's, fsspec's and the network's errors
        raise SpecError(f"{data.path}:{split}: cannot load the data: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
