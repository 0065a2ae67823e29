"""Draw the collapse monitor over time: whether the aligner, not the student, made the KV loss fall."""

from __future__ import annotations

from functools import partial

from kava_core.experiment.report.experiment_data import ExperimentData
from kava_core.experiment.report.figures.figure_style import draw_picture
from kava_core.experiment.report.figures.line_charts import (
    MOST_FIGURES,
    draw_curve_groups,
    drawn_values,
    note_on_omitted,
    text_of_last_means,
)
from kava_core.experiment.report.pages.display_text import metric_words, printable_text
from kava_core.experiment.report.pages.page_elements import Block, Gallery, Paragraph, Picture, Section

PREFIX = "collapse/"
TITLE = "Collapse monitor"
MEASURES = ("absorbed", "rank", "cosine", "frozen_cosine", "variance")
"""In this order."""

HOW = (
    "Rank and variance are of the aligned teacher: where they fall, the target shrinks towards what the "
    "student already is. Cosine is student against aligned teacher; frozen cosine against the teacher as it "
    "was aligned before the first step. Absorbed is the share of the KV loss's fall that the trained aligner "
    "makes with an untrained student: above one half, a low loss says little about the student."
)


def collapse_section(data: ExperimentData) -> Section:
    """Return a figure for each measure of each teacher and part, a colour for each variant."""
    metrics = sorted(data.metric_names(PREFIX), key=_order_of_metric)
    drawn = [metric for metric in metrics if data.curves_by_variant(metric)]
    if not drawn:
        return Section("collapse", TITLE, absent="No run has written measures of the collapse monitor.")
    still = [metric for metric in drawn if _is_still(data, metric)]
    moving = [metric for metric in drawn if metric not in still]
    blocks: list[Block] = [Paragraph(HOW)]
    if moving:
        blocks.append(Gallery([_metric_picture(data, metric) for metric in moving[:MOST_FIGURES]]))
    blocks += note_on_omitted(len(moving))
    if still:
        texts = [f"{_title_of_metric(metric)} {_drawn_values(data, metric)[0]:.4g}" for metric in still]
        sentence = f"The same in every run at every step: {'; '.join(texts)}."
        blocks.append(Paragraph(printable_text(sentence)))
    return Section("collapse", TITLE, blocks)


def _drawn_values(data: ExperimentData, metric: str) -> list[float]:
    return drawn_values(data.curves_by_variant(metric))


def _is_still(data: ExperimentData, metric: str) -> bool:
    """Return whether all runs agree at several steps: a figure would show one flat line."""
    values = _drawn_values(data, metric)
    groups = data.curves_by_variant(metric).values()
    has_several_steps = any(len(curve) > 1 for curves in groups for _, curve in curves)
    return has_several_steps and max(values) - min(values) <= 1e-6 * max(map(abs, values))


def _order_of_metric(metric: str) -> tuple[int, str]:
    measure = metric.rpartition("/")[2]
    return MEASURES.index(measure) if measure in MEASURES else len(MEASURES), metric


def _title_of_metric(metric: str) -> str:
    of, _, measure = metric.removeprefix(PREFIX).rpartition("/")
    return f"{metric_words(measure)}: {of.replace('/', ', ')}" if of else metric_words(measure)


def _metric_picture(data: ExperimentData, metric: str) -> Picture:
    groups, title = data.curves_by_variant(metric), printable_text(_title_of_metric(metric))
    alt = f"{title}, over steps, a colour for each variant; the means end at {text_of_last_means(groups)}"
    draw = partial(draw_curve_groups, groups, data.experiment.variants, title)
    return draw_picture(data.unique_name(metric), alt, draw)
