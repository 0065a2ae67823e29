"""Find out how far every run of a spec has come, from its folder and from SLURM. No torch here."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kava_core.errors import KavaError
from kava_core.experiment.slurm.mapping import LaunchAttempt, newest_attempts
from kava_core.experiment.slurm.scheduler import QueuedElement, has_slurm, queued_runs
from kava_core.files import finite_or_null
from kava_core.runs.folder import Folder
from kava_core.runs.metrics import read_metrics
from kava_core.runs.planned import planned_runs
from kava_core.specfile.load import load_spec
from kava_core.specfile.variants import resolve_variants

RECENT_LINES = 20
"""Lines of ``metrics.jsonl`` over which the pace is taken."""
STATES_WITHOUT_REASON = ("missing", "interrupted")
"""States of runs that ended, if they began, without a word: the exit code of a job tells more."""
SHOWN_METRICS = ("eval_exact_match", "eval_ce", "ce", "loss")
"""The metric shown is the newest of the first of these that there is."""


@dataclass(frozen=True)
class RunStatus:
    """How far one run has come. What is not known is None."""

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

    def as_json(self) -> dict[str, Any]:
        """Return the fields by name, with None for NaN and infinity, which JSON does not have."""
        fields: dict[str, Any] = finite_or_null(asdict(self))
        return fields


def runs_of_spec(file: Path, overrides: Sequence[str]) -> list[Folder]:
    """Return the runs that a spec plans; errors as for loading it."""
    return planned_runs(resolve_variants(load_spec(file, overrides)))


def run_statuses(runs: Sequence[Folder]) -> list[RunStatus]:
    """Return the status of every run.

    If squeue does not answer, that is printed on stderr, and nothing is known of the queue.
    """
    queued: Mapping[str, QueuedElement] = {}
    attempts: Mapping[str, LaunchAttempt] = {}
    try:
        attempts = newest_attempts(runs[0].spec)
        queued = queued_runs(runs[0].spec) if has_slurm() else {}
    except KavaError as error:
        print(error, file=sys.stderr)
    return [status_of_run(run, queued.get(str(run.path)), attempts.get(str(run.path))) for run in runs]


def status_of_run(
    run: Folder, queued: QueuedElement | None = None, attempt: LaunchAttempt | None = None
) -> RunStatus:
    """Return the status of a run, from its folder and from SLURM.

    Args:
        run: its folder.
        queued: its element in the queue; None if it has none, or SLURM is not there.
        attempt: the run in its newest launch; None if it was not launched.
    """
    state, exit_code, reason = _state_and_reason(run, queued)
    if state in STATES_WITHOUT_REASON and queued is None and attempt is not None and attempt.exit_code:
        exit_code, reason = attempt.exit_code, f"see {attempt.log}"
    lines = _readable_metrics(run.metrics)
    step, steps = (lines[-1]["step"] if lines else 0), run.spec.train.steps
    metric, value = _newest_metric(lines)
    pace = seconds_per_step(lines)
    return RunStatus(
        variant=run.variant,
        seed=run.seed,
        state=state,
        exit_code=exit_code,
        reason=reason,
        step=step,
        steps=steps,
        metric=metric,
        value=value,
        seconds_per_step=pace,
        seconds_left=None if pace is None or state == "complete" else pace * (steps - step),
        slurm=None if queued is None else str(queued),
        folder=str(run.path),
    )


def _state_and_reason(run: Folder, queued: QueuedElement | None) -> tuple[str, int | None, str | None]:
    """Return state, exit code and reason."""
    try:
        state = run.state()
    except KavaError as error:
        return "damaged", error.exit_code, str(error)
    # Locks are not seen from other machines on every file system; SLURM's queue is.
    if queued is not None and queued.at_work and state != "complete":
        return "running", None, None
    failure = run.failure() if state == "failed" else None
    return (state, failure["exit_code"], failure["error"]) if failure else (state, None, None)


def _readable_metrics(file: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics, none if they are missing or damaged: the run itself will report that."""
    try:
        return read_metrics(file)
    except KavaError:
        return []


def _newest_metric(lines: Sequence[Mapping[str, Any]]) -> tuple[str | None, float | None]:
    """Return name and value of the metric that is shown."""
    for name in SHOWN_METRICS:
        for line in reversed(lines):
            if isinstance(line.get(name), int | float):
                return name.removeprefix("eval_"), line[name]
    return None, None


def seconds_per_step(lines: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the seconds of a step, the mean over the newest lines; None if they are too few.

    The time between two attempts is not in the lines' seconds.
    """
    timed = [(line["step"], line["seconds"]) for line in lines[-RECENT_LINES:] if "seconds" in line]
    if not timed:
        return None
    (first_step, first_second), (last_step, last_second) = timed[0], timed[-1]
    if last_step <= first_step:
        return None
    return float((last_second - first_second) / (last_step - first_step))
