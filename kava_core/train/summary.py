"""What a person sees at the end of ``kava train``: a table of all variants and seeds, and one plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from kava_core.console import print_whole
from kava_core.distill.hidden_states import CODI, READING, STEPS
from kava_core.runs.folder import Folder
from kava_core.runs.metrics import read_metrics
from kava_core.train.run import Result
from kava_core.train.validation.collapse_monitor import PREFIX


def show(results: Sequence[Result]) -> None:
    """Print the table, save the plot beside the run directories, say where everything is."""
    console = Console()
    print_whole(table(results), console)
    folder = results[0].folder.parent
    picture = folder / "curves.png"
    if plot(results, picture):
        console.print(f"curves: {picture}", soft_wrap=True)
    else:
        console.print("no plot: matplotlib is not installed (pip install 'kava[plots]')")
    console.print(f"runs:   {folder}", soft_wrap=True)
    for line in skills(results):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    for line in warnings(results):
        console.print(line, style="yellow", soft_wrap=True)


def skills(results: Sequence[Result]) -> list[str]:
    """A line for every model that was trained on the spot: a student is not better than what it is shown."""
    models = [Folder(one.folder).record().get("models", {}) for one in results]
    found = {
        f"{name}: trained on the spot; validation {_skill(facts['results'])}": None
        for one in models
        for name, facts in one.items()
        if "results" in facts
    }
    return list(found)


def _skill(results: Mapping[str, Any]) -> str:
    names = {"ce": "cross-entropy", "exact_match": "exact match"}
    return ", ".join(f"{title} {results[name]:.3g}" for name, title in names.items() if name in results)


ABSORBED = 0.5
"""Share of the loss's fall, due to the aligner alone, from which on a run is pointed out."""


def warnings(results: Sequence[Result]) -> list[str]:
    """A line for every run whose KV loss fell because of its aligner more than because of its student."""
    shares = [(result, result.results.get(f"{PREFIX}/absorbed", 0.0)) for result in results]
    return [
        f"{result.variant} seed {result.seed}: {share:.0%} of the fall of the KV loss is due to the trained "
        "aligner alone; a low loss says little about this student (docs/training.md, collapse)"
        for result, share in shares
        if share > ABSORBED
    ]


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
    """Every metric but those of a teacher or part (``a/b``), of which there are many."""
    names = dict.fromkeys(name for result in results for name in result.results)
    return [name for name in names if "/" not in name]


def _mean(values: Sequence[int | float | None]) -> int | float | None:
    """The mean, or None where a run lacks the metric: a missing number is never a zero."""
    there = [value for value in values if value is not None]
    return mean(there) if len(there) == len(values) else None


def _cell(value: int | float | None) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


PANELS = {
    "eval_exact_match": "exact match",
    "eval_ce": "validation cross-entropy (nats/token)",
    "kv": "KV loss (validation)",
    "weight": "teachers' weights (validation)",
}
Curves = list[tuple[list[int], list[float]]]
"""Steps and values, for every metric of a panel."""


def plot(results: Sequence[Result], path: Path) -> bool:
    """Accuracy and losses against steps, a line for every seed, a colour for every variant.

    Metrics that no run has get no panel. Returns False where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    panels = _panels(results)
    figure = Figure(figsize=(1 + 4 * max(1, len(panels)), 4), layout="constrained")
    for place, (name, curves) in enumerate(panels.items(), 1):
        axis = figure.add_subplot(1, len(panels), place)
        _draw(axis, name, curves, results)
        if place == 1:
            axis.legend(title=f"{len(results)} runs, a line each")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return True


def _panels(results: Sequence[Result]) -> dict[str, list[Curves]]:
    """The metrics that some run has, each with the curves of every run."""
    lines = [_evaluations(result) for result in results]
    found = {name: [_curves(of_run, name) for of_run in lines] for name in PANELS}
    return {name: curves for name, curves in found.items() if any(curves)}


def _draw(axis: Any, name: str, curves: list[Curves], results: Sequence[Result]) -> None:
    """One panel; the first curve of every variant bears its name."""
    variants = list(dict.fromkeys(result.variant for result in results))
    named: set[str] = set()
    for result, of_run in zip(results, curves, strict=True):
        colour = f"C{variants.index(result.variant)}"
        for steps, values in of_run:
            label = None if result.variant in named else result.variant
            named.add(result.variant)
            axis.plot(steps, values, color=colour, alpha=0.8, marker=".", label=label)
    axis.set(xlabel="step", title=PANELS[name])
    axis.grid(alpha=0.3)
    if name == "eval_exact_match":
        axis.set_ylim(-0.03, 1.03)
    if name == "eval_ce":
        axis.set_yscale("log")


NOT_KV = {f"eval_{name}" for name in ("ce", "perplexity", "exact_match", "passes", CODI, STEPS, READING)}


def _evaluations(result: Result) -> list[dict[str, Any]]:
    return [line for line in read_metrics(Folder(result.folder).metrics) if "eval_ce" in line]


def _curves(lines: list[dict[str, Any]], name: str) -> Curves:
    """Steps and values of a metric; ``kv`` stands for every KV term, ``weight`` for every teacher.

    Teachers that all keep one weight have no curves.
    """
    found = [[(line["step"], line[key]) for line in lines if key in line] for key in _names(lines, name)]
    curves = [([step for step, _ in curve], [value for _, value in curve]) for curve in found if curve]
    moves = any(max(values) - min(values) > 1e-6 for _, values in curves)
    return curves if moves or name != "weight" else []


def _names(lines: list[dict[str, Any]], name: str) -> list[str]:
    """The metrics that a panel draws."""
    keys = sorted({key for line in lines for key in line})
    if name == "kv":
        return [key for key in keys if key.startswith("eval_") and "/" not in key and key not in NOT_KV]
    if name == "weight":
        return [key for key in keys if key.startswith("eval_weight/") and "@" not in key]
    return [name]
