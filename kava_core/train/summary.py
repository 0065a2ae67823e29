"""Print the end of ``kava train`` for people: a table of all variants and seeds, and one plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from kava_core.console import print_whole
from kava_core.distill.aligned_states import HIDDEN
from kava_core.distill.cross_tokenizer.cross_logits import CROSS_LOGITS
from kava_core.distill.hidden_states import CODI, READING, STEPS
from kava_core.distill.logits import LOGITS
from kava_core.runs.folder import Folder
from kava_core.runs.metrics import read_metrics
from kava_core.train.run import RunResult
from kava_core.train.validation.collapse_monitor import PREFIX


def print_summary(results: Sequence[RunResult]) -> None:
    """Print the table, save the plot beside the run directories, say where everything is."""
    console = Console()
    print_whole(results_table(results), console)
    folder = results[0].folder.parent
    picture = folder / "curves.png"
    if plot_curves(results, picture):
        console.print(f"curves: {picture}", soft_wrap=True)
    else:
        console.print("no plot: matplotlib is not installed (pip install 'kava[plots]')")
    console.print(f"runs:   {folder}", soft_wrap=True)
    for line in pretrained_scores(results):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    for line in collapse_warnings(results):
        console.print(line, style="yellow", soft_wrap=True)


def pretrained_scores(results: Sequence[RunResult]) -> list[str]:
    """Return a line for every model that was trained on the spot, with its validation scores.

    A student is not better than what it is shown.
    """
    lines: dict[str, None] = {}  # a set that keeps its order
    for result in results:
        models = Folder(result.folder).record().get("models", {})
        for name, provenance in models.items():
            if "results" in provenance:
                scores = _score_text(provenance["results"])
                lines[f"{name}: trained on the spot; validation {scores}"] = None
    return list(lines)


def _score_text(results: Mapping[str, Any]) -> str:
    scores = []
    for name, title in (("ce", "cross-entropy"), ("exact_match", "exact match")):
        if name in results:
            scores.append(f"{title} {results[name]:.3g}")
    return ", ".join(scores)


ABSORBED = 0.5
"""Share of the loss's fall, due to the aligner alone, from which on a run is pointed out."""


def collapse_warnings(results: Sequence[RunResult]) -> list[str]:
    """Return a line for every run whose KV loss fell because of its aligner more than of its student."""
    lines = []
    for result in results:
        share = result.results.get(f"{PREFIX}/absorbed", 0.0)
        if share > ABSORBED:
            lines.append(
                f"{result.variant} seed {result.seed}: {share:.0%} of the fall of the KV loss is due to the "
                "trained aligner alone; a low loss says little about this student "
                "(docs/guide/training.md, collapse)"
            )
    return lines


def results_table(results: Sequence[RunResult]) -> Table:
    """Return a row for every run, then the mean of every variant with more than one seed."""
    table = Table(title="validation at the last step")
    metrics = _table_metrics(results)
    for name in ("variant", "seed", *metrics):
        table.add_column(name, justify="left" if name == "variant" else "right")
    for variant, runs in _runs_by_variant(results).items():
        for run in runs:
            cells = [_metric_cell(run.results.get(metric)) for metric in metrics]
            table.add_row(variant, str(run.seed), *cells)
        if len(runs) > 1:
            cells = [_metric_cell(_mean_of_runs(runs, metric)) for metric in metrics]
            table.add_row(variant, f"mean of {len(runs)}", *cells, style="bold", end_section=True)
    return table


def _runs_by_variant(results: Sequence[RunResult]) -> dict[str, list[RunResult]]:
    runs: dict[str, list[RunResult]] = {}
    for result in results:
        runs.setdefault(result.variant, []).append(result)
    return runs


def _table_metrics(results: Sequence[RunResult]) -> list[str]:
    """Return every metric but those of a teacher or part (``a/b``), of which there are many."""
    names: dict[str, None] = {}  # a set that keeps its order
    for result in results:
        names |= dict.fromkeys(result.results)
    return [name for name in names if "/" not in name]


def _mean_of_runs(runs: Sequence[RunResult], metric: str) -> int | float | None:
    """Return the mean, or None if a run lacks the metric: a missing number is never a zero."""
    values = []
    for run in runs:
        value = run.results.get(metric)
        if value is None:
            return None
        values.append(value)
    return mean(values)


