"""Words with SLURM: hand a script in, ask what is queued."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kava_core.errors import KavaError
from kava_core.experiment.slurm.mapping import launches, read_mapping
from kava_core.specfile.sections.pipeline import PipelineSpec

PATIENCE = 60
"""Seconds to wait for an answer."""
AT_WORK = frozenset({"RUNNING", "COMPLETING", "CONFIGURING"})


@dataclass(frozen=True)
class Queued:
    """An element of an array that SLURM knows."""

    job: str
    """``123_4``."""
    state: str
    """SLURM's word, such as ``PENDING``."""

    def __str__(self) -> str:
        return f"{self.state} {self.job}"

    @property
    def at_work(self) -> bool:
        """Whether it has a node."""
        return self.state in AT_WORK


def is_there() -> bool:
    """Whether this machine has SLURM's commands."""
    return shutil.which("squeue") is not None


def queue(spec: PipelineSpec) -> Mapping[str, Queued]:
    """Run directory to element, for every run of a spec that waits or works; KavaError where squeue fails."""
    known = launches(spec)
    if not known:
        return {}
    options = ("--me", "--noheader", "--array", "--format=%j|%K|%T|%i", f"--name={','.join(known)}")
    rows = [line.strip().split("|") for line in ask("squeue", *options).splitlines() if line.strip()]
    folders = {name: [row.folder for row in read_mapping(known[name])] for name in {row[0] for row in rows}}
    return {folders[name][int(index)]: Queued(job, state) for name, index, state, job in rows}


def submit(script: Path) -> str:
    """Hand a script in from its own folder; the job's number. KavaError where sbatch refuses."""
    return ask("sbatch", "--parsable", script.name, folder=script.parent).strip().partition(";")[0]


def ask(*command: str, folder: Path | None = None, text: str | None = None) -> str:
    """What a command prints; KavaError with the first line of its complaint."""
    try:
        done = _run(command, folder, text)
    except FileNotFoundError as error:
        raise KavaError(f"{command[0]}: not found; is SLURM on this machine?") from error
    except subprocess.TimeoutExpired as error:
        raise KavaError(f"{command[0]}: no answer in {PATIENCE} s") from error
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise KavaError(f"{command[0]}: {said[-1]}")
    return done.stdout


def _run(command: Sequence[str], folder: Path | None, text: str | None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=folder,
        input=text,
        stdin=subprocess.DEVNULL if text is None else None,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=PATIENCE,
    )
