"""Define the verbs before a run: check, plan, calibrate, profile, cache, sample."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from kava_core.cli.arguments import Overrides, Spec


def _print_rules(asked: bool) -> None:
    """Print which settings may go together, and exit; no spec is needed."""
    if not asked:
        return
    from kava_core.jobs.check import rule_lines

    typer.echo("\n".join(rule_lines()))
    raise typer.Exit


def check(
    spec: Spec,
    overrides: Overrides = None,
    rules: Annotated[
        bool,
        typer.Option("--rules", is_eager=True, callback=_print_rules, help="Print what may go together."),
    ] = False,
) -> None:
    """Check a spec: syntax, schema, rules, plugins and all shapes."""
    from kava_core.jobs.check import check as check_levels

    for level, finding in check_levels(spec, overrides or ()):
        typer.echo(f"{level:<8} ok   {finding}")
    _tell_advice(spec, overrides)


def _tell_advice(spec: Spec, overrides: Overrides) -> None:
    """Print on stderr what is allowed in a spec, or one of its variants, and probably a mistake."""
    from kava_core.console import tell_once
    from kava_core.specfile.advice import advice_on
    from kava_core.specfile.load import load_spec
    from kava_core.specfile.variants import resolve_variants

    for variant in resolve_variants(load_spec(spec, overrides or ())).values():
        for line in advice_on(variant):
            tell_once(line)


def cache(
    spec: Spec,
    overrides: Overrides = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Write nothing; compare every file with its sha256.")
    ] = False,
) -> None:
    """Run the teachers once and store what training needs of them."""
    from kava_core.specfile.load import load_spec
    from kava_core.specfile.variants import resolve_variants

    variants = resolve_variants(load_spec(spec, overrides or ()))
    from kava_core.jobs.cache import write_stores

    for line in write_stores(variants, verify=verify):
        typer.echo(line)


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
    from kava_core.specfile.load import load_spec

    loaded = load_spec(spec, overrides or ())
    from kava_core.jobs.sample import SamplingOptions, sample_rationales

    options = SamplingOptions(split, count, temperature, max_new_tokens, batch_size, keep_wrong, seed)
    typer.echo(sample_rationales(loaded.spec, teacher, output, options))


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
    from kava_core.specfile.load import load_spec

    loaded = load_spec(spec, overrides or ())
    from kava_core.costs.plan import default_time, make_plan
    from kava_core.costs.plan_tables import print_plan

    length = time or default_time(loaded.spec)
    _tell_advice(spec, overrides)
    found = make_plan(loaded.spec, time=length, t_time=teacher_time or length, processes=processes)
    print_plan(found, loaded)


def calibrate(
    spec: Spec,
    output: Annotated[
        Path, typer.Option("--output", metavar="FOLDER", help="Where files go.", show_default=False)
    ],
    overrides: Overrides = None,
) -> None:
    """Measure which layers resemble each other, and draw it."""
    from kava_core.specfile.load import load_spec

    loaded = load_spec(spec, overrides or ())
    from kava_core.jobs.calibrate import measure_layers

    measure_layers(loaded, output)


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
    from kava_core.specfile.load import load_spec

    loaded = load_spec(spec, overrides or ())
    from kava_core.jobs.profile.profile_variants import profile_variants
    from kava_core.jobs.profile.variant_profile import ProfileOptions

    profile_variants(loaded, output, ProfileOptions(batches, gate_examples if gate else None), format)
