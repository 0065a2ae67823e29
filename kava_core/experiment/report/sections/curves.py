"""Learning curves: the metric and the KV losses against steps."""

from __future__ import annotations

from functools import partial

from kava_core.experiment.report.experiment_data import ExperimentData
from kava_core.experiment.report.figures.figure_style import draw_picture
from kava_core.experiment.report.figures.line_charts import (
    MOST_FIGURES,
    draw_curve_groups,
    note_on_omitted,
    text_of_last_means,
)
from kava_core.experiment.report.pages.display_text import metric_words
from kava_core.experiment.report.pages.page_elements import Block, Gallery, Paragraph, Picture, Section

HOW = (
    "Thin: a seed each. Thick: the mean of a variant's complete runs, at the steps that all of them have "
    "evaluated. A metric that gets better while its KV loss falls is what distillation promises; a KV loss "
    "that falls alone is not."
)


def curves_section(found: ExperimentData) -> Section:
    """One figure for each metric, the compared one first, then cross-entropy and every KV loss."""
    asked = dict.fromkeys([found.followed, "exact_match", "ce", *found.kv_terms])
    metrics = [metric for metric in asked if found.curves(metric)]
    if not metrics:
        return Section("curves", "Learning curves", absent="No run has been evaluated yet.")
    pictures = [_curve_picture(found, metric) for metric in metrics[:MOST_FIGURES]]
    blocks: list[Block] = [Paragraph(HOW), Gallery(pictures)]
    if not found.kv_terms:
        blocks.append(Paragraph("No variant has a KV loss among its evaluations."))
    return Section("curves", "Learning curves", [*blocks, *note_on_omitted(len(metrics))])


def _curve_picture(found: ExperimentData, metric: str) -> Picture:
    groups = found.curves(metric)
    kind = " (KV loss)" if metric in found.kv_terms else ""
    title = "cross-entropy, nats a token" if metric == "ce" else metric_words(metric) + kind
    alt = f"{title} against steps, a colour for each variant; the means end at {text_of_last_means(groups)}"
    draw = partial(draw_curve_groups, groups, found.experiment.variants, title)
    return draw_picture(found.named("curve", metric), alt, draw)
