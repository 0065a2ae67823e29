"""Write shards so that a killed process loses at most the one it was filling."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from kava_core.data.store.index import (
    INDEX_FILE,
    Ingredients,
    Layout,
    ShardRecord,
    StoreIndex,
    parse_shard_record,
)
from kava_core.errors import KavaError
from kava_core.files import write_json

MIB = 2**20


class StoreWriter:
    """Fills shards in a folder; continues after the complete ones that are there already.

    A shard is complete once its record (``shard-00000.json``) is beside it: the record is written after the
    shard has reached the disk.

    Args:
        folder: where the store is being made.
        layout: what is stored.
        shard_mb: a shard is closed when it holds this many MiB.
    """

    def __init__(self, folder: Path, layout: Layout, *, shard_mb: int) -> None:
        self.folder, self.layout = folder, layout
        self.limit = shard_mb * MIB
        self.shards = _complete_shards(folder)
        self.done = {key for shard in self.shards for key, _ in shard.items}
        self._begin_shard()

    def _begin_shard(self) -> None:
        self._items: list[tuple[str, int]] = []
        self._blocks: dict[str, list[Tensor]] = {}
        self._bytes = 0

    def add(self, key: str, time: int, blocks: Mapping[str, Tensor]) -> None:
        """Add one example.

        Args:
            key: the example's key.
            time: number of its student tokens.
            blocks: its flat tensors by name.

        Raises:
            KavaError: a full shard cannot be written.
        """
        self._items.append((key, time))
        for name, block in blocks.items():
            self._blocks.setdefault(name, []).append(block)
            self._bytes += block.numel() * block.element_size()
        self.done.add(key)
        if self._bytes >= self.limit:
            self.flush()

    def flush(self) -> None:
        """Close the shard that is being filled, if there is anything in it."""
        if not self._items:
            return
        record = ShardRecord(f"shard-{len(self.shards):05d}.safetensors", self._items)
        tensors = {name: torch.cat(blocks) for name, blocks in self._blocks.items()}
        save_durably(tensors, self.folder / record.file)
        write_json((self.folder / record.file).with_suffix(".json"), asdict(record))
        self.shards.append(record)
        self._begin_shard()

    def finish(self, ingredients: Ingredients) -> StoreIndex:
        """Close the last shard and write the index, which contains the shards' records."""
        self.flush()
        index = StoreIndex(ingredients, self.layout, self.shards)
        write_json(self.folder / INDEX_FILE, index.fields())
        return index


def save_durably(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Save a safetensors file so that it is whole or not there.

    Raises:
        KavaError: it cannot be written.
    """
    draft = file.with_suffix(".draft")
    try:
        save_file(dict(tensors), draft)
        with draft.open("rb") as stream:
            os.fsync(stream.fileno())
        draft.replace(file)
    except (OSError, SafetensorError) as error:
        raise KavaError(f"{file}: cannot be written: {error}; is the disk full?") from error


def _complete_shards(folder: Path) -> list[ShardRecord]:
    """Return the complete shards from the first on; whatever comes after a gap is written again."""
    records: list[ShardRecord] = []
    while True:
        file = folder / f"shard-{len(records):05d}.json"
        try:
            record = parse_shard_record(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError):
            return records
        if not (folder / record.file).is_file():
            return records
        records.append(record)


def drop_records(folder: Path) -> None:
    """Delete what only an unfinished store needs: records of shards and drafts."""
    for pattern in ("shard-*.json", "*.draft", "*.tmp"):
        for file in folder.glob(pattern):
            file.unlink()
