"""``kava experiment``: declare, run what is missing, judge, show."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from kava_core.data.splits import Splits, load_splits
from kava_core.errors import SpecError
from kava_core.experiment.conduct import conduct, train_command
from kava_core.experiment.declared import declare
from kava_core.experiment.gather import gather
from kava_core.experiment.progress import Watch
from kava_core.experiment.tables import means, told
from kava_core.jobs.check import check_chains, dry_runs
from kava_core.runs.folder import Folder
from kava_core.runs.planned import planned_runs
from kava_core.specfile.load import LoadedSpec
from kava_core.specfile.sections.compare import CompareSpec
from kava_core.specfile.variants import resolve_variants, treatment_variant


def carry_out(loaded: LoadedSpec, spec: Path, overrides: Sequence[str], *, jobs: int | None) -> list[Folder]:
    """Run and judge; returns the runs that failed.

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
    _check_data(runs)
    declare(folder, loaded.spec.compare or CompareSpec(), treatment_variant(loaded.spec), runs)
    devices = _devices()
    watch = Watch(loaded.spec.name)
    try:
        failed = conduct(
            train_command(spec, overrides), runs, watch, jobs=jobs or max(1, devices), devices=devices
        )
    finally:
        watch.close()
    _show(folder, failed)
    return failed


def _check_data(runs: Sequence[Folder]) -> None:
    """SpecError where a complete run was trained on other examples than the spec's files hold now."""
    known: dict[str, Splits] = {}
    for run in runs:
        if run.state() != "complete":
            continue
        key = run.spec.data.model_dump_json()
        splits = known.setdefault(key, load_splits(run.spec.data, root=Path.cwd()))
        if not splits.same_as(run.record()["data"]):
            raise SpecError(f"{run}: the data changed since this run ended; give the spec another name")


def _devices() -> int:
    import torch

    return torch.cuda.device_count()


def _show(folder: Path, failed: Sequence[Folder]) -> None:
    from kava_core.console import print_whole

    console = Console()
    experiment = gather(folder)
    print_whole(means(experiment), console)
    for line in told(experiment):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    console.print(f"runs:   {folder}", soft_wrap=True, highlight=False, markup=False)
    reasons: dict[tuple[str, str], list[Folder]] = {}
    for run in failed:
        said = (run.failure() or {}).get("error", "")
        reasons.setdefault((run.variant, said), []).append(run)
    for (variant, said), those in reasons.items():
        seeds = ", ".join(str(run.seed) for run in those)
        which = f"{variant} seed{'s' if len(those) > 1 else ''} {seeds}"
        print(f"{which} failed: {said} ({those[0].log})", file=sys.stderr)
