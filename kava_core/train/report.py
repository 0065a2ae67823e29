"""What a person sees at the end of ``kava train``: a table of all variants and seeds, and one plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.table import Table

from kava_core.train.callbacks import read_metrics
from kava_core.train.run import Result


def show(results: Sequence[Result]) -> None:
    """Print the table, save the plot beside the run directories, say where everything is."""
    console = Console()
    console.print(table(results))
    folder = results[0].folder.parent
    picture = folder / "curves.png"
    if plot(results, picture):
        console.print(f"curves: {picture}", soft_wrap=True)
    else:
        console.print("no plot: matplotlib is not installed (pip install 'kava[plots]')")
    console.print(f"runs:   {folder}", soft_wrap=True)


def table(results: Sequence[Result]) -> Table:
    """One row for every run, then the mean of every variant with more than one seed."""
    shown = Table(title="validation at the last step")
    columns = _columns(results)
    for name in ("variant", "seed", *columns):
        shown.add_column(name, justify="left" if name == "variant" else "right")
    for variant in dict.fromkeys(result.variant for result in results):
        runs = [result for result in results if result.variant == variant]
        for result in runs:
            shown.add_row(variant, str(result.seed), *(_cell(result.results.get(name)) for name in columns))
        if len(runs) > 1:
            means = [_mean([run.results.get(name) for run in runs]) for name in columns]
            shown.add_row(variant, f"mean of {len(runs)}", *map(_cell, means), style="bold", end_section=True)
    return shown


def _columns(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(name for result in results for name in result.results))


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean, or None where a run lacks the metric: a missing number is never a zero."""
    there = [value for value in values if value is not None]
    return mean(there) if len(there) == len(values) else None


def _cell(value: float | None) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


PANELS = (
    ("eval_exact_match", "exact match"),
    ("eval_ce", "validation cross-entropy (nats/token)"),
    ("kv", "KV loss (validation)"),
)


def plot(results: Sequence[Result], path: Path) -> bool:
    """Accuracy and losses against steps, a line for every seed, a colour for every variant.

    Returns False where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = figure.subplots(1, len(PANELS))
    variants = list(dict.fromkeys(result.variant for result in results))
    for result in results:
        colour = f"C{variants.index(result.variant)}"
        label = result.variant if result.seed == _first_seed(results, result.variant) else None
        for axis, (name, _) in zip(axes, PANELS, strict=True):
            for steps, values in _curves(result, name):
                axis.plot(steps, values, color=colour, alpha=0.8, marker=".", label=label)
    for axis, (_, title) in zip(axes, PANELS, strict=True):
        axis.set(xlabel="step", title=title)
        axis.grid(alpha=0.3)
    axes[0].set_ylim(-0.03, 1.03)
    axes[1].set_yscale("log")
    axes[0].legend(title=f"{len(results)} runs, a line each")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return True


def _first_seed(results: Sequence[Result], variant: str) -> int:
    return next(result.seed for result in results if result.variant == variant)


NOT_KV = {"eval_ce", "eval_perplexity", "eval_exact_match"}


def _curves(result: Result, name: str) -> list[tuple[list[int], list[float]]]:
    """Steps and values of a metric; ``kv`` stands for every KV term."""
    lines = [line for line in read_metrics(result.folder / "metrics.jsonl") if "eval_ce" in line]
    names = (
        {key for line in lines for key in line if key.startswith("eval_")} - NOT_KV
        if name == "kv"
        else {name}
    )
    found = [[(line["step"], line[key]) for line in lines if key in line] for key in sorted(names)]
    return [([step for step, _ in curve], [value for _, value in curve]) for curve in found if curve]
