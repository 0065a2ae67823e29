"""Make the tables and figures of docs/results/latent.md: ``python docs/tools/make_latent_results.py RUNS``.

RUNS holds what ``kava train specs/latent.yaml`` and ``kava train specs/latent_sweeps.yaml`` write, the
longer runs named ``latent600``, and in ``latent_sweeps_taught`` what was run anew once the teachers of
``k_…`` and ``m_…`` had their 2,400 steps (docs/results/latent.md). Needs the extra ``stats``.
"""

from __future__ import annotations

import csv
import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kava_core.experiment.statistics import holm_correction, paired_test

RESULTS = Path(__file__).parents[1] / "results"
METHODS = {
    "full_cot": "full CoT",
    "no_cot": "no CoT",
    "latents": "latents, answer alone",
    "codi": "CODI",
    "pccot": "PCCoT (T = 3)",
    "kv": "KaVa without CODI",
    "kava": "KaVa",
    "shuffled": "KaVa without CODI, shuffled teacher",
    "lotus": "step cross-entropy (LOTUS)",
    "coconut": "Coconut's stages",
}
"""Variants of specs/latent.yaml, as the tables call them."""

FAMILY = [(a, "latents") for a in ("no_cot", "codi", "pccot", "kv", "kava")] + [
    ("kava", "kv"),
    ("kava", "codi"),
]
"""The family of comparisons; Holm's correction is over all of them."""

PANELS = {
    "Jacobi passes T (M = K = 5)": ["t_0", "t_1", "t_2", "t_3", "t_4", "base"],
    "operations K = M = T": ["k_3", "k_4", "base", "k_6", "k_7", "k_8"],
    "loss": ["l_none", "base", "l_mse", "l_mercator", "l_relation", "l_keys", "l_values", "l_unscaled"],
    "weight": ["w_quarter", "base", "w_double"],
    "10 trace tokens to M = 5": ["m_all", "m_rkv", "m_random", "m_uniform", "m_crop", "m_segment"],
    "ablations": [
        "base",
        "a_bot",
        "a_no_projection",
        "a_linear",
        "a_last_step_dropped",
        "a_four_latents",
        "a_itself",
    ],
}
BASE = {
    "Jacobi passes T (M = K = 5)": "5",
    "operations K = M = T": "5",
    "loss": "smooth L1 K, V",
    "weight": "1",
}

Runs = dict[str, dict[int, dict[str, float]]]
"""Variant → seed → results."""


