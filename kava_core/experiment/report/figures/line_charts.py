"""Draw curves of several runs in one figure: every seed thin, the mean thick."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kava_core.experiment.load_experiment import LoadedRun
from kava_core.experiment.report.experiment_data import Curve, mean_curve
from kava_core.experiment.report.figures.figure_style import (
    Look,
    Style,
    add_legend,
    figure_with_axes,
    legend_entry,
    looks_of_names,
    needs_log_axis,
)
from kava_core.experiment.report.pages.display_text import count_text, figure_text, printable_text, shorten
from kava_core.experiment.report.pages.page_elements import Block, Paragraph

RunCurves = Sequence[tuple[LoadedRun, Curve]]
"""Of several runs."""

MOST_FIGURES = 12
"""Figures of one section."""


def draw_curves(axis: Axes, look: Look, curves: RunCurves) -> None:
    """Draw one group of runs in one look."""
    for _, curve in curves:
        mark = look.marker if len(curve) == 1 else None
        style = {"color": look.colour, "linestyle": look.dash, "linewidth": 0.9, "alpha": 0.45}
        axis.plot(*zip(*curve, strict=True), marker=mark, **style)
    mean = mean_curve(curves)
    if mean:
        size = 5 if len(mean) < 30 else 0
        style = {"color": look.colour, "linestyle": look.dash, "linewidth": 2.6, "zorder": 3}
        axis.plot(*zip(*mean, strict=True), marker=look.marker, markersize=size, **style)


def draw_curve_groups(
    groups: Mapping[str, RunCurves], names: Sequence[str], title: str, style: Style
) -> Figure:
    """Return a figure with a look for each of ``names``, of which ``groups`` has some."""
    figure, axis = figure_with_axes(groups)
    looks = looks_of_names(names, style)
    for name, curves in groups.items():
        draw_curves(axis, looks[name], curves)
    if needs_log_axis(drawn_values(groups)):
        axis.set_yscale("log")
    axis.set(xlabel="step", title=figure_text(shorten(title, 44)))
    mark_steps(axis)
    add_legend(figure, [legend_entry(looks[name]) for name in groups])
    return figure


def mark_steps(axis: Axes) -> None:
    """Mark whole steps below the axis; if there is one step, that one."""
    steps = {float(x) for line in axis.lines for x in np.ravel(line.get_xdata())}
    if len(steps) == 1:
        axis.set_xticks(list(steps))
    else:
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def drawn_values(groups: Mapping[str, RunCurves]) -> list[float]:
    """Return every value that is drawn."""
    return [value for curves in groups.values() for _, curve in curves for _, value in curve]


def text_of_last_means(groups: Mapping[str, RunCurves]) -> str:
    """Return where the means end, for an alternative text."""
    ends = []
    for name, curves in groups.items():
        mean = mean_curve(curves)
        ends.append(f"{name} {mean[-1][1]:.3g}" if mean else f"{name} unknown")
    return printable_text(", ".join(ends))


def note_on_omitted(count: int) -> list[Block]:
    """Return a paragraph on the figures that were left out, nothing if all of ``count`` are drawn."""
    omitted = count - MOST_FIGURES
    if omitted <= 0:
        return []
    return [Paragraph(f"{count_text(omitted, 'more figure')} not drawn; the numbers are in curves.csv.")]
