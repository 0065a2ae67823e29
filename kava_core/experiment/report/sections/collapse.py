"""The collapse monitor over time: whether the aligner, and not the student, made the KV loss fall."""

from __future__ import annotations

from functools import partial

from kava_core.experiment.report.experiment_data import Found
from kava_core.experiment.report.figures.drawing import picture
from kava_core.experiment.report.figures.lines import MOST, draw_groups, last_means, left_out, values_of
from kava_core.experiment.report.pages.blocks import Block, Gallery, Paragraph, Picture, Section
from kava_core.experiment.report.pages.text import plain, words

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


def collapse(found: Found) -> Section:
    """A figure for each measure of each teacher and part, a colour for each variant."""
    metrics = sorted(found.metrics(PREFIX), key=_order)
    drawn = [metric for metric in metrics if found.curves(metric)]
    if not drawn:
        return Section("collapse", TITLE, absent="No run has written measures of the collapse monitor.")
    still = [metric for metric in drawn if _is_still(found, metric)]
    moving = [metric for metric in drawn if metric not in still]
    blocks: list[Block] = [Paragraph(HOW)]
    if moving:
        blocks.append(Gallery([_picture(found, metric) for metric in moving[:MOST]]))
    blocks += left_out(len(moving))
    if still:
        told = "; ".join(f"{_title(metric)} {_values(found, metric)[0]:.4g}" for metric in still)
        blocks.append(Paragraph(plain(f"The same in every run at every step: {told}.")))
    return Section("collapse", TITLE, blocks)


def _values(found: Found, metric: str) -> list[float]:
    return values_of(found.curves(metric))


def _is_still(found: Found, metric: str) -> bool:
    """Whether all runs agree at several steps: a figure would show one flat line."""
    values, steps = _values(found, metric), found.curves(metric).values()
    several = any(len(curve) > 1 for curves in steps for _, curve in curves)
    return several and max(values) - min(values) <= 1e-6 * max(map(abs, values))


def _order(metric: str) -> tuple[int, str]:
    measure = metric.rpartition("/")[2]
    return MEASURES.index(measure) if measure in MEASURES else len(MEASURES), metric


def _title(metric: str) -> str:
    of, _, measure = metric.removeprefix(PREFIX).rpartition("/")
    return f"{words(measure)}: {of.replace('/', ', ')}" if of else words(measure)


def _picture(found: Found, metric: str) -> Picture:
    groups, title = found.curves(metric), plain(_title(metric))
    alt = f"{title}, over steps, a colour for each variant; the means end at {last_means(groups)}"
    draw = partial(draw_groups, groups, found.experiment.variants, title)
    return picture(found.named(metric), alt, draw)
