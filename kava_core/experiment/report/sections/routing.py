"""Draw how much every teacher counted, over time and by task."""

from __future__ import annotations

from functools import partial

from matplotlib.figure import Figure

from kava_core.experiment.report.experiment_data import Curve, ExperimentData
from kava_core.experiment.report.figures.figure_style import (
    WIDTH,
    Style,
    add_legend,
    draw_picture,
    legend_entry,
    legend_height,
    looks_of_names,
)
from kava_core.experiment.report.figures.line_charts import (
    MOST_FIGURES,
    RunCurves,
    draw_curves,
    drawn_values,
    mark_steps,
    note_on_omitted,
)
from kava_core.experiment.report.pages.display_text import figure_text, printable_text, shorten
from kava_core.experiment.report.pages.page_elements import Block, Gallery, Paragraph, Picture, Section

PREFIX = "weight/"
TITLE = "Routing weights"
ALL = "all examples"
MOST_TASKS = 6
LEAST_CHANGE = 1e-4
"""Weights that change less than this are named in a sentence, not drawn."""

Weights = dict[str, dict[str, RunCurves]]
"""Task → teacher → curves."""


def routing_section(data: ExperimentData) -> Section:
    """Return a figure for every variant whose weights move, and a sentence for those that keep theirs."""
    moving: dict[str, Weights] = {}
    constant: dict[str, Weights] = {}
    for variant in data.experiment.variants:
        weights = _weights_of_variant(data, variant)
        if weights:
            (moving if _weights_move(weights) else constant)[variant] = weights
    if not moving and not constant:
        return Section("routing", TITLE, absent="No run has written teachers' weights.")
    blocks: list[Block] = []
    if moving:
        pictures = [_routing_picture(data, *item) for item in list(moving.items())[:MOST_FIGURES]]
        how = (
            "The share of each teacher in the fused target: a colour for each teacher, a panel for each task."
        )
        blocks += [Paragraph(how), Gallery(pictures), *note_on_omitted(len(moving))]
    blocks += [Paragraph(text) for text in _texts_on_constant(constant)]
    return Section("routing", TITLE, blocks)


def _weights_of_variant(data: ExperimentData, variant: str) -> Weights:
    weights: Weights = {}
    for metric in data.metric_names(PREFIX):
        curves = data.curves_by_variant(metric).get(variant)
        if curves:
            teacher, _, task = metric.removeprefix(PREFIX).partition("@")
            weights.setdefault(task or ALL, {})[teacher] = curves
    return dict(sorted(weights.items(), key=lambda item: item[0] != ALL))


def _weights_move(weights: Weights) -> bool:
    if len(weights) > 1:
        return True
    for curves_by_teacher in weights.values():
        for curves in curves_by_teacher.values():
            values = drawn_values({"": curves})
            if values and max(values) - min(values) > LEAST_CHANGE:
                return True
    return False


def _last_value(curve: Curve) -> float:
    return curve[-1][1]


def _texts_on_constant(variants: dict[str, Weights]) -> list[str]:
    """Return a sentence for all variants with the same weights."""
    variants_by_weights: dict[str, list[str]] = {}
    for variant, weights in variants.items():
        (curves_by_teacher,) = weights.values()
        shares = []
        for teacher, curves in curves_by_teacher.items():
            _, first_curve = curves[0]
            shares.append(f"{teacher} {_last_value(first_curve):.3g}")
        variants_by_weights.setdefault(", ".join(shares), []).append(variant)
    sentences = []
    for shares_text, names in variants_by_weights.items():
        sentences.append(f"Weights that never change: {shares_text} ({', '.join(names)}).")
    return [printable_text(sentence) for sentence in sentences]


def _routing_picture(data: ExperimentData, variant: str, weights: Weights) -> Picture:
    tasks = []
    for task, curves_by_teacher in weights.items():
        shares = []
        for teacher, curves in curves_by_teacher.items():
            _, last_curve = curves[-1]
            shares.append(f"{teacher} {_last_value(last_curve):.2g}")
        tasks.append(f"{task}: {', '.join(shares)}")
    alt = f"Teachers' weights of {variant} over steps; at the end of one seed, {'; '.join(tasks)}"
    draw = partial(_draw_weights, variant, weights)
    return draw_picture(data.unique_name("routing", variant), alt, draw)


def _draw_weights(variant: str, weights: Weights, style: Style) -> Figure:
    tasks = list(weights)[:MOST_TASKS]
    teachers = list(
        dict.fromkeys(name for curves_by_teacher in weights.values() for name in curves_by_teacher)
    )
    height = 0.9 + 1.9 * len(tasks) + legend_height(teachers)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    looks = looks_of_names(teachers, style)
    panels = figure.subplots(len(tasks), 1, squeeze=False, sharex=True)[:, 0]
    for axis, task in zip(panels, tasks, strict=True):
        for name, curves in weights[task].items():
            draw_curves(axis, looks[name], curves)
        axis.set(ylim=(-0.03, 1.03), ylabel="weight")
        axis.set_title(figure_text(task), fontsize=9.5, fontweight="normal")
    panels[-1].set_xlabel("step")
    mark_steps(panels[-1])
    figure.suptitle(figure_text(shorten(variant)), fontsize=11, fontweight="bold", x=0.02, ha="left")
    add_legend(figure, [legend_entry(looks[name]) for name in teachers])
    return figure
