"""``kava launch``: what is not complete goes into one array of jobs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

from kava_core.errors import KavaError, SpecError
from kava_core.experiment.slurm.mapping import MAPPING, elements, job_name, launches_of, mapping_text
from kava_core.experiment.slurm.preflight import Preflight
from kava_core.experiment.slurm.resources import Resources
from kava_core.experiment.slurm.sbatch import SCRIPT, SPEC, Job, script
from kava_core.experiment.slurm.scheduler import queue, submit
from kava_core.paths import make_folder
from kava_core.runs.folder import Folder
from kava_core.runs.planned import planned_runs
from kava_core.specfile.load import load_spec
from kava_core.specfile.variants import resolve_variants

Tell = Callable[[str], object]


def launch(
    file: Path,
    overrides: Sequence[str],
    resources: Resources,
    tell: Tell,
    *,
    gpu_memory: float | None = None,
    dry_run: bool = False,
) -> None:
    """Check and submit an array of all runs of a spec that are not complete.

    Args:
        file: spec.
        overrides: changes of it.
        resources: of each run.
        tell: takes every line that is to be printed.
        gpu_memory: GiB of a device, to be compared with the plan; None: not known.
        dry_run: tell the script and touch nothing.

    Raises:
        SpecError: a check failed, or a run is queued or at work already; nothing is submitted.
        KavaError: SLURM does not answer, or files cannot be written.
    """
    loaded = load_spec(file, overrides)
    every = planned_runs(resolve_variants(loaded))
    runs = [run for run in every if run.state() != "complete"]
    if not runs:
        tell(f"nothing to submit: {len(every)} of {len(every)} runs are complete")
        return
    folder = _new_folder(launches_of(loaded.spec))
    text = script(_job(folder, loaded.spec.name, overrides, len(runs), resources))
    if dry_run:
        tell(text.removesuffix("\n"))
        return
    _refuse_busy(runs)
    _check(Preflight(runs, resources, text, gpu_memory), tell)
    _write(folder, {SPEC: loaded.source, MAPPING: mapping_text(elements(runs)), SCRIPT: text})
    number = submit(folder / SCRIPT)
    tell(f"job {number}: {len(runs)} of {len(every)} runs; script, mapping and logs in {folder}")


def _job(folder: Path, name: str, overrides: Sequence[str], count: int, resources: Resources) -> Job:
    folder = folder.absolute()
    return Job(job_name(name, folder), folder, Path.cwd(), sys.executable, overrides, count, resources)


def _new_folder(base: Path) -> Path:
    """By the second; with a number where that one is taken."""
    now = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    names = (base / (now if number == 1 else f"{now}-{number}") for number in count(1))
    return next(name for name in names if not name.exists())


def _refuse_busy(runs: Sequence[Folder]) -> None:
    """SpecError where a run would be trained twice."""
    queued = queue(runs[0].spec)
    busy = [f"{run.label} ({queued[str(run.path)]})" for run in runs if str(run.path) in queued]
    busy += [f"{run.label} (at work)" for run in runs if run.state() == "running"]
    if busy:
        raise SpecError(f"queued or at work already: {', '.join(busy)}; wait for them, or scancel the job")


def _check(checks: Preflight, tell: Tell) -> None:
    failed = 0
    for check in checks:
        tell(str(check))
        failed += bool(check.faults)
    if failed:
        raise SpecError(f"{failed} {'check' if failed == 1 else 'checks'} failed; nothing submitted")


def _write(folder: Path, files: dict[str, str]) -> None:
    make_folder(folder)
    for name, text in files.items():
        try:
            (folder / name).write_text(text, encoding="utf-8", errors="surrogateescape")
        except OSError as error:
            raise KavaError(f"{folder / name}: cannot be written: {error.strerror}") from error
