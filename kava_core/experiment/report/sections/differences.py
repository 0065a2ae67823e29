"""Show the declared comparisons: a forest plot and a table with every number of every test."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from kava_core.experiment.outcome import ratio_text
from kava_core.experiment.report.experiment_data import ExperimentData
from kava_core.experiment.report.figures.figure_style import WIDTH, Style, add_legend, draw_picture
from kava_core.experiment.report.pages.display_text import (
    figure_text,
    metric_words,
    printable_text,
    shorten,
)
from kava_core.experiment.report.pages.page_elements import (
    Block,
    Gallery,
    PageTable,
    Paragraph,
    Picture,
    Section,
)
from kava_core.experiment.report.sections.summary import TONES
from kava_core.experiment.result_tables import number_text
from kava_core.experiment.verdict import Verdict

TITLE = "Differences"
COLOURS = {"good": 2, "bad": 1, "open": 0, "warning": 4}
"""Places in the palette."""

HOW = (
    "A dot is a seed, and seeds are shared: both variants had the same data order, initial weights and "
    "dropout. The square is their mean, the thick bar the 95 % t-interval, the thin bar below it the "
    "bootstrap over seeds and examples. A bar that crosses 0 shows nothing. The sign-flip test decides: "
    "among all changes of sign of the differences, the share whose mean is at least as far from 0."
)


def differences_section(data: ExperimentData) -> Section:
    """Return every comparison that has a seed to go by."""
    if not data.verdicts:
        return Section("differences", TITLE, absent=printable_text(_reason_for_none(data)))
    blocks: list[Block] = [Paragraph(HOW), Gallery([_forest_picture(data)]), _tests_table(data)]
    return Section("differences", TITLE, blocks)


def _reason_for_none(data: ExperimentData) -> str:
    if data.why_no_verdicts:
        return f"No verdicts: {data.why_no_verdicts}."
    if not data.declared_pairs:
        return "No comparison was declared, so none is judged."
    return "No declared comparison has a seed that is complete in both variants."


def _forest_picture(data: ExperimentData) -> Picture:
    texts = [
        f"{v.first} − {v.second} {v.test.mean:+.3g} ({v.outcome}, {v.test.n} seeds)" for v in data.verdicts
    ]
    alt = f"Differences in {metric_words(data.compare.metric)} with intervals: {'; '.join(texts)}"
    return draw_picture(data.unique_name("differences"), alt, partial(_draw_forest, data), wide=True)


def _draw_forest(data: ExperimentData, style: Style) -> Figure:
    verdicts = data.verdicts
    figure = Figure(figsize=(WIDTH, 1.5 + 0.62 * len(verdicts)), layout="constrained")
    axis = figure.add_subplot()
    axis.axvline(0, color=style.ink, linewidth=1.2, zorder=1)
    for row, verdict in enumerate(verdicts):
        _draw_comparison(axis, row, verdict, style)
    axis.set_ylim(len(verdicts) - 0.4, -0.75)
    axis.set_yticks([])
    axis.xaxis.set_major_locator(MaxNLocator(6))
    axis.grid(axis="y", visible=False)
    axis.spines["left"].set_visible(False)
    metric = metric_words(data.compare.metric)
    better = "left" if data.compare.lower_is_better else "right"
    axis.set_xlabel(figure_text(f"{metric}, first − second ({better} of 0: the first is better)"))
    add_legend(figure, list(_legend_entries(style, verdicts)))
    return figure


def _draw_comparison(axis: Axes, row: int, verdict: Verdict, style: Style) -> None:
    colour = style.palette[COLOURS[TONES.get(verdict.outcome, "open")]]
    test, points = verdict.test, list(verdict.differences.values())
    title = f"{shorten(verdict.first, 18)} − {shorten(verdict.second, 18)}"
    background = {"facecolor": style.paper, "edgecolor": "none", "pad": 1.5}
    font: Any = {"transform": axis.get_yaxis_transform(), "fontsize": 9, "fontweight": "bold", "va": "bottom"}
    axis.text(0, row - 0.3, figure_text(title), bbox=background, **font)
    axis.text(1, row - 0.3, verdict.outcome, bbox=background, ha="right", color=colour, **font)
    if math.isfinite(test.low):
        axis.plot(
            [test.low, test.high], [row, row], color=colour, linewidth=5, alpha=0.55, solid_capstyle="butt"
        )
    if verdict.resampled is not None:
        axis.plot(verdict.resampled, [row + 0.2] * 2, color=colour, linewidth=1.8, solid_capstyle="butt")
    axis.plot(points, [row] * len(points), "o", color=style.ink, markersize=4, alpha=0.75, zorder=3)
    axis.plot(test.mean, row, "s", color=colour, markeredgecolor=style.paper, markersize=8, zorder=4)


def _legend_entries(style: Style, verdicts: Sequence[Verdict]) -> Iterator[Line2D]:
    yield Line2D([], [], marker="s", color=style.ink, linestyle="", label="mean")
    yield Line2D([], [], marker="o", color=style.ink, markersize=4, linestyle="", label="a seed")
    yield Line2D([], [], color=style.ink, alpha=0.55, linewidth=5, label="95 % t-interval")
    if any(verdict.resampled is not None for verdict in verdicts):
        yield Line2D([], [], color=style.ink, linewidth=1.8, label="95 % bootstrap")


HEAD = (
    *(
        "first",
        "second",
        "verdict",
        "seeds",
        "mean of first",
        "mean of second",
        "difference",
        "95 % t-interval",
    ),
    *("sign-flip p", "Holm", "Bonferroni", "t-test p"),
    *("effect d", "detectable", "bootstrap", "budgets, first / second"),
)


def _tests_table(data: ExperimentData) -> PageTable:
    family = data.verdicts[0].family
    caption = (
        f"Exact sign-flip tests over shared seeds, corrected over the family of {family}, t-tests beside; "
        f"metric: {metric_words(data.compare.metric)}"
    )
    return PageTable(
        caption,
        HEAD,
        [list(_cells_of_verdict(verdict)) for verdict in data.verdicts],
        left=3,
        texts=(len(HEAD) - 1,),
    )


def _cells_of_verdict(verdict: Verdict) -> Iterator[str]:
    test = verdict.test
    yield from (printable_text(verdict.first), printable_text(verdict.second), verdict.outcome, str(test.n))
    yield from verdict.mean_texts()
    yield f"{test.mean:+.3g}"
    yield interval_text((test.low, test.high))
    yield from map(number_text, (test.p, verdict.holm, verdict.bonferroni, test.t_p))
    yield from map(number_text, (test.effect, test.detectable))
    yield interval_text(verdict.resampled)
    yield (
        ", ".join(f"{metric_words(name)} {ratio_text(ratio)}" for name, ratio in verdict.budgets.items())
        or "–"
    )


def interval_text(ends: tuple[float, float] | None) -> str:
    """Return an interval as ``−0.1 … +0.2``, a dash if it is unknown."""
    if ends is None or not all(map(math.isfinite, ends)):
        return "–"
    return f"{ends[0]:+.3g} … {ends[1]:+.3g}"
