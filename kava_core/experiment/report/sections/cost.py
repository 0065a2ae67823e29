"""What every variant cost, and what it reached for that."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kava_core.experiment.gather import BUDGETS, Run, flops_price
from kava_core.experiment.report.experiment_data import Found
from kava_core.experiment.report.figures.drawing import (
    Style,
    axes,
    handle,
    legend,
    looks,
    picture,
    spread_wide,
)
from kava_core.experiment.report.pages.blocks import Block, Gallery, Paragraph, Picture, Section, Table
from kava_core.experiment.report.pages.text import amount, plain, words, written
from kava_core.experiment.tables import average, number
from kava_core.specfile.sections.compare import STEPS_TO_TARGET

GIB = 2**30

HOW = (
    "Training alone is counted, without evaluation, pretraining and calibration. FLOPs are computed from the "
    "shapes that were read, padding included; seconds and memory are this machine's. FLOPs to the target are "
    "those of the steps until it was reached: what is faster in steps may be slower in compute."
)


def cost(found: Found) -> Section:
    """Means of every variant, and the metric against operations."""
    blocks: list[Block] = [_table(found)]
    points = _points(found)
    if points:
        blocks += [Gallery([_picture(found, points)]), Paragraph(HOW)]
    else:
        blocks.append(Paragraph("These runs kept no record of what training cost, or have no result yet."))
    return Section("cost", "Results and cost", blocks)


def _table(found: Found) -> Table:
    metric = words(found.compare.metric)
    head = ["variant", "complete", "failed", f"{metric}, mean", "± SD", "student tokens", "teacher tokens"]
    head += [
        "FLOPs",
        *(["FLOPs to the target"] if found.compare.metric == STEPS_TO_TARGET else []),
        "seconds",
        "peak memory, GiB",
        "each seed",
    ]
    rows = [[plain(name), *_cells(found, name)] for name in found.experiment.variants]
    return Table("Means of complete runs", head, rows, texts=(len(head) - 1,))


def _cells(found: Found, variant: str) -> Iterator[str]:
    runs, those = found.experiment.of(variant).values(), found.complete(variant)
    done = list(those.values())
    by_seed = found.values(variant)
    values = list(by_seed.values())
    whole = len(values) == len(done)
    yield f"{len(done)} of {len(runs)}"
    yield str(sum(run.state == "failed" for run in runs))
    yield amount(mean(values)) if values and whole else "–"
    yield number(stdev(values)) if len(values) > 1 and whole else "–"
    for budget in BUDGETS:
        yield amount(average(run.compute.get(budget) for run in done))
    if found.compare.metric == STEPS_TO_TARGET:
        spent = [_to_target(run, by_seed.get(seed)) for seed, run in those.items()]
        yield amount(average(spent))
    yield amount(average(run.compute.get("seconds") for run in done))
    yield number(average(_memory(run) for run in done))
    yield ", ".join(map(amount, values)) or "–"


def _to_target(run: Run, steps: float | None) -> float | None:
    price = flops_price(run)
    return None if steps is None or price is None else price[0] + price[1] * steps


def _memory(run: Run) -> float | None:
    found = run.compute.get("peak_memory")
    return None if found is None else found / GIB


Points = dict[str, list[tuple[float, float]]]
"""By variant: operations and metric of every run."""


def _points(found: Found) -> Points:
    points: Points = {}
    for variant in found.experiment.variants:
        runs = found.complete(variant)
        pairs = [(runs[seed].compute.get("flops"), value) for seed, value in found.values(variant).items()]
        known = [
            (float(flops), value) for flops, value in pairs if flops is not None and math.isfinite(flops)
        ]
        points |= {variant: known} if known else {}
    return points


def _picture(found: Found, points: Points) -> Picture:
    metric = words(found.compare.metric)
    told = "; ".join(
        f"{name} {mean(x for x, _ in those):.3g} FLOPs, {mean(y for _, y in those):.3g}"
        for name, those in points.items()
    )
    alt = f"{metric} against FLOPs, a dot for each run; means: {told}"
    draw = partial(_draw, points, found.experiment.variants, metric)
    return picture(found.named("cost"), alt, draw, wide=True)


def _draw(points: Points, variants: list[str], metric: str, style: Style) -> Figure:
    figure, axis = axes(points)
    seen = looks(variants, style)
    for name, those in points.items():
        look = seen[name]
        xs, ys = zip(*those, strict=True)
        axis.plot(xs, ys, look.marker, color=look.colour, markersize=5, alpha=0.5)
        big: Any = {"color": look.colour, "markersize": 12, "markeredgecolor": style.paper, "zorder": 3}
        axis.plot(mean(xs), mean(ys), look.marker, **big)
    axis.xaxis.set_major_locator(MaxNLocator(5))
    if spread_wide([x for those in points.values() for x, _ in those], times=10):
        axis.set_xscale("log")
    axis.set(xlabel="FLOPs of training", ylabel=written(metric), title="small: a run, large: the mean")
    marks = {"linestyle": "", "markersize": 8}
    legend(figure, [handle(seen[name], marker=seen[name].marker, **marks) for name in points])
    return figure
