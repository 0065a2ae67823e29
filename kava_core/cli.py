"""The command line: ``kava VERB spec.yaml key=value …``. Commands are thin, heavy imports inside them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from kava_core.errors import KavaError, PluginError

app = typer.Typer(
    name="kava",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

TRACEBACK = "KAVA_TRACEBACK"
"""Environment variable: show where an error was raised."""

Spec = Annotated[Path, typer.Argument(metavar="SPEC", help="Spec file (YAML).", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes, such as train.steps=100.", show_default=False),
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: an error kava can explain goes to stderr without a traceback."""
    try:
        app(args=arguments)
    except Exception as error:
        known = explained(error)
        if known is None or os.environ.get(TRACEBACK, "") not in ("", "0"):
            raise
        print(known, file=sys.stderr)
        _leave(known.exit_code)


def _leave(code: int) -> NoReturn:
    """Exit; one of several processes exits in a way that torch.distributed survives."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from kava_core.train.processes import leave

        leave(code)
    sys.exit(code)


def explained(error: Exception) -> KavaError | None:
    """The error as one kava can explain: its own, and any that was raised inside a component."""
    whose = [note.removeprefix("in ") for note in getattr(error, "__notes__", ()) if note.startswith("in ")]
    if isinstance(error, KavaError):
        return type(error)(": ".join([*whose, str(error)])) if whose else error
    if not whose:
        return None
    said = str(error).strip().splitlines() or ["no message"]
    facts = [line for line in said if line.startswith(("Actual value", "Expected type"))]
    told = " ".join([said[0], *facts])
    return PluginError(f"{whose[0]}: {type(error).__name__}: {told} (--traceback shows where)")


@app.callback()
def options(
    check_shapes: Annotated[
        bool, typer.Option("--check-shapes", help="Check every tensor's shape and type at run time (slow).")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error was raised.")] = False,
) -> None:
    """Distil the key-value caches of teachers into a student, as a spec file says."""
    if traceback:
        os.environ[TRACEBACK] = "1"
    if check_shapes:
        from kava_core import shapecheck

        os.environ[shapecheck.VARIABLE] = "1"
        shapecheck.enable()


@app.command()
def check(spec: Spec, overrides: Overrides = None) -> None:
    """Check a spec: syntax, schema, plugins, shapes at every stage."""
    from kava_core.jobs.check import check as levels

    for level, found in levels(spec, overrides or ()):
        typer.echo(f"{level:<8} ok   {found}")


@app.command()
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
    from kava_core.specfile.load import load
    from kava_core.specfile.variants import chosen_runs, resolve_variants

    runs = chosen_runs(resolve_variants(load(spec, overrides or ())), variant, seed)
    from kava_core.train import summary as report
    from kava_core.train.processes import is_main, processes
    from kava_core.train.run import run

    results = [run(resolved, variant=name, seed=number) for name, number, resolved in runs]
    if is_main():
        report.show(results)
    if processes() > 1:
        _leave(0)


@app.command()
def experiment(
    spec: Spec,
    overrides: Overrides = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, show_default=False, help="Runs at a time; default: one a GPU, or one."),
    ] = None,
) -> None:
    """Run all variants and seeds; judge what they show."""
    from kava_core.specfile.load import load

    loaded = load(spec, overrides or ())
    from kava_core.experiment.command import carry_out

    failed = carry_out(loaded, spec, overrides or (), jobs=jobs)
    if failed:
        sys.exit(KavaError.exit_code)


@app.command()
def report(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="FOLDER", help="An experiment's runs: runs/NAME.", show_default=False),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", metavar="FOLDER", help="Where files go; default: FOLDER/report.", show_default=False
        ),
    ] = None,
) -> None:
    """Write what experiments say: a page, figures, tables."""
    from kava_core.report.command import report as write

    for line in write(folders, output):
        typer.echo(line)


@app.command()
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
    from kava_core.cluster.launch import launch as submit
    from kava_core.cluster.resources import Resources

    resources = Resources(partition, account, time, gpus, nodes, cpus, memory, array_limit, extra)
    submit(spec, overrides or (), resources, typer.echo, gpu_memory=gpu_memory, dry_run=dry_run)


@app.command()
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
    from kava_core.cluster.status import runs_of, table_of

    runs = runs_of(spec, overrides or ())
    if format == "json":
        typer.echo(json.dumps([row.json() for row in table_of(runs)], indent=2, ensure_ascii=False))
        return
    from kava_core.cluster import status_text

    status_text.show(lambda: table_of(runs), watch)


@app.command()
def cache(
    spec: Spec,
    overrides: Overrides = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Write nothing; compare every file with its sha256.")
    ] = False,
) -> None:
    """Run the teachers once and store what training needs of them."""
    from kava_core.specfile.load import load
    from kava_core.specfile.variants import resolve_variants

    variants = resolve_variants(load(spec, overrides or ()))
    from kava_core.jobs.cache import cache_all

    for line in cache_all(variants, verify=verify):
        typer.echo(line)


@app.command()
def sample(
    spec: Spec,
    teacher: Annotated[
        str, typer.Option("--teacher", metavar="NAME", show_default=False, help="Who writes.")
    ],
    output: Annotated[Path, typer.Option("--output", metavar="FILE", show_default=False, help="New file.")],
    overrides: Overrides = None,
    split: Annotated[
        Literal["train", "validation"], typer.Option("--split", help="Which examples.")
    ] = "train",
    count: Annotated[int, typer.Option(min=1, help="Texts written for each example.")] = 4,
    temperature: Annotated[float, typer.Option(min=0.01, help="Of the sampling.")] = 0.8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest text written.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples in a forward pass.")] = 32,
    keep_wrong: Annotated[
        bool, typer.Option("--keep-wrong", help="Also keep rationales that end in a wrong answer.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 0,
) -> None:
    """Let a teacher write several rationales for every example."""
    from kava_core.specfile.load import load

    loaded = load(spec, overrides or ())
    from kava_core.jobs.sample import Drawing
    from kava_core.jobs.sample import sample as draw

    drawing = Drawing(split, count, temperature, max_new_tokens, batch_size, keep_wrong, seed)
    typer.echo(draw(loaded.spec, teacher, output, drawing))


@app.command()
def plan(
    spec: Spec,
    overrides: Overrides = None,
    time: Annotated[
        int | None,
        typer.Option(min=1, help="Student tokens; default: train.max_length, or what the models take."),
    ] = None,
    teacher_time: Annotated[
        int | None, typer.Option(min=1, help="Teacher tokens; default: as --time.")
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Also show the memory of each of so many processes.")
    ] = 1,
) -> None:
    """Show shapes, parameters, memory and cost of a step."""
    from kava_core.specfile.load import load

    loaded = load(spec, overrides or ())
    from kava_core.costs.plan import default_time, make_plan
    from kava_core.costs.plan_text import show

    length = time or default_time(loaded.spec)
    found = make_plan(loaded.spec, time=length, t_time=teacher_time or length, processes=processes)
    show(found, loaded)


@app.command()
def calibrate(
    spec: Spec,
    output: Annotated[
        Path, typer.Option("--output", metavar="FOLDER", help="Where files go.", show_default=False)
    ],
    overrides: Overrides = None,
) -> None:
    """Measure which layers resemble each other, and draw it."""
    from kava_core.specfile.load import load

    loaded = load(spec, overrides or ())
    from kava_core.jobs.calibrate import calibrate as measure

    measure(loaded, output)


@app.command()
def profile(
    spec: Spec,
    overrides: Overrides = None,
    batches: Annotated[int, typer.Option("--batches", min=1, help="Validation batches.")] = 1,
    gate: Annotated[
        bool, typer.Option("--gate", help="Also compare attention outputs with two controls.")
    ] = False,
    gate_examples: Annotated[
        int, typer.Option("--gate-examples", min=2, help="Validation examples of the gate.")
    ] = 64,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FOLDER", help="Also write files.", show_default=False),
    ] = None,
    format: Annotated[Literal["table", "json"], typer.Option("--format", help="How to print.")] = "table",
) -> None:
    """Run a batch through every stage of every variant and show what is there."""
    from kava_core.specfile.load import load

    loaded = load(spec, overrides or ())
    from kava_core.jobs.profile.command import profile_all
    from kava_core.jobs.profile.profile import Wanted

    profile_all(loaded, output, Wanted(batches, gate_examples if gate else None), format)


@app.command()
def export(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A finished run's directory.", show_default=False)
    ],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="New folder.", show_default=False)],
) -> None:
    """Write a run's student as a plain transformers folder."""
    from kava_core.jobs.export import export as write
    from kava_core.train.save_student import loader

    write(run, target)
    typer.echo(f"{target}: load it with {loader(target)}.from_pretrained({str(target)!r})")


