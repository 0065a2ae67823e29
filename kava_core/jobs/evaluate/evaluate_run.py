"""Judge a finished run's student and print what came out, step by step: ``kava eval``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from kava_core.data.splits import split_hash
from kava_core.jobs.evaluate.answering_student import load_answering_student
from kava_core.jobs.evaluate.harness_task import write_harness_task
from kava_core.jobs.evaluate.scored_answers import (
    check_prompts_fit,
    load_examples,
    score_answers,
    summarise_scores,
    write_result,
)


@dataclass(frozen=True)
class AnswerOptions:
    """Which examples are answered, and how."""

    format: str
    limit: int | None
    batch_size: int
    max_new_tokens: int


def evaluate_run(
    run: Path, file: Path | None, output: Path | None, harness: Path | None, options: AnswerOptions
) -> None:
    """Judge a finished run's student and print what came out.

    Args:
        run: its directory.
        file: the examples; None: the validation examples of the run.
        output: folder of the answers; None: one in the run's directory.
        harness: folder of a task for lm-evaluation-harness; None: none is written.
        options: which examples are answered, and how.

    Raises:
        SpecError: no finished run, or a file that cannot be read.
        CheckpointError: the run directory is damaged.
    """
    student = load_answering_student(run)
    examples = load_examples(student, file, options.format, options.limit)
    check_prompts_fit(student, examples, options.max_new_tokens)
    console = Console()
    if harness is not None:
        task = write_harness_task(harness, student, examples, max_new_tokens=options.max_new_tokens)
        command = f"kava export {run} STUDENT && lm_eval --model hf --model_args pretrained=STUDENT"
        console.print(f"{command} --tasks {task} --include_path {harness}", soft_wrap=True, highlight=False)
    scored = score_answers(
        student, examples, batch_size=options.batch_size, max_new_tokens=options.max_new_tokens
    )
    errors = Console(stderr=True)
    lines = list(track(scored, "answers", total=len(examples), console=errors, transient=True))
    label = "validation" if file is None else file.stem
    folder = output or student.run.evaluations / f"{label}-{split_hash(examples)[:8]}"
    settings = {"file": str(file or "the run's own"), **asdict(options)}
    result = summarise_scores(student, examples, lines, settings)
    times_before = write_result(folder, lines, result)
    _print_result(console, result, times_before)
    console.print(f"answers: {folder / 'answers.jsonl'}", soft_wrap=True, highlight=False)


def _print_result(console: Console, result: dict[str, Any], times_before: int) -> None:
    low, high = result["wilson_95"]
    score = f"{result['correct']} of {result['examples']} right: {result['exact_match']:.1%}"
    console.print(f"{score} (95 % {low:.1%} … {high:.1%} over examples)", highlight=False)
    for name in ("duplicates_across", "contaminated"):
        count = result["data"].get(name)
        if count:
            console.print(f"{name.replace('_', ' ')}: {count} of these examples", style="yellow")
    if times_before:
        console.print(f"judged here {times_before} times before: a test set is for one look", style="yellow")
