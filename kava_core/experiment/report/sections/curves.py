"""Learning curves: the metric and the KV losses against steps."""

from __future__ import annotations

from functools import partial

from kava_core.experiment.report.experiment_data import Found
from kava_core.experiment.report.figures.drawing import picture
from kava_core.experiment.report.figures.lines import MOST, draw_groups, last_means, left_out
from kava_core.experiment.report.pages.blocks import Block, Gallery, Paragraph, Picture, Section
from kava_core.experiment.report.pages.text import words

HOW = (
    "Thin: a seed each. Thick: the mean of a variant's complete runs, at the steps that all of them have "
    "evaluated. A metric that gets better while its KV loss falls is what distillation promises; a KV loss "
    "that falls alone is not."
)


def curves(found: Found) -> Section:
    """One figure for each metric, the compared one first, then cross-entropy and every KV loss."""
    asked = dict.fromkeys([found.followed, "exact_match", "ce", *found.kv_terms])
    metrics = [metric for metric in asked if found.curves(metric)]
    if not metrics:
        return Section("curves", "Learning curves", absent="No run has been evaluated yet.")
    pictures = [_picture(found, metric) for metric in metrics[:MOST]]
    blocks: list[Block] = [Paragraph(HOW), Gallery(pictures)]
    if not found.kv_terms:
        blocks.append(Paragraph("No variant has a KV loss among its evaluations."))
    return Section("curves", "Learning curves", [*blocks, *left_out(len(metrics))])


def _picture(found: Found, metric: str) -> Picture:
    groups = found.curves(metric)
    kind = " (KV loss)" if metric in found.kv_terms else ""
    title = "cross-entropy, nats a token" if metric == "ce" else words(metric) + kind
    alt = f"{title} against steps, a colour for each variant; the means end at {last_means(groups)}"
    draw = partial(draw_groups, groups, found.experiment.variants, title)
    return picture(found.named("curve", metric), alt, draw)
