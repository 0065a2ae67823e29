"""Run an experiment for ``kava experiment``: record the plan, run what is missing, judge, show."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from kava_core.build.provenance import plugin_code, used_configs
from kava_core.data.splits import Splits, load_splits
from kava_core.errors import SpecError
from kava_core.experiment.experiment_progress import ExperimentProgress
from kava_core.experiment.load_experiment import load_experiment
from kava_core.experiment.recorded_plan import record_plan
from kava_core.experiment.result_tables import comparison_lines, table_of_means
from kava_core.experiment.run_processes import run_processes, train_command
from kava_core.jobs.check import check_chains, dry_runs
from kava_core.runs.folder import Folder
from kava_core.runs.planned import planned_runs
from kava_core.specfile.load import LoadedSpec
from kava_core.specfile.sections.compare import CompareSpec
from kava_core.specfile.variants import resolve_variants, treatment_variant


def run_experiment(
    loaded: LoadedSpec, spec: Path, overrides: Sequence[str], *, jobs: int | None
) -> list[Folder]:
    """Run what is missing, judge the comparisons and print what they show.

    Args:
        loaded: the spec, changes included.
        spec: its file.
        overrides: the changes, as given on the command line.
        jobs: runs at a time; None: one for each GPU, or one.

    Returns:
        The runs that failed.

    Raises:
        SpecError: a variant's shapes do not fit, or the data changed; nothing has run then.
        Preempted: a signal stopped it; the same command goes on.
        CheckpointError: a run's files are damaged.
    """
    variants = resolve_variants(loaded)
    check_chains(variants)
    dry_runs(variants)
    runs = planned_runs(variants)
    folder = runs[0].path.parent
    _check_data_unchanged(runs)
    _check_plugins_unchanged(runs)
    record_plan(folder, loaded.spec.compare or CompareSpec(), treatment_variant(loaded.spec), runs)
    devices = _count_gpus()
    progress = ExperimentProgress(loaded.spec.name)
    try:
        failed = run_processes(
            train_command(spec, overrides), runs, progress, jobs=jobs or max(1, devices), devices=devices
        )
    finally:
        progress.close()
    _print_results(folder)
    _print_failures(failed)
    return failed


def _check_data_unchanged(runs: Sequence[Folder]) -> None:
    """Raise a SpecError if a complete run was trained on other examples than the spec's files hold now."""
    splits_of_data: dict[str, Splits] = {}
    for run in runs:
        if run.state() != "complete":
            continue
        key = run.spec.data.model_dump_json()
        if key not in splits_of_data:
            splits_of_data[key] = load_splits(run.spec.data, root=Path.cwd())
        if not splits_of_data[key].same_as(run.record()["data"]):
            raise SpecError(f"{run}: the data changed since this run ended; give the spec another name")


def _check_plugins_unchanged(runs: Sequence[Folder]) -> None:
    """Raise a SpecError if a complete run was trained with another code of a plugin than there is now."""
    for run in runs:
        if run.state() == "complete":
            run.check_plugin_code(plugin_code(used_configs(run.spec)))


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _print_results(folder: Path) -> None:
    from kava_core.console import print_whole

    console = Console()
    experiment = load_experiment(folder)
    print_whole(table_of_means(experiment), console)
    for line in comparison_lines(experiment):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    console.print(f"runs:   {folder}", soft_wrap=True, highlight=False, markup=False)


def _print_failures(failed: Sequence[Folder]) -> None:
    """Print a line on stderr for every variant and reason."""
    runs_by_reason: dict[tuple[str, str], list[Folder]] = {}
    for run in failed:
        error = (run.failure() or {}).get("error", "")
        runs_by_reason.setdefault((run.variant, error), []).append(run)
    for (variant, error), runs in runs_by_reason.items():
        seeds = ", ".join(str(run.seed) for run in runs)
        which = f"{variant} seed{'s' if len(runs) > 1 else ''} {seeds}"
        print(f"{which} failed: {error} ({runs[0].log})", file=sys.stderr)
