"""Put the parts of a report in their order."""

from __future__ import annotations

from collections.abc import Sequence

from kava_core.experiment.report.experiment_data import ExperimentData
from kava_core.experiment.report.pages.display_text import printable_text
from kava_core.experiment.report.pages.page_elements import Chapter
from kava_core.experiment.report.sections.answers import answers_section
from kava_core.experiment.report.sections.attention_maps import attention_section
from kava_core.experiment.report.sections.collapse import collapse_section
from kava_core.experiment.report.sections.compared_settings import compared_section
from kava_core.experiment.report.sections.cost import cost_section
from kava_core.experiment.report.sections.curves import curves_section
from kava_core.experiment.report.sections.differences import differences_section
from kava_core.experiment.report.sections.layer_maps import layer_maps_section
from kava_core.experiment.report.sections.reading_guide import reading_section
from kava_core.experiment.report.sections.routing import routing_section
from kava_core.experiment.report.sections.summary import summary_section

SECTIONS = (
    summary_section,
    compared_section,
    curves_section,
    differences_section,
    cost_section,
    routing_section,
    collapse_section,
    layer_maps_section,
    attention_section,
    answers_section,
)


def make_chapters(experiments: Sequence[ExperimentData]) -> list[Chapter]:
    """Return a chapter for every experiment; the last one also explains how to read them."""
    chapters = [_make_chapter(data) for data in experiments]
    last = chapters[-1]
    chapters[-1] = Chapter(last.key, last.title, last.under, [*last.sections, reading_section()])
    return chapters


def _make_chapter(data: ExperimentData) -> Chapter:
    experiment = data.experiment
    finished = max((str(run.record.get("finished", "")) for run in experiment.runs), default="")
    under = f"{experiment.folder}" + (f" · last run finished {finished}" if finished else "")
    sections = [make(data) for make in SECTIONS]
    return Chapter(f"e{data.number}", printable_text(experiment.name), printable_text(under), sections)
