"""Show what every variant cost, and what it reached for that."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kava_core.experiment.compared_value import BUDGETS, ComparedValue, price_in_flops
from kava_core.experiment.load_experiment import LoadedRun
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


def cost_section(data: ExperimentData) -> Section:
    """Return the means of every variant, and the metric against operations."""
    blocks: list[Block] = [_cost_table(data)]
    points = _cost_points(data)
    if points:
        blocks += [Gallery([_cost_picture(data, points)]), Paragraph(HOW)]
    else:
        blocks.append(Paragraph("These runs kept no record of what training cost, or have no result yet."))
    return Section("cost", "Results and cost", blocks)


def _cost_table(data: ExperimentData) -> PageTable:
    metric = metric_words(data.compare.metric)
    head = ["variant", "complete", "failed", f"{metric}, mean", "± SD"]
    head += ["student tokens", "teacher tokens", "FLOPs"]
    if data.compare.metric == STEPS_TO_TARGET:
        head.append("FLOPs to the target")
    head += ["seconds", "peak memory, GiB", "each seed"]
    rows = [[printable_text(name), *_cells_of_variant(data, name)] for name in data.experiment.variants]
    return PageTable("Means of complete runs", head, rows, texts=(len(head) - 1,))


def _cells_of_variant(data: ExperimentData, variant: str) -> Iterator[str]:
    runs = data.experiment.runs_of_variant(variant).values()
    complete = data.complete_runs(variant)
    values_by_seed = data.compared_values(variant)
    compared = list(values_by_seed.values())
    values = [each.value for each in compared]
    all_have_values = len(values) == len(complete)
    is_bound = any(each.censored_at is not None for each in compared)
    yield f"{len(complete)} of {len(runs)}"
    yield str(sum(run.state == "failed" for run in runs))
    bound = "> " if is_bound else ""
    yield bound + amount_text(mean(values)) if values and all_have_values else "–"
    yield number_text(stdev(values)) if len(values) > 1 and all_have_values and not is_bound else "–"
    for budget in BUDGETS:
        yield amount_text(mean_if_all_known(run.compute.get(budget) for run in complete.values()))
    if data.compare.metric == STEPS_TO_TARGET:
        spent = [_flops_to_target(run, values_by_seed.get(seed)) for seed, run in complete.items()]
        yield bound + amount_text(mean_if_all_known(spent))
    yield amount_text(mean_if_all_known(run.compute.get("seconds") for run in complete.values()))
    yield number_text(mean_if_all_known(_memory_in_gib(run) for run in complete.values()))
    yield ", ".join(map(value_text, compared)) or "–"


def value_text(compared: ComparedValue) -> str:
    """Return a run's number; ``> 600`` for a target that was not met within 600 steps."""
    if compared.censored_at is not None:
        return f"> {amount_text(compared.censored_at)}"
    return amount_text(compared.value)


def _flops_to_target(run: LoadedRun, steps: ComparedValue | None) -> float | None:
    price = price_in_flops(run)
    if steps is None or price is None:
        return None
    before_first_step, each_step = price
    return before_first_step + each_step * steps.value


def _memory_in_gib(run: LoadedRun) -> float | None:
    peak = run.compute.get("peak_memory")
    return None if peak is None else peak / GIB


Points = dict[str, list[tuple[float, float]]]
"""By variant: operations and metric of every run."""


def _cost_points(data: ExperimentData) -> Points:
    points: Points = {}
    for variant in data.experiment.variants:
        runs = data.complete_runs(variant)
        for seed, compared in data.compared_values(variant).items():
            flops = runs[seed].compute.get("flops")
            if flops is not None and math.isfinite(flops):
                points.setdefault(variant, []).append((float(flops), compared.value))
    return points


def _cost_picture(data: ExperimentData, points: Points) -> Picture:
    metric = metric_words(data.compare.metric)
    means = []
    for variant, pairs in points.items():
        flops, values = zip(*pairs, strict=True)
        means.append(f"{variant} {mean(flops):.3g} FLOPs, {mean(values):.3g}")
    alt = f"{metric} against FLOPs, a dot for each run; means: {'; '.join(means)}"
    draw = partial(_draw_points, points, data.experiment.variants, metric)
    return draw_picture(data.unique_name("cost"), alt, draw, wide=True)


def _draw_points(points: Points, variants: list[str], metric: str, style: Style) -> Figure:
    figure, axis = figure_with_axes(points)
    looks = looks_of_names(variants, style)
    for variant, pairs in points.items():
        look = looks[variant]
        flops, values = zip(*pairs, strict=True)
        axis.plot(flops, values, look.marker, color=look.colour, markersize=5, alpha=0.5)
        large: Any = {"color": look.colour, "markersize": 12, "markeredgecolor": style.paper, "zorder": 3}
        axis.plot(mean(flops), mean(values), look.marker, **large)
    axis.xaxis.set_major_locator(MaxNLocator(5))
    if needs_log_axis([flops for pairs in points.values() for flops, _ in pairs], times=10):
        axis.set_xscale("log")
    axis.set(xlabel="FLOPs of training", ylabel=figure_text(metric), title="small: a run, large: the mean")
    marks = {"linestyle": "", "markersize": 8}
    add_legend(figure, [legend_entry(looks[name], marker=looks[name].marker, **marks) for name in points])
    return figure
