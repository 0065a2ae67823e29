"""Save and recover checkpoints, each of which is complete or absent.

A checkpoint is written into a staging folder, every file flushed to disk; its manifest (sha256 and size
of every file) comes last; then the folder is renamed. A folder without a manifest is not a checkpoint.
Deleting begins with a rename as well, so a killed process never leaves half of one under its name.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from kava_core.errors import CheckpointError
from kava_core.files import file_hash

MANIFEST = "manifest.json"
STAGING = "staging"
"""Folder beside the checkpoints where one is written."""
NAME = "checkpoint-{step}"
PATTERN = re.compile(r"checkpoint-(\d+)")
READ_BACK = frozenset({".safetensors", ".pt", ".pth", ".bin", ".pkl", ".distcp", ".metadata"})
"""Ends of the names of files that loading a checkpoint reads; pickles among them."""


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _described_files(folder: Path) -> Iterator[Path]:
    """Yield every file in a folder but its manifest, sorted."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / MANIFEST:
            yield path


def flush(folder: Path) -> None:
    """Bring every file and folder in ``folder`` to the disk, readable for whom the process's umask allows.

    safetensors writes files that only their owner can read.
    """
    mask = os.umask(0)
    os.umask(mask)
    for path in (*folder.rglob("*"), folder):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
        _flush_to_disk(path)


def seal(staging: Path, final: Path) -> None:
    """Write a staged folder's manifest, bring all to disk and rename the folder.

    Afterwards ``final`` is complete, whatever happens next.
    """
    entries = {
        str(file.relative_to(staging)): {"sha256": file_hash(file), "size": file.stat().st_size}
        for file in _described_files(staging)
    }
    (staging / MANIFEST).write_text(json.dumps(entries, indent=1, sort_keys=True), encoding="utf-8")
    flush(staging)
    discard(final)
    staging.rename(final)
    _flush_to_disk(final.parent)


def discard(folder: Path) -> None:
    """Delete a folder. It loses its name first, so that nobody ever reads half of it."""
    doomed = folder.with_name(f"{folder.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    if folder.exists():
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def verify(folder: Path, *, content: bool = True) -> None:
    """Check a sealed folder against its manifest.

    Args:
        folder: what ``seal`` left.
        content: compare hashes too, which reads the files; otherwise only names and sizes.

    Raises:
        CheckpointError: names the first thing that is wrong.
    """
    entries = _read_manifest(folder)
    for name, (digest, size) in entries.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing, though the manifest lists it")
        if file.stat().st_size != size or (content and file_hash(file) != digest):
            raise CheckpointError(f"{file}: altered since it was saved: not what the manifest says")
    for file in _described_files(folder):
        if file.name.endswith(tuple(READ_BACK)) and str(file.relative_to(folder)) not in entries:
            raise CheckpointError(f"{file}: not in the manifest, so not saved by kava; it is never loaded")


def verify_file(folder: Path, name: str) -> None:
    """Check the content of one file of a sealed folder against its manifest.

    Raises:
        CheckpointError: it is missing, altered, or not in the manifest.
    """
    entries = _read_manifest(folder)
    file = folder / name
    if name not in entries:
        raise CheckpointError(f"{file}: not in the manifest, so not saved by kava; it is never loaded")
    if not file.is_file():
        raise CheckpointError(f"{file}: missing, though the manifest lists it")
    if file_hash(file) != entries[name][0]:
        raise CheckpointError(f"{file}: altered since it was saved: not what the manifest says")


def files_of(folder: Path) -> list[str]:
    """Return the names of the files of a sealed folder, as its manifest lists them.

    Raises:
        CheckpointError: the manifest is missing or damaged.
    """
    return list(_read_manifest(folder))


def _read_manifest(folder: Path) -> dict[str, tuple[str, int]]:
    """Return sha256 and size of every file, by its name."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise CheckpointError(f"{folder}: not a complete checkpoint: no {MANIFEST}")
    try:
        listed = json.loads(manifest.read_text(encoding="utf-8"))
        entries = {name: (entry["sha256"], entry["size"]) for name, entry in listed.items()}
    except (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{manifest}: unreadable: {type(error).__name__}: {error}") from error
    if not entries:
        raise CheckpointError(f"{manifest}: lists no files")
    return entries


def path_of_step(folder: Path, step: int) -> Path:
    """Return where the checkpoint after ``step`` steps belongs."""
    return folder / NAME.format(step=step)


def checkpoints_by_step(folder: Path) -> dict[int, Path]:
    """Return the checkpoints in a folder by their step, ascending, whether complete or not."""
    checkpoints = {}
    for path in folder.glob(NAME.format(step="*")):
        match = PATTERN.fullmatch(path.name)
        if match:
            checkpoints[int(match[1])] = path
    return dict(sorted(checkpoints.items()))


def step_of(folder: Path) -> int:
    """Return the step after which a checkpoint was saved, going by its name.

    Raises:
        CheckpointError: it is named otherwise.
    """
    match = PATTERN.fullmatch(folder.name)
    if match is None:
        raise CheckpointError(f"{folder}: not named checkpoint-STEP")
    return int(match[1])


def newest_intact(folder: Path) -> Path | None:
    """Return the newest complete and unaltered checkpoint, None if there is none. Changes nothing on disk."""
    for path in reversed(checkpoints_by_step(folder).values()):
        if find_fault(path) is None:
            return path
    return None


def find_fault(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, None if nothing is."""
    try:
        verify(folder)
    except CheckpointError as error:
        return str(error)
    return None


def recover_newest(folder: Path) -> tuple[Path | None, list[str]]:
    """Prepare a folder of checkpoints for a run that goes on.

    What a killed process left is deleted. Checkpoints newer than the intact one are damaged: they are
    renamed, so that they neither count as kept ones nor are in the way, and never deleted.

    Returns:
        The newest intact checkpoint, None if there is none, and a line for every damaged one.
    """
    clear_leftovers(folder)
    damaged: list[str] = []
    for path in reversed(checkpoints_by_step(folder).values()):
        wrong = find_fault(path)
        if wrong is None:
            return path, damaged
        damaged.append(f"{wrong}; set aside as {_set_aside(path).name}")
    return None, damaged


def _set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint to the first free name, and return that."""
    names = (path.with_name(f"{path.name}.damaged-{number}") for number in count(1))
    free_name = next(name for name in names if not name.exists())
    return path.rename(free_name)


def clear_leftovers(folder: Path) -> None:
    """Delete what a killed process was writing or deleting."""
    for leftover in (folder / STAGING, *folder.glob(NAME.format(step="*.deleted"))):
        shutil.rmtree(leftover, ignore_errors=True)


def keep_newest(folder: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints."""
    for path in list(checkpoints_by_step(folder).values())[:-keep]:
        discard(path)
