"""Checkpoints that are complete or absent.

A checkpoint is written into a staging folder, every file flushed to disk; its manifest (sha256 and size
of every file) comes last; then the folder is renamed. A folder without a manifest is not a checkpoint.
Deleting begins with a rename as well, so a killed process never leaves half of one under its name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from kava_core.errors import CheckpointError

MANIFEST = "manifest.json"
STAGING = "staging"
"""Folder beside the checkpoints where one is written."""
NAME = re.compile(r"checkpoint-(\d+)")
READ_BACK = frozenset({".safetensors", ".pt", ".pth", ".bin", ".pkl", ".distcp", ".metadata"})
"""Ends of the names of files that loading a checkpoint reads; pickles among them."""


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
    return (file for file in sorted(folder.rglob("*")) if file.is_file() and file != folder / MANIFEST)


def flush(folder: Path) -> None:
    """Bring every file and folder in ``folder`` to the disk, readable for whom the process's umask allows.

    safetensors writes files that only their owner can read.
    """
    mask = os.umask(0)
    os.umask(mask)
    for path in (*folder.rglob("*"), folder):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
        _sync(path)


def seal(staging: Path, final: Path) -> None:
    """Flush, describe and rename a staged folder. Afterwards ``final`` is complete, whatever happens next."""
    entries = {
        str(file.relative_to(staging)): {"sha256": _digest(file), "size": file.stat().st_size}
        for file in _files(staging)
    }
    (staging / MANIFEST).write_text(json.dumps(entries, indent=1, sort_keys=True), encoding="utf-8")
    flush(staging)
    discard(final)
    staging.rename(final)
    _sync(final.parent)


def discard(folder: Path) -> None:
    """Delete a folder, which loses its name first: nobody meets half of it."""
    doomed = folder.with_name(f"{folder.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    if folder.exists():
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def verify(folder: Path, *, content: bool = True) -> None:
    """CheckpointError naming the first thing wrong with a sealed folder.

    Without ``content`` only names and sizes are looked at, which does not read the files.
    """
    entries = _manifest(folder)
    for name, (digest, size) in entries.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing, though the manifest lists it")
        if file.stat().st_size != size or (content and _digest(file) != digest):
            raise CheckpointError(f"{file}: altered since it was saved: not what the manifest says")
    for file in _files(folder):
        if file.name.endswith(tuple(READ_BACK)) and str(file.relative_to(folder)) not in entries:
            raise CheckpointError(f"{file}: not in the manifest, so not saved by kava; it is never loaded")


def _manifest(folder: Path) -> dict[str, tuple[str, int]]:
    """File name to sha256 and size."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise CheckpointError(f"{folder}: not a complete checkpoint: no {MANIFEST}")
    try:
        listed = json.loads(manifest.read_text(encoding="utf-8"))
        entries = {name: (entry["sha256"], entry["size"]) for name, entry in listed.items()}
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise CheckpointError(f"{manifest}: unreadable: {type(error).__name__}: {error}") from error
    if not entries:
        raise CheckpointError(f"{manifest}: lists no files")
    return entries


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
    """The newest complete and unaltered checkpoint; None where there is none. Changes nothing on disk."""
    return next((path for path in reversed(steps(folder).values()) if fault(path) is None), None)


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None where nothing is."""
    try:
        verify(folder)
    except CheckpointError as error:
        return str(error)
    return None


def recover(folder: Path) -> tuple[Path | None, list[str]]:
    """Prepare a folder of checkpoints for going on: the newest intact one, and what was found wrong.

    What a killed process left is deleted. Checkpoints newer than the intact one are damaged: they are
    renamed, so that they neither count as kept ones nor stand in the way, and never deleted.
    """
    clear(folder)
    found: list[str] = []
    for path in reversed(steps(folder).values()):
        wrong = fault(path)
        if wrong is None:
            return path, found
        found.append(f"{wrong}; set aside as {_set_aside(path).name}")
    return None, found


def _set_aside(path: Path) -> Path:
    names = (path.with_name(f"{path.name}.damaged-{number}") for number in count(1))
    return path.rename(next(name for name in names if not name.exists()))


def clear(folder: Path) -> None:
    """Delete what a killed process was writing or deleting."""
    for leftover in (folder / STAGING, *folder.glob("checkpoint-*.deleted")):
        shutil.rmtree(leftover, ignore_errors=True)


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints."""
    for path in list(steps(folder).values())[:-keep]:
        discard(path)
