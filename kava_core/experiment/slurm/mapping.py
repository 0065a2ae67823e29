"""Record which run each element of an array is: ``<output>/<name>/slurm/<time>/array.jsonl``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kava_core.errors import KavaError
from kava_core.runs.folder import Folder
from kava_core.specfile.sections.pipeline import PipelineSpec

LAUNCHES = "slurm"
"""Beside the run directories of a spec; holds a folder for every launch."""
MAPPING = "array.jsonl"


@dataclass(frozen=True)
class ArrayElement:
    """A run of an array: one line of the mapping."""

    index: int
    variant: str
    seed: int
    folder: str
    """The run directory."""


def launches_folder(spec: PipelineSpec) -> Path:
    """Return the folder of a spec's launches, the same for all its variants."""
    return Path(spec.output) / spec.name / LAUNCHES


def elements_of_runs(runs: Sequence[Folder]) -> list[ArrayElement]:
    """Return an element for every run, in their order."""
    return [ArrayElement(index, run.variant, run.seed, str(run.path)) for index, run in enumerate(runs)]


def job_name(name: str, launch: Path) -> str:
    """Return ``kava-NAME-`` and eight digits that no other launch folder has: how squeue finds the job."""
    digits = hashlib.sha256(bytes(launch.resolve())).hexdigest()[:8]
    return f"kava-{name}-{digits}"


def mapping_text(elements: Iterable[ArrayElement]) -> str:
    """Return elements as JSON in ASCII, with fields in the order that the script's pattern reads."""
    return "".join(json.dumps(asdict(element)) + "\n" for element in elements)


def read_mapping(launch: Path) -> list[ArrayElement]:
    """Return the elements of a launch.

    Raises:
        KavaError: the file is damaged.
    """
    file = launch / MAPPING
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        return [ArrayElement(**json.loads(line)) for line in lines]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise KavaError(f"{file}: unreadable: {error}; delete {launch} if its job has ended") from error


def launch_folders(spec: PipelineSpec) -> Mapping[str, Path]:
    """Return the folder of every launch of a spec by its job's name, oldest first."""
    folders = sorted(file.parent for file in launches_folder(spec).glob(f"*/{MAPPING}"))
    return {job_name(spec.name, folder): folder for folder in folders}


@dataclass(frozen=True)
class LaunchAttempt:
    """A run in its newest launch."""

    launch: Path
    index: int

    @property
    def log(self) -> Path:
        """Return the file of what the element printed."""
        return self.launch / f"{self.index}.log"

    @property
    def exit_code(self) -> int | None:
        """Return the exit code of its last attempt, None while there is none."""
        try:
            return int((self.launch / f"{self.index}.exit").read_text(encoding="ascii"))
        except (OSError, ValueError):
            return None


def newest_attempts(spec: PipelineSpec) -> Mapping[str, LaunchAttempt]:
    """Return the newest launch of every run, by the run's directory.

    Raises:
        KavaError: a mapping is damaged.
    """
    attempts = {}
    for folder in launch_folders(spec).values():
        for element in read_mapping(folder):
            attempts[element.folder] = LaunchAttempt(folder, element.index)
    return attempts
