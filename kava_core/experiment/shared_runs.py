"""Find runs that are there several times: variants and experiments that share one set of evidence."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kava_core.errors import KavaError
from kava_core.experiment.load_experiment import Experiment, LoadedRun, load_experiment
from kava_core.experiment.recorded_plan import PLAN_FILE


@dataclass(frozen=True)
class SharedRuns:
    """Variants whose runs have the same numbers at every evaluation."""

    variants: tuple[tuple[str, str], ...]
    """Experiment and variant of each, at least two."""
    seeds: tuple[int, ...]

    def sentence(self, experiment: str) -> str:
        """Return what a reader of one experiment has to know.

        Args:
            experiment: its name; its own variants are named without it.
        """
        names = []
        for owner, variant in self.variants:
            names.append(variant if owner == experiment else f"{variant} of {owner}")
        seeds = f"seed{'' if len(self.seeds) == 1 else 's'} {', '.join(map(str, self.seeds))}"
        return (
            f"{', '.join(names)} have the same numbers at every evaluation ({seeds}): they are one set of "
            "runs, counted once, and no independent evidence"
        )


def shared_runs(experiments: Iterable[Experiment]) -> list[SharedRuns]:
    """Return the variants that share runs, in the order in which they are met.

    Args:
        experiments: several, or one.
    """
    variants_of_run: dict[str, list[tuple[str, str]]] = {}
    seed_of_run: dict[str, int] = {}
    for experiment in experiments:
        for run in experiment.runs:
            fingerprint = run_fingerprint(run)
            if fingerprint is not None:
                variants_of_run.setdefault(fingerprint, []).append((experiment.name, run.variant))
                seed_of_run[fingerprint] = run.seed
    seeds_of_variants: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for fingerprint, variants in variants_of_run.items():
        if len(variants) > 1:
            seeds_of_variants.setdefault(tuple(variants), []).append(seed_of_run[fingerprint])
    return [SharedRuns(variants, tuple(sorted(seeds))) for variants, seeds in seeds_of_variants.items()]


def runs_shared_with(experiment: Experiment, others: Iterable[Experiment]) -> list[SharedRuns]:
    """Return which runs of an experiment are there several times, in itself or in others."""
    shared = shared_runs([experiment, *others])
    return [each for each in shared if any(owner == experiment.name for owner, _ in each.variants)]


def count_distinct_runs(experiment: Experiment) -> int:
    """Count the complete runs of an experiment, those with the same numbers once."""
    complete = [run for run in experiment.runs if run.state == "complete"]
    known = [run_fingerprint(run) for run in complete]
    return known.count(None) + len({fingerprint for fingerprint in known if fingerprint is not None})


def run_fingerprint(run: LoadedRun) -> str | None:
    """Return what two runs share only if they computed the same: a hash of seed, cross-entropies and scores.

    Names, folders and settings that had no effect do not matter. None if the run is not complete, or has not
    been evaluated.
    """
    if run.state != "complete" or not run.evaluations:
        return None
    curve = [(line["step"], line["ce"], line.get("exact_match")) for line in run.evaluations]
    return hashlib.sha256(json.dumps([run.seed, curve]).encode()).hexdigest()


def neighbours(experiment: Experiment) -> Iterator[Experiment]:
    """Yield the other experiments in the same folder that can be read; a damaged one is none of this."""
    for file in sorted(Path(experiment.folder).absolute().parent.glob(f"*/{PLAN_FILE}")):
        if file.parent != Path(experiment.folder).absolute():
            try:
                neighbour = load_experiment(file.parent)
                for run in neighbour.runs:
                    run_fingerprint(run)  # reads all that may be damaged
            except KavaError:
                continue
            yield neighbour
