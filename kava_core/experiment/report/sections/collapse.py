"""The collapse monitor over time: whether the aligner, and not the student, made the KV loss fall."""

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


def collapse_section(found: ExperimentData) -> Section:
    """A figure for each measure of each teacher and part, a colour for each variant."""
    metrics = sorted(found.metrics(PREFIX), key=_order_of_metric)
    drawn = [metric for metric in metrics if found.curves(metric)]
    if not drawn:
        return Section("collapse", TITLE, absent="No run has written measures of the collapse monitor.")
    still = [metric for metric in drawn if _is_still(found, metric)]
    moving = [metric for metric in drawn if metric not in still]
    blocks: list[Block] = [Paragraph(HOW)]
    if moving:
        blocks.append(Gallery([_metric_picture(found, metric) for metric in moving[:MOST_FIGURES]]))
    blocks += note_on_omitted(len(moving))
    if still:
        told = "; ".join(
            f"{_title_of_metric(metric)} {_drawn_values(found, metric)[0]:.4g}" for metric in still
        )
        blocks.append(Paragraph(printable_text(f"The same in every run at every step: {told}.")))
    return Section("collapse", TITLE, blocks)


def _drawn_values(found: ExperimentData, metric: str) -> list[float]:
    return drawn_values(found.curves(metric))


def _is_still(found: ExperimentData, metric: str) -> bool:
    """Whether all runs agree at several steps: a figure would show one flat line."""
    values, steps = _drawn_values(found, metric), found.curves(metric).values()
    several = any(len(curve) > 1 for curves in steps for _, curve in curves)
    return several and max(values) - min(values) <= 1e-6 * max(map(abs, values))


def _order_of_metric(metric: str) -> tuple[int, str]:
    measure = metric.rpartition("/")[2]
    return MEASURES.index(measure) if measure in MEASURES else len(MEASURES), metric


def _title_of_metric(metric: str) -> str:
    of, _, measure = metric.removeprefix(PREFIX).rpartition("/")
    return f"{metric_words(measure)}: {of.replace('/', ', ')}" if of else metric_words(measure)


def _metric_picture(found: ExperimentData, metric: str) -> Picture:
    groups, title = found.curves(metric), printable_text(_title_of_metric(metric))
    alt = f"{title}, over steps, a colour for each variant; the means end at {text_of_last_means(groups)}"
    draw = partial(draw_curve_groups, groups, found.experiment.variants, title)
    return draw_picture(found.named(metric), alt, draw)
