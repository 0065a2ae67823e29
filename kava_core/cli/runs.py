"""Define the verbs that run a spec: train, experiment, launch, status."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Literal

import typer

from kava_core.cli.arguments import Overrides, Spec
from kava_core.errors import KavaError


def train(
    spec: Spec,
    overrides: Overrides = None,
    variant: Annotated[
        str | None, typer.Option("--variant", metavar="NAME", show_default=False, help="Only this variant.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", show_default=False, help="Only this seed.")
    ] = None,
) -> None:
    """Train, or go on with, every variant and seed of a spec."""
    from kava_core.specfile.load import load_spec
    from kava_core.specfile.variants import chosen_runs, resolve_variants

    runs = chosen_runs(resolve_variants(load_spec(spec, overrides or ())), variant, seed)
    from kava_core.processes import is_main, leave, world_size
    from kava_core.train.run import run
    from kava_core.train.summary import print_summary

    results = [run(resolved, variant=name, seed=number) for name, number, resolved in runs]
    if is_main():
        for result in results:
            if not result.trained:
                typer.echo(f"{result.folder}: already complete, nothing trained", err=True)
        print_summary(results)
    if world_size() > 1:
        leave(0)


def experiment(
    spec: Spec,
    overrides: Overrides = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, show_default=False, help="Runs at a time; default: one a GPU, or one."),
    ] = None,
) -> None:
    """Run all variants and seeds; judge what they show."""
    from kava_core.specfile.load import load_spec

    loaded = load_spec(spec, overrides or ())
    from kava_core.experiment.run_experiment import run_experiment

    failed = run_experiment(loaded, spec, overrides or (), jobs=jobs)
    if failed:
        sys.exit(KavaError.exit_code)


def launch(
    spec: Spec,
    overrides: Overrides = None,
    partition: Annotated[str | None, typer.Option("--partition", help="Of the cluster.")] = None,
    account: Annotated[str | None, typer.Option("--account", help="Who pays.")] = None,
    time: Annotated[
        str | None, typer.Option("--time", metavar="TIME", help="Limit of a run, such as 4:00:00.")
    ] = None,
    gpus: Annotated[int, typer.Option("--gpus", min=0, help="On each node, a process each.")] = 1,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="For each run.")] = 1,
    cpus: Annotated[int | None, typer.Option("--cpus", min=1, help="For each process.")] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="SIZE", help="Of each node, such as 64G.")
    ] = None,
    array_limit: Annotated[
        int | None, typer.Option("--array-limit", min=1, help="Runs at the same time.")
    ] = None,
    gpu_memory: Annotated[
        float | None,
        typer.Option("--gpu-memory", metavar="GIB", min=0.1, help="Compare the plan with this much."),
    ] = None,
    extra: Annotated[
        str, typer.Option("--extra", metavar="OPTIONS", help="Further options of sbatch.", show_default=False)
    ] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script; touch nothing.")] = False,
) -> None:
    """Check and submit what is not complete as one SLURM array."""
    from kava_core.experiment.slurm.launch import launch_array
    from kava_core.experiment.slurm.resources import Resources

    resources = Resources(partition, account, time, gpus, nodes, cpus, memory, array_limit, extra)
    launch_array(spec, overrides or (), resources, typer.echo, gpu_memory=gpu_memory, dry_run=dry_run)


def status(
    spec: Spec,
    overrides: Overrides = None,
    watch: Annotated[
        float | None,
        typer.Option(
            "--watch", metavar="SECONDS", min=0.5, help="Show it again and again.", show_default=False
        ),
    ] = None,
    format: Annotated[Literal["table", "json"], typer.Option("--format", help="How to print.")] = "table",
) -> None:
    """Show how far every run of a spec has come."""
    from kava_core.experiment.slurm.status import run_statuses, runs_of_spec

    runs = runs_of_spec(spec, overrides or ())
    if format == "json":
        typer.echo(json.dumps([row.as_json() for row in run_statuses(runs)], indent=2, ensure_ascii=False))
        return
    from kava_core.experiment.slurm import status_text

    status_text.show_status(lambda: run_statuses(runs), watch)
