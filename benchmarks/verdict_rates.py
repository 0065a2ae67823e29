"""How often verdicts are wrong where there is nothing, and right where there is something, by simulation.

    python benchmarks/verdict_rates.py [--families 1500] [--seed 0]

Every simulated experiment goes through ``judge_comparisons`` and the sentence on distillation, as real ones
do. Prints the tables of docs/guide/verdicts.md.

A run's number is its seed's difficulty plus noise of its own, both drawn anew for every experiment. Effects
are in standard deviations of the difference between two runs of a seed.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kava_core.experiment.distillation_claim import HELPS, NEEDED_CONTROLS, sentence_on_distillation
from kava_core.experiment.load_experiment import Experiment, LoadedRun
from kava_core.experiment.verdict import judge_comparisons
from kava_core.runs.folder import Folder
from kava_core.specfile.sections.compare import CompareSpec

Numbers = NDArray[np.float64]
Noise = Callable[[np.random.Generator, int], Numbers]

COSTS = {"student_tokens": 1, "teacher_tokens": 1, "flops": 1.0}
SEEDS = (8, 10, 16)
EFFECTS = (0.5, 1.0, 1.5, 2.0)
NOISES: dict[str, Noise] = {
    "normal": lambda random, n: random.normal(size=n),
    "heavy tails (t, 2 degrees)": lambda random, n: random.standard_t(2, size=n),
    "skewed (exponential)": lambda random, n: random.exponential(size=n),
    "steps in fives, capped": lambda random, n: np.minimum(5 * np.ceil(8 * random.gamma(2, size=n)), 140),
}


def simulated(values: Mapping[str, Numbers]) -> Experiment:
    """An experiment whose runs have these numbers by seed; the first variant is the treatment."""
    treatment, *controls = values
    runs = []
    for variant, row in values.items():
        for seed, value in enumerate(row.tolist()):
            record = {"results": {"steps": 1, "exact_match": value}, "compute": COSTS}
            runs.append(LoadedRun(variant, seed, Folder(Path("nowhere")), "complete", record))
    compare = CompareSpec(controls=tuple(controls))  # type: ignore[arg-type]
    return Experiment("simulated", Path("nowhere"), runs, compare, treatment)


def null_families(random: np.random.Generator, noise: Noise, n: int, controls: int) -> Iterator[Experiment]:
    """Experiments without end in which no variant differs from another."""
    names = ("treatment", *NEEDED_CONTROLS[:controls])
    while True:
        difficulty = 2 * noise(random, n)
        yield simulated({name: difficulty + noise(random, n) for name in names})


def shifted_families(
    random: np.random.Generator, effects: Mapping[str, float], n: int
) -> Iterator[Experiment]:
    """Experiments without end in which the treatment is better than each control by its effect."""
    while True:
        difficulty = 2 * random.normal(size=n)
        values = {"treatment": difficulty + random.normal(size=n)}
        for name, effect in effects.items():
            values[name] = difficulty + random.normal(size=n) - effect * math.sqrt(2)
        yield simulated(values)


def rate(experiments: Iterator[Experiment], judged: Callable[[Experiment], bool], count: int) -> str:
    """The share of experiments that are judged so, in percent."""
    found = sum(judged(next(experiments)) for _ in range(count))
    return f"{100 * found / count:.1f} %"


def any_claim(experiment: Experiment) -> bool:
    """Whether an experiment gets a verdict of better or worse."""
    return any(verdict.outcome in ("better", "worse") for verdict in judge_comparisons(experiment))


def is_better(experiment: Experiment) -> bool:
    """Whether the treatment is called better than the one control."""
    (verdict,) = judge_comparisons(experiment)
    return verdict.outcome == "better"


def helps(experiment: Experiment) -> bool:
    """Whether an experiment is said to show that KV distillation helps."""
    return sentence_on_distillation(experiment, judge_comparisons(experiment)).startswith(HELPS)


def print_table(head: list[str], rows: list[list[str]]) -> None:
    """Print a Markdown table."""
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)
    print()


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", type=int, default=1500, help="simulated experiments for each number")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random, count = np.random.default_rng(options.seed), options.families
    heads = [f"n = {n}" for n in SEEDS]

    print(f"Families with any false verdict ({count} each):\n")
    rows = []
    for name, noise in NOISES.items():
        for controls in (1, 4):
            made = [null_families(random, noise, n, controls) for n in SEEDS]
            rows.append([name, str(controls), *(rate(each, any_claim, count) for each in made)])
    print_table(["noise", "comparisons", *heads], rows)

    print(f'"KV distillation helps" where one control is as good, the others far worse ({count} each):\n')
    effects = dict.fromkeys(NEEDED_CONTROLS, 20.0) | {"token_identity": 0.0}
    made = [shifted_families(random, effects, n) for n in SEEDS]
    print_table(heads, [[rate(each, helps, count) for each in made]])

    print(f"How often a true effect is found ({count} each):\n")
    rows = []
    for effect in EFFECTS:
        one = [shifted_families(random, {"no_kv": effect}, n) for n in SEEDS]
        four = [shifted_families(random, dict.fromkeys(NEEDED_CONTROLS, effect), n) for n in SEEDS]
        alone = [rate(each, is_better, count) for each in one]
        rows.append([f"{effect:g}", *alone, *(rate(each, helps, count) for each in four)])
    columns = [f"{comparisons}, {head}" for comparisons in ("one", "all four") for head in heads]
    print_table(["effect", *columns], rows)


if __name__ == "__main__":
    main()
