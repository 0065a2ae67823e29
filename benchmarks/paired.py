"""Paired differences between the variants of a run folder: what docs/results quotes.

    python benchmarks/paired.py runs/quickstart exact_match kv cross-entropy shuffled

First variant against each of the others, on the seeds they share: mean difference, 95 % t-interval,
exact sign-flip test with Holm's correction over the comparisons, and how many seeds went which way.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from kava_core.experiment.statistics import holm_correction, paired_test


def results(folder: Path, variant: str, metric: str) -> dict[int, float]:
    """Seed to the metric of every finished run of a variant; a run without the metric is an error."""
    records = [
        json.loads(file.read_text(encoding="utf-8")) for file in folder.glob(f"{variant}-*-s*/run.json")
    ]
    mine = [record for record in records if record["variant"] == variant]
    unfinished = [record["seed"] for record in mine if record["status"] != "complete"]
    if unfinished or not mine:
        raise SystemExit(f"{folder}: variant {variant!r}: {unfinished or 'no runs'} not finished")
    return {record["seed"]: record["results"][metric] for record in mine}


def main() -> None:
    """Print the two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("metric")
    parser.add_argument("variants", nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these")
    options = parser.parse_args()
    found = {variant: results(options.folder, variant, options.metric) for variant in options.variants}
    shared = set.intersection(*(set(values) for values in found.values()))
    seeds = sorted(shared & set(options.seeds or shared))
    print(f"{options.metric}, seeds {seeds}\n\n| variant | mean | of each seed |\n|---|---|---|")
    for variant, values in found.items():
        each = " ".join(f"{values[seed]:.2f}" for seed in seeds)
        print(f"| {variant} | {np.mean([values[seed] for seed in seeds]):.3f} | {each} |")
    first, *others = options.variants
    rows = [np.array([found[first][s] - found[other][s] for s in seeds]) for other in others]
    tests = [paired_test(row.tolist()) for row in rows]
    adjusted = holm_correction([test.p for test in tests])
    print(
        f"\n| {first} − | mean | 95 % t-interval | p (Holm) | better / equal / worse |\n|---|---|---|---|---|"
    )
    for other, row, test, p in zip(others, rows, tests, adjusted, strict=True):
        ways = f"{(row > 0).sum()} / {(row == 0).sum()} / {(row < 0).sum()}"
        print(f"| {other} | {test.mean:+.3f} | {test.low:+.3f} … {test.high:+.3f} | {p:.3f} | {ways} |")


if __name__ == "__main__":
    main()