def _metric_cell(value: int | float | None) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


PANELS = {
    "eval_exact_match": "exact match",
    "eval_ce": "validation cross-entropy (nats/token)",
    "kv": "KV loss (validation)",
    "outputs": "logits and hidden states (validation)",
    "weight": "teachers' weights (validation)",
}
"""Titles of the plot's panels, by metric; ``kv`` is every KV term, ``outputs`` every term of logits and
hidden states, ``weight`` every teacher's weight."""

Curves = list[tuple[list[int], list[float]]]
"""Steps and values, for every metric of a panel."""


def plot_curves(results: Sequence[RunResult], path: Path) -> bool:
    """Plot accuracy and losses against steps, a line for every seed, a colour for every variant.

    Metrics that no run has get no panel.

    Returns:
        False if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    panels = panel_curves(results)
    figure = Figure(figsize=(1 + 4 * max(1, len(panels)), 4), layout="constrained")
    for number, (name, curves) in enumerate(panels.items(), 1):
        axis = figure.add_subplot(1, len(panels), number)
        _draw_panel(axis, name, curves, results)
        if number == 1:
            axis.legend(title=f"{len(results)} runs, a line each")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return True


def panel_curves(results: Sequence[RunResult]) -> dict[str, list[Curves]]:
    """Return the panels that some run has curves for, each with the curves of every run."""
    evaluations = [_evaluation_lines(result) for result in results]
    panels = {}
    for name in PANELS:
        curves = [_run_curves(lines, name) for lines in evaluations]
        if any(curves):
            panels[name] = curves
    return panels


def _draw_panel(axis: Any, name: str, curves: list[Curves], results: Sequence[RunResult]) -> None:
    """Draw one panel; the first curve of every variant bears its name."""
    variants = list(_runs_by_variant(results))
    labelled: set[str] = set()
    for result, curves_of_run in zip(results, curves, strict=True):
        colour = f"C{variants.index(result.variant)}"
        for steps, values in curves_of_run:
            label = None if result.variant in labelled else result.variant
            labelled.add(result.variant)
            axis.plot(steps, values, color=colour, alpha=0.8, marker=".", label=label)
    axis.set(xlabel="step", title=PANELS[name])
    axis.grid(alpha=0.3)
    if name == "eval_exact_match":
        axis.set_ylim(-0.03, 1.03)
    if name == "eval_ce":
        axis.set_yscale("log")


OF_OUTPUTS = {f"eval_{name}" for name in (LOGITS, CROSS_LOGITS, HIDDEN)}
"""Metrics of an evaluation that are terms of logits and hidden states."""

NOT_KV = OF_OUTPUTS | {
    f"eval_{name}" for name in ("ce", "perplexity", "exact_match", "passes", CODI, STEPS, READING)
}
"""Metrics of an evaluation that are no KV terms."""


def _evaluation_lines(result: RunResult) -> list[dict[str, Any]]:
    return [line for line in read_metrics(Folder(result.folder).metrics) if "eval_ce" in line]


def _run_curves(lines: list[dict[str, Any]], panel: str) -> Curves:
    """Return steps and values of every metric of a panel; none of teachers that all keep one weight."""
    curves: Curves = []
    for metric in _panel_metrics(lines, panel):
        steps: list[int] = []
        values: list[float] = []
        for line in lines:
            if metric in line:
                steps.append(line["step"])
                values.append(line[metric])
        if steps:
            curves.append((steps, values))
    moves = any(max(values) - min(values) > 1e-6 for _, values in curves)
    return curves if moves or panel != "weight" else []


def _panel_metrics(lines: list[dict[str, Any]], panel: str) -> list[str]:
    """Return the metrics that a panel draws."""
    names: set[str] = set()
    for line in lines:
        names |= line.keys()
    if panel == "kv":
        return sorted(filter(_is_kv_term, names))
    if panel == "outputs":
        return sorted(OF_OUTPUTS & names)
    if panel == "weight":
        return sorted(filter(_is_teacher_weight, names))
    return [panel]


def _is_kv_term(metric: str) -> bool:
    return metric.startswith("eval_") and "/" not in metric and metric not in NOT_KV


def _is_teacher_weight(metric: str) -> bool:
    return metric.startswith("eval_weight/") and "@" not in metric
