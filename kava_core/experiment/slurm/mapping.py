"""Which run an element of an array is: ``<output>/<name>/slurm/<time>/array.jsonl``, a line an index."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kava_core.errors import KavaError
from kava_core.runs.folder import Folder
from kava_core.specfile.sections.pipeline import PipelineSpec

FOLDER = "slurm"
"""Beside the run directories of a spec; holds a folder for every launch."""
MAPPING = "array.jsonl"


@dataclass(frozen=True)
class Element:
    """One line."""

    index: int
    variant: str
    seed: int
    folder: str
    """The run directory."""


def launches_of(spec: PipelineSpec) -> Path:
    """Where a spec's launches are; the same for all its variants."""
    return Path(spec.output) / spec.name / FOLDER


def elements(runs: Sequence[Folder]) -> list[Element]:
    """An element for every run, in their order."""
    return [Element(index, run.variant, run.seed, str(run.path)) for index, run in enumerate(runs)]


def job_name(name: str, launch: Path) -> str:
    """``kava-NAME-`` and eight digits that no other launch folder has: how squeue finds the job."""
    return f"kava-{name}-{hashlib.sha256(bytes(launch.resolve())).hexdigest()[:8]}"


def mapping_text(rows: Iterable[Element]) -> str:
    """As JSON in ASCII, in the order the script's pattern reads."""
    return "".join(json.dumps(asdict(row)) + "\n" for row in rows)


def read_mapping(launch: Path) -> list[Element]:
    """The elements of a launch; KavaError where the file is damaged."""
    file = launch / MAPPING
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        return [Element(**json.loads(line)) for line in lines]
    except (OSError, ValueError, TypeError) as error:
        raise KavaError(f"{file}: unreadable: {error}; delete {launch} if its job has ended") from error


def launches(spec: PipelineSpec) -> Mapping[str, Path]:
    """Job name to folder of every launch of a spec, oldest first."""
    found = sorted(file.parent for file in launches_of(spec).glob(f"*/{MAPPING}"))
    return {job_name(spec.name, folder): folder for folder in found}


@dataclass(frozen=True)
class Attempt:
    """What the newest launch knows of a run."""

    launch: Path
    index: int

    @property
    def log(self) -> Path:
        """What the element printed."""
        return self.launch / f"{self.index}.log"

    @property
    def code(self) -> int | None:
        """Exit code of its last attempt; None while there is none."""
        try:
            return int((self.launch / f"{self.index}.exit").read_text(encoding="ascii"))
        except (OSError, ValueError):
            return None


def attempts(spec: PipelineSpec) -> Mapping[str, Attempt]:
    """Run directory to its newest launch; KavaError where a mapping is damaged."""
    found = ((folder, row) for folder in launches(spec).values() for row in read_mapping(folder))
    return {row.folder: Attempt(folder, row.index) for folder, row in found}
