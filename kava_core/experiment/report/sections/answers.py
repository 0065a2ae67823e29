"""Show some written answers of every variant, right and wrong ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kava_core.experiment.load_experiment import LoadedRun
from kava_core.experiment.report.experiment_data import ExperimentData, read_json_lines
from kava_core.experiment.report.pages.display_text import printable_text
from kava_core.experiment.report.pages.page_elements import Answer, AnswerList, Block, Paragraph, Section

TITLE = "Written answers"
ANSWERS_OF_EACH = 2
"""Right ones and wrong ones of every variant."""

LONGEST = 600
"""Characters of a text that are shown."""


def answers_section(data: ExperimentData) -> Section:
    """Return answers of the first complete run of every variant that wrote any."""
    blocks: list[Block] = []
    for variant in data.experiment.variants:
        for run in data.complete_runs(variant).values():
            if run.folder.samples.exists():
                blocks.append(_answers_of_run(run))
                break
    if not blocks:
        return Section("answers", TITLE, absent="No complete run has written answers.")
    how = "The first right and wrong ones that the last evaluation kept; they illustrate, they prove nothing."
    return Section("answers", TITLE, [Paragraph(how), *blocks])


def _answers_of_run(run: LoadedRun) -> AnswerList:
    written = [_make_answer(line) for line in read_json_lines(run.folder.samples)]
    right = [answer for answer in written if answer.correct]
    wrong = [answer for answer in written if not answer.correct]
    title = printable_text(
        f"{run.variant}, seed {run.seed}: {len(right)} right, {len(wrong)} wrong were kept"
    )
    return AnswerList(title, _first_few(right) + _first_few(wrong))


def _first_few(answers: Sequence[Answer]) -> list[Answer]:
    return list(answers[:ANSWERS_OF_EACH])


def _make_answer(line: dict[str, Any]) -> Answer:
    prompt, gold, wrote = (_cut_text(str(line.get(name, "–"))) for name in ("prompt", "gold", "wrote"))
    return Answer(prompt, gold, wrote, line.get("correct") is True)


def _cut_text(text: str) -> str:
    shown = printable_text(text, keep="\n\t")
    return shown if len(shown) <= LONGEST else f"{shown[:LONGEST]} … ({len(text)} characters)"
