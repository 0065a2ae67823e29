"""Define the verbs after a run: report, export, eval, latents."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


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
    from kava_core.experiment.report.write_report import write_report

    for line in write_report(folders, output):
        typer.echo(line)


def export(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A finished run's directory.", show_default=False)
    ],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="New folder.", show_default=False)],
) -> None:
    """Write a run's student as a plain transformers folder."""
    from kava_core.jobs.export import export_student
    from kava_core.train.save_student import loading_class

    export_student(run, target)
    typer.echo(f"{target}: load it with {loading_class(target)}.from_pretrained({str(target)!r})")


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
    from kava_core.jobs.evaluate.evaluate_run import AnswerOptions, evaluate_run

    options = AnswerOptions(format, limit, batch_size, max_new_tokens)
    evaluate_run(run, data, output, lm_eval, options)


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
    from kava_core.jobs.latents.show_latents import show_latents
    from kava_core.runs.folder import Folder

    show_latents(run, output or Folder(run).latents, examples=examples, top=top)
