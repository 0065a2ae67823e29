"""Describe a store: its ingredients, its layout, and where every example is in its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kava_core.config import Part
from kava_core.data.store.codec import StoredDtype, bytes_per_vector
from kava_core.errors import CheckpointError

FORMAT = 1
"""Version of the files' layout."""
INDEX_FILE = "index.json"
PROJECTORS_FILE = "projectors.safetensors"
"""Calibrated projectors' state, by teacher."""
MAPS_FOLDER = "maps"
"""Folder of measured layer maps."""

Ingredients = Mapping[str, Any]
"""What the numbers of a store depend on, in words: name to value, for JSON."""


@dataclass(frozen=True)
class Layout:
    """What is stored of each student position."""

    dtype: StoredDtype
    teachers: dict[str, dict[Part, tuple[int, int, int]]]
    """Name of a teacher to part (keys, values) to ``layer head dim`` of its target."""

    def bytes_per_token(self) -> int:
        """Return the bytes of all teachers' targets, scales and validity at one student position."""
        total = 0
        for parts in self.teachers.values():
            for layer, head, dim in parts.values():
                total += layer * head * bytes_per_vector(dim, self.dtype)
            total += 1  # Validity is one byte.
        return total


@dataclass(frozen=True)
class ShardRecord:
    """One file: its examples in order, each with its number of student tokens."""

    file: str
    items: list[tuple[str, int]]


@dataclass(frozen=True)
class StoreIndex:
    """``index.json``."""

    ingredients: Ingredients
    layout: Layout
    shards: list[ShardRecord]

    @property
    def tokens(self) -> int:
        """Return the number of student tokens of all examples."""
        return sum(time for shard in self.shards for _, time in shard.items)

    def fields(self) -> dict[str, Any]:
        """Return what ``index.json`` holds."""
        return {"format": FORMAT, "digest": store_digest(self.ingredients), **asdict(self)}


def store_digest(ingredients: Ingredients) -> str:
    """Return sixteen hex digits of the sha256 of the ingredients: the name of a store's folder."""
    canonical = json.dumps(ingredients, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()[:16]


def read_index(folder: Path) -> StoreIndex:
    """Read the index of a store.

    Raises:
        CheckpointError: it is missing, damaged or of another format.
    """
    file = folder / INDEX_FILE
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        if fields["format"] != FORMAT:
            raise CheckpointError(f"{file}: store format {fields['format']}, this kava reads {FORMAT}")
        layout = Layout(fields["layout"]["dtype"], _parse_extents(fields["layout"]["teachers"]))
        shards = [parse_shard_record(shard) for shard in fields["shards"]]
        return StoreIndex(fields["ingredients"], layout, shards)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: unreadable: {type(error).__name__}: {error}") from error


def parse_shard_record(fields: Any) -> ShardRecord:
    """Return a shard's record from JSON.

    Raises:
        KeyError, TypeError, ValueError: the JSON is no such record.
    """
    items = [(str(key), int(time)) for key, time in fields["items"]]
    return ShardRecord(str(fields["file"]), items)


def _parse_extents(teachers: Any) -> dict[str, dict[Part, tuple[int, int, int]]]:
    extents: dict[str, dict[Part, tuple[int, int, int]]] = {}
    for name, parts in teachers.items():
        extents[name] = {}
        for part, (layer, head, dim) in parts.items():
            extents[name][part] = (int(layer), int(head), int(dim))
    return extents


def ingredient_differences(now: Ingredients, then: Ingredients) -> list[str]:
    """Return which ingredients differ, in words; short values with what they were and are."""
    names = dict.fromkeys([*now, *then])
    return [_describe_change(name, then, now) for name in names if then.get(name) != now.get(name)]


def _describe_change(name: str, then: Ingredients, now: Ingredients) -> str:
    before, after = then.get(name), now.get(name)
    if _is_short(before) and _is_short(after):
        return f"{name} changed ({before} → {after})"
    return f"{name} changed"


def _is_short(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, str) and len(value) <= 48)


def nearest_store(root: Path, now: Ingredients) -> tuple[Path, list[str]] | None:
    """Return the readable store under ``root`` with the fewest differences, and these; None if there is
    none."""
    nearest: tuple[Path, list[str]] | None = None
    for file in sorted(root.glob(f"*/{INDEX_FILE}")):
        try:
            index = read_index(file.parent)
        except CheckpointError:
            continue
        differences = ingredient_differences(now, index.ingredients)
        if nearest is None or len(differences) < len(nearest[1]):
            nearest = file.parent, differences
    return nearest
