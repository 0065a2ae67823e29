"""The runs of an experiment: what is planned, and how far each has come. No torch here."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kava_core.runs.folder import FAILURE, RECORD, RunDir, read_record
from kava_core.specfile.sections.pipeline import PipelineSpec
from kava_core.specfile.variants import chosen_runs

State = Literal["complete", "running", "stopped", "failed", "interrupted", "missing"]
"""``stopped``: by a signal, saved; ``failed``: with an error; ``interrupted``: killed without a word."""


@dataclass(frozen=True)
class Planned:
    """One variant and seed of a spec, and where its run belongs."""

    variant: str
    seed: int
    spec: PipelineSpec
    folder: Path

    @property
    def name(self) -> str:
        """For people: ``kv seed 3``."""
        return f"{self.variant} seed {self.seed}"


def planned(variants: Mapping[str, PipelineSpec]) -> list[Planned]:
    """Every run, all variants of a seed together, so that what is compared is there soonest."""
    runs = [
        Planned(name, seed, spec, RunDir(spec, name, seed).path) for name, seed, spec in chosen_runs(variants)
    ]
    seeds = next(iter(variants.values())).seeds
    return sorted(runs, key=lambda run: seeds.index(run.seed))


def state_of(folder: Path) -> State:
    """How far the run in a folder has come; CheckpointError for a damaged ``run.json``."""
    record = read_record(folder / RECORD) if (folder / RECORD).exists() else {}
    if record.get("status") == "complete":
        return "complete"
    if is_held(folder):
        return "running"
    if (folder / FAILURE).exists():
        return "failed"
    if not record:
        return "missing"
    return "stopped" if record["status"] == "stopped" else "interrupted"


def failure_of(folder: Path) -> dict[str, Any] | None:
    """``exit_code``, ``error`` and ``when`` of a run that failed."""
    try:
        found: dict[str, Any] = json.loads((folder / FAILURE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


def is_held(folder: Path) -> bool:
    """Whether a process on this machine is at work in the folder."""
    try:
        with (folder / "lock").open("r+") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
