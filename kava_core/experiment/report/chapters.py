"""The parts of a report in their order."""

from __future__ import annotations

from collections.abc import Sequence

from kava_core.experiment.report.experiment_data import Found
from kava_core.experiment.report.pages.blocks import Chapter
from kava_core.experiment.report.pages.text import plain
from kava_core.experiment.report.sections.answers import answers
from kava_core.experiment.report.sections.attention_maps import attention
from kava_core.experiment.report.sections.collapse import collapse
from kava_core.experiment.report.sections.compared import compared
from kava_core.experiment.report.sections.cost import cost
from kava_core.experiment.report.sections.curves import curves
from kava_core.experiment.report.sections.differences import differences
from kava_core.experiment.report.sections.layer_maps import layer_maps
from kava_core.experiment.report.sections.reading import reading
from kava_core.experiment.report.sections.routing import routing
from kava_core.experiment.report.sections.summary import summary

SECTIONS = (summary, compared, curves, differences, cost, routing, collapse, layer_maps, attention, answers)


def chapters_of(founds: Sequence[Found]) -> list[Chapter]:
    """A chapter for every experiment; how to read them stands in the last."""
    chapters = [_chapter(found) for found in founds]
    last = chapters[-1]
    chapters[-1] = Chapter(last.key, last.title, last.under, [*last.sections, reading()])
    return chapters


def _chapter(found: Found) -> Chapter:
    experiment = found.experiment
    finished = max((str(run.record.get("finished", "")) for run in experiment.runs), default="")
    under = f"{experiment.folder}" + (f" · last run finished {finished}" if finished else "")
    sections = [make(found) for make in SECTIONS]
    return Chapter(f"e{found.place}", plain(experiment.name), plain(under), sections)
