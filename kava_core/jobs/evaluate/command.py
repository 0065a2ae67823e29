"""What ``kava eval`` does, step by step."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from kava_core.data.splits import split_hash
from kava_core.jobs.evaluate.harness import write_task
from kava_core.jobs.evaluate.judged import check_room, examples_of, judged, summary, write
from kava_core.jobs.evaluate.student import load_answering


@dataclass(frozen=True)
class Settings:
    """How answers are written."""

    format: str
    limit: int | None
    batch_size: int
    max_new_tokens: int


def evaluate_run(
    run: Path, file: Path | None, output: Path | None, harness: Path | None, settings: Settings
) -> None:
    """Judge a finished run's student and print what came out.

    Raises:
        SpecError: no finished run, or a file that cannot be read.
        CheckpointError: the run directory is damaged.
    """
    student = load_answering(run)
    examples = examples_of(student, file, settings.format, settings.limit)
    check_room(student, examples, settings.max_new_tokens)
    how: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens}
    console = Console()
    if harness is not None:
        name = write_task(harness, student, examples, **how)
        told = f"kava export {run} STUDENT && lm_eval --model hf --model_args pretrained=STUDENT"
        console.print(f"{told} --tasks {name} --include_path {harness}", soft_wrap=True, highlight=False)
    lines = []
    writing = judged(student, examples, batch_size=settings.batch_size, **how)
    for line in track(writing, "answers", total=len(examples), console=Console(stderr=True), transient=True):
        lines.append(line)
    label = "validation" if file is None else file.stem
    folder = output or student.run.evaluations / f"{label}-{split_hash(examples)[:8]}"
    found = summary(student, examples, lines, {"file": str(file or "the run's own"), **asdict(settings)})
    before = write(folder, lines, found)
    low, high = found["wilson_95"]
    told = f"{found['correct']} of {found['examples']} right: {found['exact_match']:.1%}"
    console.print(f"{told} (95 % {low:.1%} … {high:.1%} over examples)", highlight=False)
    for name in ("duplicates_across", "contaminated"):
        if found["data"].get(name):
            console.print(
                f"{name.replace('_', ' ')}: {found['data'][name]} of these examples", style="yellow"
            )
    if before:
        console.print(f"judged here {before} times before: a test set is for one look", style="yellow")
    console.print(f"answers: {folder / 'answers.jsonl'}", soft_wrap=True, highlight=False)
