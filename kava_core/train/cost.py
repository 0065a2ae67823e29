"""From what a run has read to what it cost: the compute that ``run.json`` records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig

from kava_core.dry_run import dry_run
from kava_core.kv.pipeline import active
from kava_core.plan import alignment_flops, forward_flops
from kava_core.spec.model import PipelineSpec
from kava_core.train.ledger import HEAD, STUDENT

SHORT = 8
"""A pass costs a · time + b · time²; both follow from its cost at this length and at twice that."""


def compute(
    spec: PipelineSpec,
    configs: Mapping[str, PreTrainedConfig],
    counts: Sequence[Mapping[str, float]],
    *,
    passes: int,
    seconds: float,
    memory: int,
) -> dict[str, Any]:
    """Tokens, floating-point operations, seconds and bytes of a run.

    Operations are those of matrix products, attention's included, as ``kava plan`` counts them, at the
    lengths that were read; of fuser and losses none.

    Args:
        spec: the run's, with every model's folder or config.
        configs: of the student and of every teacher that ran, by name.
        counts: ``Ledger.state`` of every process.
        passes: forward passes of one process.
        seconds: of training, evaluations included.
        memory: the most bytes that a process held.
    """
    total = {name: sum(one.get(name, 0) for one in counts) for one in counts for name in one}
    tokens = {n.removeprefix("tokens "): int(x) for n, x in total.items() if n.startswith("tokens ")}
    flops = {name: _flops(config, name, total) for name, config in configs.items()}
    if active(spec) and spec.store is None:
        flops["alignment"] = _alignment(spec, total, passes * len(counts))
    return {
        "student_tokens": tokens.pop(STUDENT, 0),
        "teacher_tokens": sum(tokens.values()),
        "flops": sum(flops.values()),
        "flops_of": flops,
        "seconds": seconds,
        "peak_memory": memory,
    }


def _flops(config: PreTrainedConfig, name: str, total: Mapping[str, float]) -> float:
    once, twice = (forward_flops(config, time, head=False) for time in (SHORT, 2 * SHORT))
    squared = (twice - 2 * once) / (2 * SHORT**2)
    linear = (once - squared * SHORT**2) / SHORT
    head = (forward_flops(config, SHORT, head=True) - once) / SHORT
    read = (total.get(f"{field} {name}", 0.0) for field in ("positions", "pairs"))
    positions, pairs = read
    return linear * positions + squared * pairs + head * total.get(f"positions {name} {HEAD}", 0.0)


def _alignment(spec: PipelineSpec, total: Mapping[str, float], passes: int) -> float:
    """At the mean lengths of all batches."""
    batch = spec.train.batch_size
    lengths = [
        pairs / total[f"positions {name}"]
        for name in (STUDENT, *(t.name for t in spec.teachers))
        if (pairs := total.get(f"pairs {name}"))
    ]
    time, *theirs = (max(SHORT, round(length)) for length in lengths)
    dry = dry_run(spec, batch=batch, time=time, t_time=round(sum(theirs) / max(len(theirs), 1)) or time)
    return alignment_flops(dry) * passes
