"""``kava status``: how far every run of a spec has come, from its folder and from SLURM. No torch here."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kava_core.errors import KavaError
from kava_core.experiment.slurm.mapping import Attempt, attempts
from kava_core.experiment.slurm.scheduler import Queued, is_there, queue
from kava_core.json_files import finite_or_null
from kava_core.runs.folder import Folder
from kava_core.runs.metrics import read_metrics
from kava_core.runs.planned import planned_runs
from kava_core.specfile.load import load_spec
from kava_core.specfile.variants import resolve_variants

RECENT = 20
"""Lines of ``metrics.jsonl`` over which the pace is taken."""
SILENT = ("missing", "interrupted")
"""States of runs that ended, if they began, without a word: the exit code of a job tells more."""
PREFERRED = ("eval_exact_match", "eval_ce", "ce", "loss")
"""The metric shown is the newest of the first of these that there is."""


@dataclass(frozen=True)
class Row:
    """A run. What is not known is None."""

    variant: str
    seed: int
    state: str
    """As ``Folder.state`` has it, or ``damaged``."""
    exit_code: int | None
    reason: str | None
    """Why it failed or cannot be read; where the job's log is, if that is all there is to say."""
    step: int
    """Of the newest line of metrics."""
    steps: int
    metric: str | None
    """Name of the metric shown."""
    value: float | None
    seconds_per_step: float | None
    seconds_left: float | None
    slurm: str | None
    """State and job, where SLURM knows the run."""
    folder: str

    def json(self) -> dict[str, Any]:
        """Field to value; numbers that JSON does not have (NaN, infinity) are null."""
        fields: dict[str, Any] = finite_or_null(asdict(self))
        return fields


def runs_of(file: Path, overrides: Sequence[str]) -> list[Folder]:
    """The runs of a spec; SpecError as for loading it."""
    return planned_runs(resolve_variants(load_spec(file, overrides)))


def table_of(runs: Sequence[Folder]) -> list[Row]:
    """A row for each run. Where squeue does not answer that is said on stderr, and the column stays empty."""
    queued: Mapping[str, Queued] = {}
    launched: Mapping[str, Attempt] = {}
    try:
        launched = attempts(runs[0].spec)
        queued = queue(runs[0].spec) if is_there() else {}
    except KavaError as error:
        print(error, file=sys.stderr)
    return [row_of(run, queued.get(str(run.path)), launched.get(str(run.path))) for run in runs]


def row_of(run: Folder, queued: Queued | None = None, attempt: Attempt | None = None) -> Row:
    """A run as its folder and SLURM tell it."""
    state, code, reason = _state(run, queued)
    if state in SILENT and queued is None and attempt is not None and attempt.code:
        code, reason = attempt.code, f"see {attempt.log}"
    lines = _metrics(run.metrics)
    step, steps = (lines[-1]["step"] if lines else 0), run.spec.train.steps
    name, value = _newest(lines)
    pace = seconds_per_step(lines)
    left = None if pace is None or state == "complete" else pace * (steps - step)
    slurm, folder = None if queued is None else str(queued), str(run.path)
    known = (run.variant, run.seed, state, code, reason, step, steps)
    return Row(*known, name, value, pace, left, slurm, folder)


def _state(run: Folder, queued: Queued | None) -> tuple[str, int | None, str | None]:
    """State, exit code, reason. Locks are not seen from other machines on every file system; SLURM is."""
    try:
        state = run.state()
    except KavaError as error:
        return "damaged", error.exit_code, str(error)
    if queued is not None and queued.at_work and state != "complete":
        return "running", None, None
    failure = run.failure() if state == "failed" else None
    return (state, failure["exit_code"], failure["error"]) if failure else (state, None, None)


def _metrics(file: Path) -> list[dict[str, Any]]:
    """None where there are none, or where they are damaged: the run itself will say so."""
    try:
        return read_metrics(file)
    except KavaError:
        return []


def _newest(lines: Sequence[Mapping[str, Any]]) -> tuple[str | None, float | None]:
    for name in PREFERRED:
        for line in reversed(lines):
            if isinstance(line.get(name), int | float):
                return name.removeprefix("eval_"), line[name]
    return None, None


def seconds_per_step(lines: Sequence[Mapping[str, Any]]) -> float | None:
    """Over the newest lines; what went by between two attempts is not in their seconds."""
    timed = [(line["step"], line["seconds"]) for line in lines[-RECENT:] if "seconds" in line]
    if not timed or timed[-1][0] <= timed[0][0]:
        return None
    (first, begin), (last, end) = timed[0], timed[-1]
    return float((end - begin) / (last - first))