@app.command("eval")
def evaluate(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A finished run's directory.", show_default=False)
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", show_default=False, help="JSON lines; default: the run's validation examples."
        ),
    ] = None,
    format: Annotated[
        Literal["fields", "gsm8k", "pal"], typer.Option(help="Of the file; pal: SVAMP, MultiArith.")
    ] = "gsm8k",
    limit: Annotated[
        int | None, typer.Option(min=1, show_default=False, help="Only the first examples.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers written at a time.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    output: Annotated[
        Path | None, typer.Option(metavar="FOLDER", show_default=False, help="Default: RUN/evals/…")
    ] = None,
    lm_eval: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", show_default=False, help="Also write an lm-evaluation-harness task."),
    ] = None,
) -> None:
    """Let a run's student answer a file of tasks, and count what is right."""
    from kava_core.jobs.evaluate.command import Settings, evaluate_run

    settings = Settings(format, limit, batch_size, max_new_tokens)
    evaluate_run(run, data, output, lm_eval, settings)


@app.command()
def latents(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A finished run's directory.", show_default=False)
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "--out",
            metavar="FOLDER",
            help="Where files go; default: RUN/latents.",
            show_default=False,
        ),
    ] = None,
    examples: Annotated[int, typer.Option(min=1, help="Validation examples.")] = 64,
    top: Annotated[int, typer.Option(min=1, help="Tokens shown for every latent token.")] = 5,
) -> None:
    """Show what a run's latent tokens say, and what they resemble."""
    from kava_core.jobs.latents.command import show_latents

    show_latents(run, output or run / "latents", examples=examples, top=top)


