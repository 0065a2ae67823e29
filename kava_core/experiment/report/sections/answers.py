"""Some written answers of every variant, right and wrong ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kava_core.experiment.gather import Run
from kava_core.experiment.report.experiment_data import Found, read_lines
from kava_core.experiment.report.pages.blocks import Answer, Answers, Block, Paragraph, Section
from kava_core.experiment.report.pages.text import plain

TITLE = "Written answers"
EACH = 2
"""Right ones and wrong ones of every variant."""

LONGEST = 600
"""Characters of a text that are shown."""


def answers(found: Found) -> Section:
    """Of the first complete run of every variant that wrote any."""
    blocks: list[Block] = []
    for variant in found.experiment.variants:
        run = next((one for one in found.complete(variant).values() if one.folder.samples.exists()), None)
        blocks += [_of(run)] if run is not None else []
    if not blocks:
        return Section("answers", TITLE, absent="No complete run has written answers.")
    how = "The first right and wrong ones that the last evaluation kept; they illustrate, they prove nothing."
    return Section("answers", TITLE, [Paragraph(how), *blocks])


def _of(run: Run) -> Answers:
    written = [_answer(line) for line in read_lines(run.folder.samples)]
    right = [one for one in written if one.correct]
    wrong = [one for one in written if not one.correct]
    title = plain(f"{run.variant}, seed {run.seed}: {len(right)} right, {len(wrong)} wrong were kept")
    return Answers(title, _first(right) + _first(wrong))


def _first(answers: Sequence[Answer]) -> list[Answer]:
    return list(answers[:EACH])


def _answer(line: dict[str, Any]) -> Answer:
    prompt, gold, wrote = (_cut(str(line.get(name, "–"))) for name in ("prompt", "gold", "wrote"))
    return Answer(prompt, gold, wrote, line.get("correct") is True)


def _cut(text: str) -> str:
    shown = plain(text, keep="\n\t")
    return shown if len(shown) <= LONGEST else f"{shown[:LONGEST]} … ({len(text)} characters)"