def read(folder: Path) -> Runs:
    """The results of every finished run."""
    runs: Runs = defaultdict(dict)
    for file in sorted(folder.glob("*/run.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["status"] == "complete":
            lines = (file.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            curve = [json.loads(line) for line in lines]
            more = {f"at_{e['step']}": e["eval_exact_match"] for e in curve if "eval_exact_match" in e}
            runs[record["variant"]][record["seed"]] = (
                record["results"] | more | {"seconds": curve[-1]["seconds"]}
            )
    return runs


def taught(folder: Path) -> Runs:
    """The sweeps, with the runs of taught teachers in the place of those of others; ``base`` is ``kv``."""
    first, anew = read(folder / "latent_sweeps"), read(folder / "latent_sweeps_taught")
    kept = {name: seeds for name, seeds in first.items() if not name.startswith(("k_", "m_"))}
    return kept | anew | {"base": read(folder / "latent")["kv"]}


def scores(runs: Runs, variant: str, name: str = "exact_match") -> list[float]:
    """One number for each seed, in the seeds' order."""
    return [results[name] for _, results in sorted(runs.get(variant, {}).items()) if name in results]


def methods_table(runs: Runs) -> str:
    """Exact match of every method, its controls and its cost."""
    head = [
        "method",
        "n",
        "exact match (95 % t-interval)",
        "seeds",
        "at step 200",
        "latents zeroed, shuffled",
    ]
    rows = [f"| {' | '.join(head)} | s a run |", "|---" * (len(head) + 1) + "|"]
    for variant, title in METHODS.items():
        values = scores(runs, variant)
        if not values:
            continue
        found = paired_test(values)
        early = _percent(scores(runs, variant, "at_200"))
        controls = ", ".join(
            _percent(scores(runs, variant, f"exact_match/{c}")) for c in ("zeroed", "shuffled")
        )
        seeds = " ".join(f"{100 * v:.1f}" for v in values)
        seconds = f"{mean(scores(runs, variant, 'seconds')):.0f}"
        known = f" ({100 * found.low:.1f} … {100 * found.high:.1f})" if len(values) > 1 else ""
        whole = _percent(values) + known
        cells = [title, str(len(values)), whole, seeds, early, controls, seconds]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _percent(values: list[float]) -> str:
    return f"{100 * mean(values):.1f} %" if values else "–"


def comparisons_table(runs: Runs) -> str:
    """Paired differences of the declared family."""
    found = []
    for one, other in FAMILY:
        shared = sorted(set(runs.get(one, {})) & set(runs.get(other, {})))
        gaps = [runs[one][s]["exact_match"] - runs[other][s]["exact_match"] for s in shared]
        found += [(one, other, paired_test(gaps))] if gaps else []
    corrected = holm_correction([test.p for *_, test in found])
    rows = [
        "| difference | n | mean (95 % t-interval), points | p, sign flips | p, Holm |",
        "|---|---|---|---|---|",
    ]
    for (one, other, test), adjusted in zip(found, corrected, strict=True):
        rows.append(
            f"| {METHODS[one]} − {METHODS[other]} | {test.n} | {100 * test.mean:+.1f} "
            f"({100 * test.low:+.1f} … {100 * test.high:+.1f}) | {test.p:.2g} | {adjusted:.2g} |"
        )
    return "\n".join(rows)


def dots(axes: Axes, runs: Runs, titles: dict[str, str]) -> None:
    """One row for each variant: every seed, and the mean."""
    shown = {v: t for v, t in titles.items() if scores(runs, v)}
    for row, variant in enumerate(shown):
        values = [100 * v for v in scores(runs, variant)]
        axes.plot(values, [row] * len(values), "o", color="#1f77b4", alpha=0.6, markersize=5)
        axes.plot(mean(values), row, "|", color="black", markersize=14)
    axes.axvline(10, color="#8c8c8c", linewidth=1, linestyle=":")
    axes.set_yticks(range(len(shown)), list(shown.values()), fontsize=8)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlim(-3, 103)
    axes.grid(axis="x", alpha=0.3)


def methods_picture(runs: Runs, file: Path) -> None:
    """Every method's seeds."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    dots(axes, runs, METHODS)
    axes.set_xlabel("exact match, % (dot: a seed, bar: mean, dotted: chance)")
    figure.savefig(file, dpi=130)


def sweeps_picture(runs: Runs, file: Path) -> None:
    """One panel for each thing that is varied."""
    figure = Figure(figsize=(10, 6.2), layout="constrained")
    for axes, (title, variants) in zip(figure.subplots(2, 3).flatten(), PANELS.items(), strict=True):
        names = {v: BASE.get(title, "base") if v == "base" else v for v in variants}
        dots(
            axes,
            runs,
            {v: n.split("_", 1)[-1].replace("_", " ") if v != "base" else n for v, n in names.items()},
        )
        axes.set_title(title, fontsize=9)
    figure.supxlabel("exact match, % (dot: a seed, bar: mean, dotted: chance)", fontsize=9)
    figure.savefig(file, dpi=130)


def write_csv(runs: dict[str, Runs], file: Path) -> None:
    """Every run's results, one a line."""
    names = ["exact_match", "exact_match/zeroed", "exact_match/shuffled", "at_200", "at_400", "ce", "seconds"]
    with file.open("w", newline="", encoding="utf-8") as stream:
        out = csv.writer(stream)
        out.writerow(["spec", "variant", "seed", *names])
        for spec, found in runs.items():
            for variant, seeds in sorted(found.items()):
                for seed, results in sorted(seeds.items()):
                    out.writerow([spec, variant, seed, *(_number(results.get(name)) for name in names)])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def sweeps_table(runs: Runs) -> str:
    """Exact match of every variant that was varied alone."""
    rows = ["| variant | n | exact match | latents zeroed, shuffled |", "|---|---|---|---|"]
    named = [v for variants in PANELS.values() for v in variants]
    for variant in dict.fromkeys([*named, *sorted(runs)]):
        values = scores(runs, variant)
        controls = ", ".join(
            _percent(scores(runs, variant, f"exact_match/{c}")) for c in ("zeroed", "shuffled")
        )
        seeds = " ".join(f"{100 * v:.1f}" for v in values)
        rows += [f"| {variant} | {len(values)} | {seeds} | {controls} |"] if values else []
    return "\n".join(rows)


def main() -> None:
    """Write the figures and the CSV; print the tables."""
    folder = Path(sys.argv[1])
    folders = ("latent", "latent600", "latent_sweeps")
    runs = {name: read(folder / name) for name in folders} | {"latent_sweeps": taught(folder)}
    RESULTS.mkdir(exist_ok=True)
    write_csv(runs, RESULTS / "latent.csv")
    methods_picture(runs["latent"], RESULTS / "latent_methods.png")
    sweeps_picture(runs["latent_sweeps"], RESULTS / "latent_sweeps.png")
    print(methods_table(runs["latent"]), comparisons_table(runs["latent"]), sep="\n\n")
    for name in folders[1:]:
        print(f"\n{name}\n\n{sweeps_table(runs[name])}")


if __name__ == "__main__":
    main()
