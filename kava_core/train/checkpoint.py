"""Checkpoints that are complete or absent.

A checkpoint is written into a staging folder, every file flushed to disk; its manifest (sha256 and size
of every file) comes last; then the folder is renamed. A folder without a manifest is not a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from kava_core.errors import CheckpointError

MANIFEST = "manifest.json"
NAME = re.compile(r"checkpoint-(\d+)")


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> Iterator[Path]:
    return (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != MANIFEST)


def seal(staging: Path, final: Path) -> None:
    """Flush, describe and rename a staged folder. Afterwards ``final`` is complete, whatever happens next."""
    entries = {}
    for file in _files(staging):
        _sync(file)
        entries[str(file.relative_to(staging))] = {"sha256": _digest(file), "size": file.stat().st_size}
    manifest = staging / MANIFEST
    manifest.write_text(json.dumps(entries, indent=1, sort_keys=True), encoding="utf-8")
    _sync(manifest)
    _sync(staging)
    if final.exists():
        shutil.rmtree(final)
    staging.rename(final)
    _sync(final.parent)


def verify(folder: Path) -> None:
    """CheckpointError naming the first thing wrong with a checkpoint folder."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise CheckpointError(f"{folder}: not a complete checkpoint: no {MANIFEST}")
    try:
        entries = json.loads(manifest.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{manifest}: unreadable: {error}") from error
    for name, entry in entries.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing, though the manifest lists it")
        if file.stat().st_size != entry["size"] or _digest(file) != entry["sha256"]:
            raise CheckpointError(f"{file}: altered since it was saved (size or sha256 differs from the manifest)")


def steps(folder: Path) -> dict[int, Path]:
    """Step to checkpoint folder, complete or not, ascending."""
    found = ((NAME.fullmatch(entry.name), entry) for entry in folder.glob("checkpoint-*"))
    return dict(sorted((int(match[1]), entry) for match, entry in found if match))


def step_of(folder: Path) -> int:
    """The step a checkpoint was saved at, from its name."""
    match = NAME.fullmatch(folder.name)
    if match is None:
        raise CheckpointError(f"{folder}: not named checkpoint-STEP")
    return int(match[1])


def newest(folder: Path) -> Path | None:
    """The newest complete and unaltered checkpoint; None where there is none."""
    for path in reversed(steps(folder).values()):
        try:
            verify(path)
        except CheckpointError:
            continue
        return path
    return None


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints."""
    for path in list(steps(folder).values())[:-keep]:
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)
