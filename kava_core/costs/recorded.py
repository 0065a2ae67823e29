"""From what a run has read to what it cost: the compute that ``run.json`` records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from kava_core.build.data import Data
from kava_core.build.pipeline import config_geometries
from kava_core.build.stored import example_key
from kava_core.costs.dry_run import dry_run, sized_config
from kava_core.costs.flops import alignment_flops, forward_flops
from kava_core.kv.compare.pipeline import KVPipeline
from kava_core.models.ledger import HEAD, STUDENT
from kava_core.runs.metrics import read_metrics
from kava_core.runs.record import STORE
from kava_core.specfile.questions import active_losses
from kava_core.specfile.sections.pipeline import PipelineSpec

SHORT = 8
"""A pass costs a · time + b · time²; both follow from its cost at this length and at twice that."""


def compute(
    spec: PipelineSpec,
    configs: Mapping[str, PreTrainedConfig],
    counts: Sequence[Mapping[str, float]],
    *,
    stored: Mapping[str, float] | None = None,
    metrics: Path,
    memory: int,
) -> dict[str, Any]:
    """Tokens, floating-point operations, seconds and bytes of a run.

    Operations are those of matrix products, attention's included, as ``kava plan`` counts them, at the
    lengths that were read; of fuser and losses none. What cannot be told is left out, and ``unknown`` says
    why: a run that has been trained is not lost for that.

    Args:
        spec: the run's, with every model's folder or config.
        configs: of the student and of every teacher that ran, by name.
        counts: ``Ledger.state`` of every process.
        stored: what making the run's store read (``store_counts``), whole, however many runs share it.
        metrics: the run's ``metrics.jsonl``; its last line has the seconds, evaluations included.
        memory: the most bytes that a process held.
    """
    total = {name: sum(one.get(name, 0) for one in counts) for one in counts for name in one}
    every = total | (stored or {})
    tokens = {n.removeprefix("tokens "): int(x) for n, x in every.items() if n.startswith("tokens ")}
    found: dict[str, Any] = {
        "student_tokens": tokens.pop(STUDENT, 0),
        "teacher_tokens": sum(tokens.values()),
        "peak_memory": memory,
    }
    try:
        found |= _operations(spec, configs, total, stored)
        found["seconds"] = read_metrics(metrics)[-1]["seconds"]
    except Exception as error:  # models and components of others can raise anything
        found["unknown"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return found


def _operations(
    spec: PipelineSpec,
    configs: Mapping[str, PreTrainedConfig],
    total: Mapping[str, float],
    stored: Mapping[str, float] | None,
) -> dict[str, Any]:
    flops = {name: _flops(config, name, total) for name, config in configs.items()}
    if stored is not None:
        flops[STORE] = _making(spec, total | stored)
    elif active_losses(spec):
        flops["alignment"] = sum(_alignment(spec, teacher.name, total) for teacher in spec.teachers)
    return {"flops": sum(flops.values()), "flops_of": flops}


def _making(spec: PipelineSpec, total: Mapping[str, float]) -> float:
    configs = {teacher.name: sized_config(teacher, where=teacher.name) for teacher in spec.teachers}
    return sum(
        _flops(config, name, total) + _alignment(spec, name, total) for name, config in configs.items()
    )


def store_counts(spec: PipelineSpec, data: Data, pipeline: KVPipeline) -> dict[str, float]:
    """What ``Ledger.state`` would say of making the run's store: every training text once, without padding.

    Validation examples are stored as well and, like evaluation, not counted.
    """
    items = {example_key(item.example): item for item in data.train_items.items}.values()
    geometries = config_geometries(spec, data)
    found: dict[str, float] = {}
    for aligner in pipeline.teachers:
        name, times = aligner.name, [len(item.teachers[aligner.name].input_ids) for item in items]
        depth = (max(aligner.sources) + 1) / geometries[name].layer
        found |= {
            f"tokens {name}": float(sum(times)),
            f"positions {name}": depth * sum(times),
            f"pairs {name}": depth * sum(time**2 for time in times),
            f"passes {name}": len(times) / spec.train.batch_size,
        }
    return found


def _flops(config: PreTrainedConfig, name: str, total: Mapping[str, float]) -> float:
    once, twice = (forward_flops(config, time, head=False) for time in (SHORT, 2 * SHORT))
    squared = (twice - 2 * once) / (2 * SHORT**2)
    linear = (once - squared * SHORT**2) / SHORT
    head = (forward_flops(config, SHORT, head=True) - once) / SHORT
    positions, pairs = (total.get(f"{field} {name}", 0.0) for field in ("positions", "pairs"))
    return linear * positions + squared * pairs + head * total.get(f"positions {name} {HEAD}", 0.0)


def _alignment(spec: PipelineSpec, teacher: str, total: Mapping[str, float]) -> float:
    """Of every time the teacher ran, at the mean lengths of its batches and of the student's."""
    passes = total.get(f"passes {teacher}", 0)
    if not passes:
        return 0.0
    time, t_time = (
        max(SHORT, round(total[f"pairs {name}"] / total[f"positions {name}"])) for name in (STUDENT, teacher)
    )
    dry = dry_run(spec, batch=spec.train.batch_size, time=time, t_time=t_time)
    return alignment_flops(dry, teacher) * passes
