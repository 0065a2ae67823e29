"""Read the targets of any examples of a store, through the page cache."""

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
from kava_core.runs import checkpoint

VALID = "valid"
SCALE = ".scale"
"""Suffix of the tensor with a part's scales."""


class ExampleBlock(NamedTuple):
    """Where an example is in a store, counted in student tokens."""

    shard: str
    """File name of its shard."""
    start: int
    """Number of tokens before it in that shard."""
    time: int
    """Number of its own tokens."""


def tensor_name(teacher: str, what: str) -> str:
    """Name a flat tensor in a shard: ``teacher/what``."""
    return f"{teacher}/{what}"


class Store:
    """A complete store, opened for reading.

    A shard holds one flat tensor for every teacher and part (and its scales, and its validity), in which an
    example's ``layer head time dim`` is one block. Shards are mapped into memory when they are first
    needed, in every process separately, and only what is asked for is read. Before that a shard's content is
    compared with its hash, once in a process.
    """

    def __init__(self, folder: Path) -> None:
        """Open a store.

        Raises:
            CheckpointError: its manifest, its index or another small file is missing or damaged.
        """
        index = read_index(folder)
        shards = {shard.file for shard in index.shards}
        for name in checkpoint.files_of(folder):
            if name not in shards:
                _verify_once(folder, name)
        self.folder, self.layout = folder, index.layout
        self.blocks: dict[str, ExampleBlock] = {}
        for shard in index.shards:
            start = 0
            for key, time in shard.items:
                self.blocks[key] = ExampleBlock(shard.file, start, time)
                start += time
        self._shards: dict[str, dict[str, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": {}}

    @property
    def digest(self) -> str:
        """Return the store's name."""
        return self.folder.name

    def batch(self, keys: Sequence[str], time: int) -> dict[str, dict[str, Any]]:
        """Read the stored targets of some examples, padded right to ``time`` student positions.

        Returns:
            For every teacher, as they are stored: ``target`` (part to ``batch layer head time dim``), with
            int8 ``scale`` (part to ``batch layer head time``), and ``valid`` (Bool ``batch time``).

        Raises:
            CheckpointError: an example is not in the store, or a shard cannot be read.
        """
        blocks = [self._find_block(key) for key in keys]
        batch = {}
        for teacher, parts in self.layout.teachers.items():
            batch[teacher] = self._read_teacher(teacher, parts, blocks, time)
        return batch

    def _find_block(self, key: str) -> ExampleBlock:
        if key not in self.blocks:
            raise CheckpointError(f"{self.folder}: example {key} is not in this store")
        return self.blocks[key]

    def _read_teacher(
        self, teacher: str, parts: Mapping[Part, tuple[int, int, int]], blocks: list[ExampleBlock], time: int
    ) -> dict[str, Any]:
        target, scale = {}, {}
        for part, (layer, head, dim) in parts.items():
            target[part] = self._read_padded(teacher, part, blocks, time, (layer, head, dim))
            if self.layout.dtype == "int8":
                scales = self._read_padded(teacher, part + SCALE, blocks, time, (layer, head, 1))
                scale[part] = scales[..., 0]
        valid = self._read_padded(teacher, VALID, blocks, time, (1, 1, 1)).flatten(1)
        side = {"target": target, "valid": valid}
        return side | {"scale": scale} if scale else side

    def _read_padded(
        self, teacher: str, what: str, blocks: list[ExampleBlock], time: int, extent: tuple[int, int, int]
    ) -> Tensor:
        """Read ``batch layer head time dim``, zero at the end of shorter examples."""
        tensors = [self._map_block(tensor_name(teacher, what), block, extent) for block in blocks]
        layer, head, dim = extent
        padded = tensors[0].new_empty(len(tensors), layer, head, time, dim)
        for row, tensor in zip(padded, tensors, strict=True):
            row[:, :, : tensor.shape[2]] = tensor
            row[:, :, tensor.shape[2] :] = 0
        return padded

    def _map_block(self, name: str, block: ExampleBlock, extent: tuple[int, int, int]) -> Tensor:
        """Return one example's ``layer head time dim``, in mapped memory."""
        layer, head, dim = extent
        width = layer * head * dim
        flat = self._open_shard(block.shard)[name]
        numbers = flat[block.start * width : (block.start + block.time) * width]
        return numbers.view(layer, head, block.time, dim)

    def _open_shard(self, file: str) -> dict[str, Tensor]:
        """Return a shard's flat tensors, in mapped memory."""
        if file not in self._shards:
            _verify_once(self.folder, file)
            self._shards[file] = _map_shard(self.folder / file)
        return self._shards[file]


_verified: set[tuple[str, int, int]] = set()
"""Path, time of change and size of every file that this process has compared with its hash."""


def _verify_once(folder: Path, name: str) -> None:
    """Compare a store's file with its hash, unless this process has done so since it was changed.

    Raises:
        CheckpointError: it is missing or altered.
    """
    try:
        status = (folder / name).stat()
    except OSError as error:
        raise CheckpointError(f"{folder / name}: cannot be read: {error.strerror}") from error
    seen = (str((folder / name).absolute()), status.st_mtime_ns, status.st_size)
    if seen not in _verified:
        checkpoint.verify_file(folder, name)
        _verified.add(seen)


def _map_shard(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as shard:
            return {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error


def decode_target(side: Mapping[str, Any]) -> tuple[Cache, Bool[Tensor, "batch time"]]:
    """Return a teacher's target in float32 and its validity, from its side of a batch; on the batch's
    device."""
    scale = side.get("scale", {})
    parts = {part: decode_vectors(stored, scale.get(part)) for part, stored in side["target"].items()}
    valid: Tensor = side["valid"]
    return Cache(**parts), valid


def flatten_example(target: Tensor, row: int, time: int) -> Tensor:
    """Return one example of ``batch layer head time dim`` as a flat block, without padding."""
    return torch.narrow(target[row], 2, 0, time).reshape(-1)
