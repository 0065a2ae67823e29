"""A run directory: what was asked for, what happened, and whether it is finished.

``<output>/<name>/<variant>-<spec_digest>-s<seed>/``: never overwritten; a complete one is skipped, an
incomplete one resumed.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from kava_core.errors import CheckpointError, KavaError, SpecError
from kava_core.processes import world_size
from kava_core.specfile.digest import spec_digest
from kava_core.specfile.sections.pipeline import PipelineSpec
from kava_core.versions import versions

RECORD = "run.json"
STORE = "store"
"""In the record's ``flops_of``: what making the store took, spent before the first step."""
MAPS, TOKENS = "attention.safetensors", "attention.json"
"""What models attend to: head means ``layer time time`` by model, and what stands at the positions."""

FAILURE = "failure.json"
LOOKS = 4
"""Attempts to lock a directory."""
ALWAYS = ("name", "variant", "seed", "spec_digest", "status", "data", "versions", "world_size")
"""What every ``run.json`` holds."""


class RunDir:
    """One variant and seed of a spec on disk."""

    def __init__(self, spec: PipelineSpec, variant: str, seed: int) -> None:
        self.spec, self.variant, self.seed = spec, variant, seed
        self.digest = spec_digest(spec)
        self.path = Path(spec.output) / spec.name / f"{variant}-{self.digest}-s{seed}"
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples.jsonl"
        self.student = self.path / "student"

    @contextmanager
    def lock(self, *, wait: bool = False) -> Iterator[None]:
        """Hold the directory; where another process does, wait for it or raise KavaError."""
        with self._lock_file() as stream:
            if wait:
                fcntl.flock(stream, fcntl.LOCK_EX)
            else:
                self._take_at_once(stream)
            yield

    def _take_at_once(self, stream: TextIO) -> None:
        """KavaError where another process trains; one that only looks holds the lock for a moment."""
        for _ in range(LOOKS):
            try:
                return fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.05)
        raise KavaError(f"{self.path}: another process is training here")

    def _lock_file(self) -> TextIO:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            return (self.path / "lock").open("w")
        except OSError as error:
            raise KavaError(f"{self.path}: cannot be written: {error.strerror}") from error

    def record(self) -> dict[str, Any]:
        """What ``run.json`` says; empty where there is none yet."""
        file = self.path / RECORD
        return read_record(file) if file.exists() else {}

    def fail(self, error: Exception) -> None:
        """Note what ended a run that did not reach its end; a new attempt takes the note away."""
        if isinstance(error, KavaError):
            note_failure(self.path, error.exit_code, str(error))
        else:
            note_failure(self.path, 1, f"{type(error).__name__}: {error}")

    @property
    def complete(self) -> bool:
        """Whether the run reached its end."""
        return self.record().get("status") == "complete"

    def begin(self, facts: dict[str, Any]) -> None:
        """Write the resolved spec and ``run.json``; SpecError where the directory holds another run."""
        before = self.record()
        facts = facts | environment()
        self._same(before, facts)
        write_json(self.path / "spec.json", self.spec.model_dump(mode="json"))
        started = before.get("started") or _now()
        self.write({**facts, "started": started, "status": "running"})

    def _same(self, before: dict[str, Any], facts: dict[str, Any]) -> None:
        """SpecError where going on would silently be another experiment."""
        if not before:
            return
        if before["spec_digest"] != self.digest:
            raise SpecError(f"{self.path}: holds a run of spec {before['spec_digest']}, not {self.digest}")
        self.check_data(facts["data"])
        if before.get("layer_maps", {}) != facts.get("layer_maps", {}):
            raise SpecError(
                f"{self.path}: a layer map changed since this run began; give the run another name, or bring "
                "the old map back"
            )
        begun, now = before["world_size"], facts["world_size"]
        if begun != now:
            raise SpecError(
                f"{self.path}: begun by {begun} processes, now {now}: the batches would differ; "
                f"start it with {begun}, or give the run another name"
            )

    def check_data(self, data: dict[str, Any]) -> None:
        """SpecError where the directory holds a run on other data."""
        before = self.record()
        if before and before["data"] != data:
            raise SpecError(f"{self.path}: the data changed since this run began; give the run another name")

    def stop(self) -> None:
        """Note that the run was asked to stop, and can go on."""
        self.write({**self.record(), "status": "stopped"})

    def finish(self, results: dict[str, Any], facts: dict[str, Any]) -> None:
        """Mark the run complete, with its last metrics and what else is known of it now."""
        ended = {"finished": _now(), "results": results, "status": "complete"}
        self.write({**self.record(), **facts, **ended})

    def write(self, record: dict[str, Any]) -> None:
        """Replace ``run.json`` at once."""
        head = {
            "name": self.spec.name,
            "variant": self.variant,
            "seed": self.seed,
            "spec_digest": self.digest,
        }
        write_json(self.path / RECORD, head | record)


def note_failure(run: Path, code: int, said: str) -> None:
    """Write ``failure.json``: the exit code and the first line of what was said."""
    first = (said.strip().splitlines() or ["no message"])[0]
    write_json(run / FAILURE, {"exit_code": code, "error": first, "when": _now()})


def read_record(file: Path) -> dict[str, Any]:
    """A ``run.json`` with everything that a run writes into it; CheckpointError where it is damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(file, f"unreadable: {error}") from error
    if not isinstance(found, dict):
        raise _damaged(file, f"holds a {type(found).__name__}, not an object")
    if missing := [name for name in ALWAYS if name not in found]:
        raise _damaged(file, f"says nothing of {', '.join(missing)}")
    if found["status"] == "complete" and not _are_results(found.get("results")):
        raise _damaged(file, "the run is complete, but its results are missing or no numbers")
    return found


def _damaged(file: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{file}: {what}; restore it, or delete {file.parent} to train anew")


def _are_results(results: Any) -> bool:
    """Whether these are numbers by name, the step among them."""
    return (
        isinstance(results, dict)
        and "steps" in results
        and all(isinstance(value, int | float) for value in results.values())
    )


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step."""
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            json.dump(value, stream, indent=1, ensure_ascii=False)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        raise KavaError(f"{path}: cannot be written: {error.strerror}") from error


def environment() -> dict[str, Any]:
    """Versions, machine and command of this process."""
    import torch

    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: found for name, found in versions().items() if found},
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "world_size": world_size(),
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
