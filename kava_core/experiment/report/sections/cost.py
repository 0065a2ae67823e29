"""What every variant cost, and what it reached for that."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kava_core.experiment.compared_value import BUDGETS, price_in_flops
from kava_core.experiment.load_experiment import RunResults
from kava_core.experiment.report.experiment_data import ExperimentData
from kava_core.experiment.report.figures.figure_style import (
    Style,
    add_legend,
    draw_picture,
    figure_with_axes,
    legend_entry,
    looks_of_names,
    needs_log_axis,
)
from kava_core.experiment.report.pages.display_text import (
    amount_text,
    figure_text,
    metric_words,
    printable_text,
)
from kava_core.experiment.report.pages.page_elements import (
    Block,
    Gallery,
    PageTable,
    Paragraph,
    Picture,
    Section,
)
from kava_core.experiment.result_tables import mean_if_all_known, number_text
from kava_core.specfile.sections.compare import STEPS_TO_TARGET

GIB = 2**30

HOW = (
    "Training alone is counted, without evaluation, pretraining and calibration. FLOPs are computed from the "
    "shapes that were read, padding included; seconds and memory are this machine's. FLOPs to the target are "
    "those of the steps until it was reached: what is faster in steps may be slower in compute."
)


def cost_section(found: ExperimentData) -> Section:
    """Means of every variant, and the metric against operations."""
    blocks: list[Block] = [_cost_table(found)]
    points = _cost_points(found)
    if points:
        blocks += [Gallery([_cost_picture(found, points)]), Paragraph(HOW)]
    else:
        blocks.append(Paragraph("These runs kept no record of what training cost, or have no result yet."))
    return Section("cost", "Results and cost", blocks)


def _cost_table(found: ExperimentData) -> PageTable:
    metric = metric_words(found.compare.metric)
    head = ["variant", "complete", "failed", f"{metric}, mean", "± SD", "student tokens", "teacher tokens"]
    head += [
        "FLOPs",
        *(["FLOPs to the target"] if found.compare.metric == STEPS_TO_TARGET else []),
        "seconds",
        "peak memory, GiB",
        "each seed",
    ]
    rows = [[printable_text(name), *_cells_of_variant(found, name)] for name in found.experiment.variants]
    return PageTable("Means of complete runs", head, rows, texts=(len(head) - 1,))


def _cells_of_variant(found: ExperimentData, variant: str) -> Iterator[str]:
    runs, those = found.experiment.runs_of_variant(variant).values(), found.complete(variant)
    done = list(those.values())
    by_seed = found.values(variant)
    values = list(by_seed.values())
    whole = len(values) == len(done)
    yield f"{len(done)} of {len(runs)}"
    yield str(sum(run.state == "failed" for run in runs))
    yield amount_text(mean(values)) if values and whole else "–"
    yield number_text(stdev(values)) if len(values) > 1 and whole else "–"
    for budget in BUDGETS:
        yield amount_text(mean_if_all_known(run.compute.get(budget) for run in done))
    if found.compare.metric == STEPS_TO_TARGET:
        spent = [_flops_to_target(run, by_seed.get(seed)) for seed, run in those.items()]
        yield amount_text(mean_if_all_known(spent))
    yield amount_text(mean_if_all_known(run.compute.get("seconds") for run in done))
    yield number_text(mean_if_all_known(_memory_in_gib(run) for run in done))
    yield ", ".join(map(amount_text, values)) or "–"


def _flops_to_target(run: RunResults, steps: float | None) -> float | None:
    price = price_in_flops(run)
    return None if steps is None or price is None else price[0] + price[1] * steps


def _memory_in_gib(run: RunResults) -> float | None:
    found = run.compute.get("peak_memory")
    return None if found is None else found / GIB


Points = dict[str, list[tuple[float, float]]]
"""By variant: operations and metric of every run."""


def _cost_points(found: ExperimentData) -> Points:
    points: Points = {}
    for variant in found.experiment.variants:
        runs = found.complete(variant)
        pairs = [(runs[seed].compute.get("flops"), value) for seed, value in found.values(variant).items()]
        known = [
            (float(flops), value) for flops, value in pairs if flops is not None and math.isfinite(flops)
        ]
        points |= {variant: known} if known else {}
    return points


def _cost_picture(found: ExperimentData, points: Points) -> Picture:
    metric = metric_words(found.compare.metric)
    told = "; ".join(
        f"{name} {mean(x for x, _ in those):.3g} FLOPs, {mean(y for _, y in those):.3g}"
        for name, those in points.items()
    )
    alt = f"{metric} against FLOPs, a dot for each run; means: {told}"
    draw = partial(_draw_points, points, found.experiment.variants, metric)
    return draw_picture(found.named("cost"), alt, draw, wide=True)


def _draw_points(points: Points, variants: list[str], metric: str, style: Style) -> Figure:
    figure, axis = figure_with_axes(points)
    seen = looks_of_names(variants, style)
    for name, those in points.items():
        look = seen[name]
        xs, ys = zip(*those, strict=True)
        axis.plot(xs, ys, look.marker, color=look.colour, markersize=5, alpha=0.5)
        big: Any = {"color": look.colour, "markersize": 12, "markeredgecolor": style.paper, "zorder": 3}
        axis.plot(mean(xs), mean(ys), look.marker, **big)
    axis.xaxis.set_major_locator(MaxNLocator(5))
    if needs_log_axis([x for those in points.values() for x, _ in those], times=10):
        axis.set_xscale("log")
    axis.set(xlabel="FLOPs of training", ylabel=figure_text(metric), title="small: a run, large: the mean")
    marks = {"linestyle": "", "markersize": 8}
    add_legend(figure, [legend_entry(seen[name], marker=seen[name].marker, **marks) for name in points])
    return figure
