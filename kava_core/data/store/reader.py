"""Targets of any examples of a store, read through the page cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kava_core.config import Part
from kava_core.data.store.codec import decode_vectors
from kava_core.data.store.index import read_index
from kava_core.errors import CheckpointError
from kava_core.protocols.axes import Cache

VALID = "valid"
SCALE = ".scale"
"""Suffix of the tensor with a part's scales."""


class ExampleBlock(NamedTuple):
    """Where an example lies: its shard, the tokens before it in that shard, its own tokens."""

    shard: str
    start: int
    time: int


def tensor_name(teacher: str, what: str) -> str:
    """Name of a flat tensor in a shard."""
    return f"{teacher}/{what}"


class Store:
    """A complete store, opened for reading.

    A shard holds one flat tensor for every teacher and part (and its scales, and its validity), in which an
    example's ``layer head time dim`` is one block. Shards are mapped into memory when they are first
    needed, in every process by itself, and only what is asked for is read.
    """

    def __init__(self, folder: Path) -> None:
        """Open a store.

        Raises:
            CheckpointError: its index is missing or damaged.
        """
        index = read_index(folder)
        self.folder, self.layout = folder, index.layout
        self.places: dict[str, ExampleBlock] = {}
        for shard in index.shards:
            start = 0
            for key, time in shard.items:
                self.places[key] = ExampleBlock(shard.file, start, time)
                start += time
        self._shards: dict[str, dict[str, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": {}}

    @property
    def digest(self) -> str:
        """The store's name."""
        return self.folder.name

    def batch(self, keys: Sequence[str], time: int) -> dict[str, dict[str, Any]]:
        """The stored targets of some examples, padded right to ``time`` student positions.

        Returns:
            For every teacher, as they are stored: ``target`` (part to ``batch layer head time dim``), with
            int8 ``scale`` (part to ``batch layer head time``), and ``valid`` (Bool ``batch time``).

        Raises:
            CheckpointError: an example is not in the store, or a shard cannot be read.
        """
        places = [self._place(key) for key in keys]
        return {name: self._side(name, parts, places, time) for name, parts in self.layout.teachers.items()}

    def _place(self, key: str) -> ExampleBlock:
        if key not in self.places:
            raise CheckpointError(f"{self.folder}: example {key} is not in this store")
        return self.places[key]

    def _side(
        self, teacher: str, parts: Mapping[Part, tuple[int, int, int]], places: list[ExampleBlock], time: int
    ) -> dict[str, Any]:
        target = {part: self._padded(teacher, part, places, time, extent) for part, extent in parts.items()}
        valid = self._padded(teacher, VALID, places, time, (1, 1, 1)).flatten(1)
        side: dict[str, Any] = {"target": target, "valid": valid}
        if self.layout.dtype == "int8":
            side["scale"] = {
                part: self._padded(teacher, part + SCALE, places, time, (layer, head, 1))[..., 0]
                for part, (layer, head, _) in parts.items()
            }
        return side

    def _padded(
        self, teacher: str, what: str, places: list[ExampleBlock], time: int, extent: tuple[int, int, int]
    ) -> Tensor:
        """``batch layer head time dim``, zero where an example is shorter."""
        blocks = [self._block(tensor_name(teacher, what), place, extent) for place in places]
        layer, head, dim = extent
        padded = blocks[0].new_empty(len(blocks), layer, head, time, dim)
        for row, block in zip(padded, blocks, strict=True):
            row[:, :, : block.shape[2]] = block
            row[:, :, block.shape[2] :] = 0
        return padded

    def _block(self, name: str, place: ExampleBlock, extent: tuple[int, int, int]) -> Tensor:
        """One example's ``layer head time dim``, in mapped memory."""
        layer, head, dim = extent
        width = layer * head * dim
        flat = self._shard(place.shard)[name]
        block = flat[place.start * width : (place.start + place.time) * width]
        return block.view(layer, head, place.time, dim)

    def _shard(self, file: str) -> dict[str, Tensor]:
        """A shard's flat tensors, which lie in mapped memory."""
        if file not in self._shards:
            self._shards[file] = _map_shard(self.folder / file)
        return self._shards[file]


def _map_shard(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as shard:
            return {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error


def decode_target(side: Mapping[str, Any]) -> tuple[Cache, Bool[Tensor, "batch time"]]:
    """A teacher's target in float32 and its validity, from its side of a batch; on the batch's device."""
    scale = side.get("scale", {})
    target = Cache(**{part: decode_vectors(x, scale.get(part)) for part, x in side["target"].items()})
    valid: Tensor = side["valid"]
    return target, valid


def flatten_example(target: Tensor, row: int, time: int) -> Tensor:
    """One example's block: ``batch layer head time dim`` to flat, without padding."""
    return torch.narrow(target[row], 2, 0, time).reshape(-1)
