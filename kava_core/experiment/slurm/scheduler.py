"""Run SLURM's commands: submit a script, list what is queued."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kava_core.errors import KavaError
from kava_core.experiment.slurm.mapping import launch_folders, read_mapping
from kava_core.specfile.sections.pipeline import PipelineSpec

TIMEOUT_SECONDS = 60
"""Seconds to wait for an answer."""
STATES_AT_WORK = frozenset({"RUNNING", "COMPLETING", "CONFIGURING"})


@dataclass(frozen=True)
class QueuedElement:
    """An element of an array that SLURM knows."""

    job: str
    """``123_4``."""
    state: str
    """SLURM's word, such as ``PENDING``."""

    def __str__(self) -> str:
        return f"{self.state} {self.job}"

    @property
    def at_work(self) -> bool:
        """Return whether it has a node."""
        return self.state in STATES_AT_WORK


def has_slurm() -> bool:
    """Return whether this machine has SLURM's commands."""
    return shutil.which("squeue") is not None


def queued_runs(spec: PipelineSpec) -> Mapping[str, QueuedElement]:
    """Return the array element of every run of a spec that waits or works, by its run directory.

    Raises:
        KavaError: squeue fails, or a mapping is damaged.
    """
    folders = launch_folders(spec)
    if not folders:
        return {}
    options = ("--me", "--noheader", "--array", "--format=%j|%K|%T|%i", f"--name={','.join(folders)}")
    lines = run_command("squeue", *options).splitlines()
    rows = [line.strip().split("|") for line in lines if line.strip()]
    mappings = {name: read_mapping(folders[name]) for name in {row[0] for row in rows}}
    queued = {}
    for name, index, state, job in rows:
        element = mappings[name][int(index)]
        queued[element.folder] = QueuedElement(job, state)
    return queued


def submit_script(script: Path) -> str:
    """Submit a script from its own folder and return the job's number.

    Raises:
        KavaError: sbatch refuses it.
    """
    printed = run_command("sbatch", "--parsable", script.name, folder=script.parent)
    number, _, _ = printed.strip().partition(";")
    return number


def run_command(*command: str, folder: Path | None = None, text: str | None = None) -> str:
    """Return what a command prints.

    Args:
        command: its words.
        folder: where it runs.
        text: its standard input.

    Raises:
        KavaError: it is missing, too slow or fails; with the last line of its complaint.
    """
    try:
        done = _run_quietly(command, folder, text)
    except FileNotFoundError as error:
        raise KavaError(f"{command[0]}: not found; is SLURM on this machine?") from error
    except subprocess.TimeoutExpired as error:
        raise KavaError(f"{command[0]}: no answer in {TIMEOUT_SECONDS} s") from error
    if done.returncode:
        complaint = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise KavaError(f"{command[0]}: {complaint[-1]}")
    return done.stdout


def _run_quietly(
    command: Sequence[str], folder: Path | None, text: str | None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=folder,
        input=text,
        stdin=subprocess.DEVNULL if text is None else None,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=TIMEOUT_SECONDS,
    )
