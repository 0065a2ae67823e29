"""What a store says about itself: its ingredients, its layout, and where every example lies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
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
"""What the numbers depend on, in words: name to value. JSON."""


@dataclass(frozen=True)
class Layout:
    """What is stored of a student position."""

    dtype: StoredDtype
    teachers: dict[str, dict[Part, tuple[int, int, int]]]
    """Teacher to part to ``layer head dim`` of its target."""

    def bytes_per_token(self) -> int:
        """Of all teachers' targets, scales and validity at one student position."""
        extents = [extent for parts in self.teachers.values() for extent in parts.values()]
        vectors = sum(layer * head * bytes_per_vector(dim, self.dtype) for layer, head, dim in extents)
        return vectors + len(self.teachers)


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
        """Student tokens of all examples."""
        return sum(time for shard in self.shards for _, time in shard.items)

    def fields(self) -> dict[str, Any]:
        """For JSON."""
        return {"format": FORMAT, "digest": store_digest(self.ingredients), **asdict(self)}


def store_digest(ingredients: Ingredients) -> str:
    """Sixteen hex digits of the sha256 of the ingredients; the name of a store's folder."""
    canonical = json.dumps(ingredients, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()[:16]


def read_index(folder: Path) -> StoreIndex:
    """The index of a store; CheckpointError where it is missing, damaged or of another format."""
    file = folder / INDEX_FILE
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise CheckpointError(f"{file}: store format {found['format']}, this kava reads {FORMAT}")
        layout = Layout(found["layout"]["dtype"], _parse_extents(found["layout"]["teachers"]))
        shards = [parse_shard_record(shard) for shard in found["shards"]]
        return StoreIndex(found["ingredients"], layout, shards)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: unreadable: {type(error).__name__}: {error}") from error


def parse_shard_record(found: Any) -> ShardRecord:
    """From JSON; KeyError, TypeError or ValueError where it is none."""
    return ShardRecord(str(found["file"]), [(str(key), int(time)) for key, time in found["items"]])


def _parse_extents(teachers: Any) -> dict[str, dict[Part, tuple[int, int, int]]]:
    return {
        name: {part: (int(layer), int(head), int(dim)) for part, (layer, head, dim) in parts.items()}
        for name, parts in teachers.items()
    }


def ingredient_differences(now: Ingredients, then: Ingredients) -> list[str]:
    """Which ingredients are not the same, in words; short values with what they were and are."""
    names = [*now, *(name for name in then if name not in now)]
    return [_describe_change(name, then, now) for name in names if then.get(name) != now.get(name)]


def _describe_change(name: str, then: Ingredients, now: Ingredients) -> str:
    before, after = then.get(name), now.get(name)
    short = all(isinstance(value, int | float) or _is_word(value) for value in (before, after))
    return f"{name} changed ({before} → {after})" if short else f"{name} changed"


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 48


def nearest_store(root: Path, now: Ingredients) -> tuple[Path, list[str]] | None:
    """The readable store under ``root`` with the fewest differences, and these; None where there is none."""
    found: list[tuple[Path, Sequence[str]]] = []
    for file in sorted(root.glob(f"*/{INDEX_FILE}")):
        try:
            found.append((file.parent, ingredient_differences(now, read_index(file.parent).ingredients)))
        except CheckpointError:
            continue
    if not found:
        return None
    folder, differing = min(found, key=lambda one: len(one[1]))
    return folder, list(differing)