@app.command()
def plugins(
    format: Annotated[Literal["table", "json"], typer.Option("--format", help="How to print.")] = "table",
) -> None:
    """List the installed components and who registered them."""
    from kava_core.registry import Registry

    registry = Registry.build()
    if format == "json":
        rows = [_row(one) for one in registry.table()]
        failures = [vars(failure) for failure in registry.failures]
        typer.echo(json.dumps({"components": rows, "failures": failures}, indent=2, ensure_ascii=False))
        return
    for line in _aligned([_row(one).values() for one in registry.table()]):
        typer.echo(line)
    for failure in registry.failures:
        typer.echo(str(failure))


@app.command()
def schema(
    output: Annotated[Path | None, typer.Option("--output", help="Write to this file instead.")] = None,
) -> None:
    """Print the JSON Schema of specs with what is installed."""
    from kava_core.registry import Registry
    from kava_core.specfile.schema import json_schema

    text = json.dumps(json_schema(Registry.build()), indent=2, ensure_ascii=False)
    if output is None:
        typer.echo(text)
        return
    try:
        output.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise KavaError(f"{output}: cannot be written: {error.strerror}") from error


@app.command()
def env(
    devices: Annotated[
        bool, typer.Option("--devices", help="Also list accelerators (imports torch).")
    ] = False,
) -> None:
    """Print the versions a run depends on."""
    import platform

    from kava_core.versions import versions

    rows = [("python", platform.python_version()), ("platform", platform.platform())]
    rows += [(name, found or "not installed") for name, found in versions().items()]
    for line in _aligned(rows + (_devices() if devices else [])):
        typer.echo(line)


new = typer.Typer(no_args_is_help=True)
app.add_typer(new, name="new")

Folder = Annotated[Path, typer.Option("--output", help="Folder to write into.")]


@new.callback()
def _new() -> None:
    """Write a new plugin package or spec."""


@new.command("plugin")
def new_plugin(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the component.", show_default=False)],
    kind: Annotated[
        str,
        typer.Option(
            metavar="KIND", help="head_adapter, time_warper, layer_mapper, dim_projector, fuser or kv_loss."
        ),
    ] = "layer_mapper",
    output: Folder = Path(),
) -> None:
    """Write a package with one component and its test."""
    from kava_core.scaffold.plugin import new_plugin as write

    folder = write(name, kind, output)
    typer.echo(f"{folder}: pip install -e '{folder}[test]' && pytest {folder}")


@new.command("spec")
def new_spec(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the run.", show_default=False)],
    output: Folder = Path(),
) -> None:
    """Write a small spec that runs as it is, with comments."""
    from kava_core.scaffold.spec import new_spec as write

    file = write(name, output)
    typer.echo(f"{file}: kava check {file} && kava train {file}")


def _row(registered: Any) -> dict[str, str]:
    fields = ("kind", "name", "distribution", "version", "doc")
    return {field: getattr(registered, field) for field in fields}


def _aligned(rows: Iterable[Iterable[str]]) -> list[str]:
    """Columns as wide as their widest cell, two spaces between."""
    table = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]


def _devices() -> list[tuple[str, str]]:
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return [(f"cuda:{index}", name) for index, name in enumerate(names)] or [("cuda", "no device")]
