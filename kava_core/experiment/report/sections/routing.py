"""How much every teacher counted, over time and by task."""

from __future__ import annotations

from functools import partial

from matplotlib.figure import Figure

from kava_core.experiment.report.experiment_data import ExperimentData
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
MOVES = 1e-4
"""Weights that change less than this are told, not drawn."""

Weights = dict[str, dict[str, RunCurves]]
"""Task → teacher → curves."""


def routing_section(found: ExperimentData) -> Section:
    """A figure for every variant whose weights move; a sentence for those that keep theirs."""
    variants = {
        name: weights for name in found.experiment.variants if (weights := _weights_of_variant(found, name))
    }
    if not variants:
        return Section("routing", TITLE, absent="No run has written teachers' weights.")
    moving = {name: weights for name, weights in variants.items() if _weights_move(weights)}
    blocks: list[Block] = []
    if moving:
        pictures = [_routing_picture(found, *item) for item in list(moving.items())[:MOST_FIGURES]]
        how = (
            "The share of each teacher in the fused target: a colour for each teacher, a panel for each task."
        )
        blocks += [Paragraph(how), Gallery(pictures), *note_on_omitted(len(moving))]
    kept = {name: weights for name, weights in variants.items() if name not in moving}
    blocks += [Paragraph(text) for text in _texts_on_constant(kept)]
    return Section("routing", TITLE, blocks)


def _weights_of_variant(found: ExperimentData, variant: str) -> Weights:
    weights: Weights = {}
    for metric in found.metrics(PREFIX):
        curves = found.curves(metric).get(variant)
        if curves:
            teacher, _, task = metric.removeprefix(PREFIX).partition("@")
            weights.setdefault(task or ALL, {})[teacher] = curves
    return dict(sorted(weights.items(), key=lambda item: item[0] != ALL))


def _weights_move(weights: Weights) -> bool:
    return (
        any(
            max(values) - min(values) > MOVES
            for of_task in weights.values()
            for curves in of_task.values()
            if (values := drawn_values({"": curves}))
        )
        or len(weights) > 1
    )


def _texts_on_constant(variants: dict[str, Weights]) -> list[str]:
    """A sentence for all variants with the same weights."""
    same: dict[str, list[str]] = {}
    for variant, weights in variants.items():
        (teachers,) = weights.values()
        told = ", ".join(f"{name} {curves[0][1][-1][1]:.3g}" for name, curves in teachers.items())
        same.setdefault(told, []).append(variant)
    return [
        printable_text(f"Weights that never change: {told} ({', '.join(names)}).")
        for told, names in same.items()
    ]


def _routing_picture(found: ExperimentData, variant: str, weights: Weights) -> Picture:
    told = "; ".join(
        f"{task}: " + ", ".join(f"{name} {curves[-1][1][-1][1]:.2g}" for name, curves in of_task.items())
        for task, of_task in weights.items()
    )
    alt = f"Teachers' weights of {variant} over steps; at the end of one seed, {told}"
    draw = partial(_draw_weights, variant, weights)
    return draw_picture(found.named("routing", variant), alt, draw)


def _draw_weights(variant: str, weights: Weights, style: Style) -> Figure:
    tasks = list(weights)[:MOST_TASKS]
    teachers = list(dict.fromkeys(name for of_task in weights.values() for name in of_task))
    height = 0.9 + 1.9 * len(tasks) + legend_height(teachers)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    seen = looks_of_names(teachers, style)
    panels = figure.subplots(len(tasks), 1, squeeze=False, sharex=True)[:, 0]
    for axis, task in zip(panels, tasks, strict=True):
        for name, curves in weights[task].items():
            draw_curves(axis, seen[name], curves)
        axis.set(ylim=(-0.03, 1.03), ylabel="weight")
        axis.set_title(figure_text(task), fontsize=9.5, fontweight="normal")
    panels[-1].set_xlabel("step")
    mark_steps(panels[-1])
    figure.suptitle(figure_text(shorten(variant)), fontsize=11, fontweight="bold", x=0.02, ha="left")
    add_legend(figure, [legend_entry(seen[name]) for name in teachers])
    return figure
