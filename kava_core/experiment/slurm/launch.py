"""Submit all runs of a spec that are not complete as one array of jobs, for ``kava launch``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from itertools import chain, count
from pathlib import Path

from kava_core.errors import KavaError, SpecError
from kava_core.experiment.slurm.mapping import (
    MAPPING,
    elements_of_runs,
    job_name,
    launches_folder,
    mapping_text,
)
from kava_core.experiment.slurm.preflight import Preflight
from kava_core.experiment.slurm.resources import Resources
from kava_core.experiment.slurm.sbatch import SCRIPT, SPEC, ArrayJob, script_text
from kava_core.experiment.slurm.scheduler import queued_runs, submit_script
from kava_core.files import make_folder
from kava_core.runs.folder import Folder
from kava_core.runs.planned import planned_runs
from kava_core.specfile.load import load_spec
from kava_core.specfile.variants import resolve_variants

PrintLine = Callable[[str], object]


def launch_array(
    file: Path,
    overrides: Sequence[str],
    resources: Resources,
    print_line: PrintLine,
    *,
    gpu_memory: float | None = None,
    dry_run: bool = False,
) -> None:
    """Check and submit an array of all runs of a spec that are not complete.

    Args:
        file: spec.
        overrides: changes of it.
        resources: of each run.
        print_line: takes every line that is to be printed.
        gpu_memory: GiB of a device, to be compared with the plan; None: not known.
        dry_run: print the script and touch nothing.

    Raises:
        SpecError: a check failed, or a run is queued or at work already; nothing is submitted.
        KavaError: SLURM does not answer, or files cannot be written.
    """
    loaded = load_spec(file, overrides)
    all_runs = planned_runs(resolve_variants(loaded))
    runs = [run for run in all_runs if run.state() != "complete"]
    if not runs:
        print_line(f"nothing to submit: {len(all_runs)} of {len(all_runs)} runs are complete")
        return
    folder = _new_launch_folder(launches_folder(loaded.spec))
    text = script_text(_array_job(folder, loaded.spec.name, overrides, len(runs), resources))
    if dry_run:
        print_line(text.removesuffix("\n"))
        return
    _refuse_busy_runs(runs)
    _run_checks(Preflight(runs, resources, text, gpu_memory), print_line)
    _write_files(folder, {SPEC: loaded.source, MAPPING: mapping_text(elements_of_runs(runs)), SCRIPT: text})
    number = submit_script(folder / SCRIPT)
    print_line(f"job {number}: {len(runs)} of {len(all_runs)} runs; script, mapping and logs in {folder}")


def _array_job(
    folder: Path, name: str, overrides: Sequence[str], count: int, resources: Resources
) -> ArrayJob:
    folder = folder.absolute()
    return ArrayJob(job_name(name, folder), folder, Path.cwd(), sys.executable, overrides, count, resources)


def _new_launch_folder(base: Path) -> Path:
    """Return a folder named after the second, with a number if that one is taken."""
    folder = base / datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in count(2))
    return next(path for path in chain([folder], numbered) if not path.exists())


def _refuse_busy_runs(runs: Sequence[Folder]) -> None:
    """Raise a SpecError if a run would be trained twice."""
    elements = queued_runs(runs[0].spec)
    busy = [f"{run.label} ({elements[str(run.path)]})" for run in runs if str(run.path) in elements]
    busy += [f"{run.label} (at work)" for run in runs if run.state() == "running"]
    if busy:
        raise SpecError(f"queued or at work already: {', '.join(busy)}; wait for them, or scancel the job")


def _run_checks(checks: Preflight, print_line: PrintLine) -> None:
    failed = 0
    for check in checks:
        print_line(str(check))
        failed += bool(check.faults)
    if failed:
        raise SpecError(f"{failed} {'check' if failed == 1 else 'checks'} failed; nothing submitted")


def _write_files(folder: Path, files: dict[str, str]) -> None:
    make_folder(folder)
    for name, text in files.items():
        try:
            (folder / name).write_text(text, encoding="utf-8", errors="surrogateescape")
        except OSError as error:
            raise KavaError(f"{folder / name}: cannot be written: {error.strerror}") from error
