"""Estimate how large the teacher store would be that ``kava cache`` writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kava_core.build.stored import store_layout
from kava_core.costs.dry_run import DryRun
from kava_core.data.splits import load_splits
from kava_core.errors import SpecError
from kava_core.specfile.sections.data import HubData
from kava_core.specfile.sections.pipeline import PipelineSpec


@dataclass(frozen=True)
class StoreSize:
    """What ``kava cache`` would write."""

    token_bytes: int
    """Bytes of all teachers' targets at one student position."""
    time: int
    """Student tokens that an example is taken to have."""
    examples: int | None
    """Training and validation examples; None if only reading the data would tell."""


def store_size(spec: PipelineSpec, dry: DryRun, time: int) -> StoreSize | None:
    """Return the store's size for examples of ``time`` student tokens; None if the spec asks for none."""
    if spec.store is None or dry.pipeline is None:
        return None
    token_bytes = store_layout(spec, dry.pipeline).bytes_per_token()
    return StoreSize(token_bytes, time, _count_examples(spec))


def _count_examples(spec: PipelineSpec) -> int | None:
    """Count the examples of generated data and of local files; a hub is not asked."""
    if isinstance(spec.data, HubData):
        return None
    try:
        splits = load_splits(spec.data, root=Path.cwd())
    except SpecError:
        return None
    return len(splits.train) + min(len(splits.validation), spec.evaluate.examples)
