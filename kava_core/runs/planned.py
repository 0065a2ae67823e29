"""List the runs that a spec plans."""

from __future__ import annotations

from collections.abc import Mapping

from kava_core.runs.folder import Folder
from kava_core.specfile.sections.pipeline import PipelineSpec
from kava_core.specfile.variants import chosen_runs


def planned_runs(variants: Mapping[str, PipelineSpec]) -> list[Folder]:
    """Return the folder of every run that a spec plans.

    All variants of a seed follow one another, so that what is compared is there soonest.

    Args:
        variants: the resolved spec of every variant, by its name.
    """
    runs = [Folder.planned(spec, variant, seed) for variant, seed, spec in chosen_runs(variants)]
    seeds = next(iter(variants.values())).seeds
    return sorted(runs, key=lambda run: seeds.index(run.seed))
