"""Draw learning curves: the metric and the KV losses against steps."""

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


def curves_section(data: ExperimentData) -> Section:
    """Return a figure for each metric, the compared one first, then cross-entropy and every KV loss."""
    wanted = dict.fromkeys([data.followed_metric, "exact_match", "ce", *data.kv_loss_metrics])
    metrics = [metric for metric in wanted if data.curves_by_variant(metric)]
    if not metrics:
        return Section("curves", "Learning curves", absent="No run has been evaluated yet.")
    pictures = [_curve_picture(data, metric) for metric in metrics[:MOST_FIGURES]]
    blocks: list[Block] = [Paragraph(HOW), Gallery(pictures)]
    if not data.kv_loss_metrics:
        blocks.append(Paragraph("No variant has a KV loss among its evaluations."))
    return Section("curves", "Learning curves", [*blocks, *note_on_omitted(len(metrics))])


def _curve_picture(data: ExperimentData, metric: str) -> Picture:
    groups = data.curves_by_variant(metric)
    kind = " (KV loss)" if metric in data.kv_loss_metrics else ""
    title = "cross-entropy, nats a token" if metric == "ce" else metric_words(metric) + kind
    alt = f"{title} against steps, a colour for each variant; the means end at {text_of_last_means(groups)}"
    draw = partial(draw_curve_groups, groups, data.experiment.variants, title)
    return draw_picture(data.unique_name("curve", metric), alt, draw)
