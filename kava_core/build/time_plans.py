"""Plan time maps beside the batches, on the CPU, in the data loader's processes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from kava_core.data.collate import EncodedExample
from kava_core.data.examples import Example
from kava_core.distill.aligned_states import AlignedStates
from kava_core.kv.compare.pipeline import KVPipeline
from kava_core.protocols.timeline import Timeline

Collate = Callable[[Sequence[Example | EncodedExample]], dict[str, Any]]


class PlansTime:
    """A collator that adds every teacher's ``time_map`` to its side of the batch, unless a store holds it.

    Args:
        collator: makes the batch.
        pipeline: whose aligners plan.
        hidden: what aligns hidden states, if they are distilled.
    """

    def __init__(self, collator: Collate, pipeline: KVPipeline, hidden: AlignedStates | None = None) -> None:
        self.collator = collator
        # A teacher's caches and hidden states share one plan.
        aligners = [*pipeline.teachers, *([] if hidden is None else hidden.teachers)]
        self.plans = {a.name: copy.deepcopy(a.time_plan).to("cpu") for a in aligners}

    def __call__(self, batch: Sequence[Example | EncodedExample]) -> dict[str, Any]:
        """Return the collator's batch with time maps."""
        collated = self.collator(batch)
        student = Timeline.from_batch(collated["student"])
        for name, plan in self.plans.items():
            side = collated["teachers"][name]
            if "target" in side:
                continue
            side["time_map"] = plan(Timeline.from_batch(side), student)
        return collated
