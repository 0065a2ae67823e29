"""Work out what a run cost from what it has read: the ``compute`` that ``run.json`` records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from kava_core.build.data import Data
from kava_core.build.pipeline import config_geometries
from kava_core.build.stored import example_key
from kava_core.costs.dry_run import DryRun, dry_pipeline, sized_config
from kava_core.costs.flops import alignment_flops, forward_flops, hidden_alignment_flops
from kava_core.kv.compare.pipeline import KVPipeline
from kava_core.models.ledger import HEAD, STUDENT
from kava_core.runs.metrics import read_metrics
from kava_core.runs.record import STORE
from kava_core.specfile.questions import active_losses, hidden_teachers
from kava_core.specfile.sections.pipeline import PipelineSpec

SHORT = 8
"""A pass costs a · time + b · time²; both follow from its cost at this length and at twice that."""

TOKENS = "tokens "
"""What the ledger's counts of tokens begin with; a model's name follows."""

Counts = Mapping[str, float]
"""Counts as in ``Ledger.state``: "tokens NAME", "positions NAME", "pairs NAME", "passes NAME"."""


def recorded_compute(
    spec: PipelineSpec,
    configs: Mapping[str, PreTrainedConfig],
    counts: Sequence[Counts],
    *,
    stored: Counts | None = None,
    metrics: Path,
    memory: int,
) -> dict[str, Any]:
    """Return the tokens, floating-point operations, seconds and bytes of a run.

    Operations are those of matrix products, attention's included, as ``kava plan`` counts them, at the
    lengths that were read; of fuser and losses none. What cannot be worked out is left out, and ``unknown``
    says why: a run that has been trained is not lost for that.

    Args:
        spec: the run's, with every model's folder or config.
        configs: of the student and of every teacher that ran, by name.
        counts: ``Ledger.state`` of every process.
        stored: what making the run's store read (``store_counts``), whole, however many runs share it.
        metrics: the run's ``metrics.jsonl``; its last line has the seconds, evaluations included.
        memory: the most bytes that a process held.
    """
    trained = _sum_counts(counts)
    read = trained | dict(stored or {})
    tokens: dict[str, int] = {}
    for name, count in read.items():
        if name.startswith(TOKENS):
            tokens[name.removeprefix(TOKENS)] = int(count)
    record: dict[str, Any] = {
        "student_tokens": tokens.pop(STUDENT, 0),
        "teacher_tokens": sum(tokens.values()),
        "peak_memory": memory,
    }
    try:
        record |= _operations(spec, configs, trained, stored)
        record["seconds"] = read_metrics(metrics)[-1]["seconds"]
    except Exception as error:  # models and components of others can raise anything
        record["unknown"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return record


def _sum_counts(counts: Sequence[Counts]) -> dict[str, float]:
    """Add up the counts of all processes."""
    total: dict[str, float] = {}
    for of_process in counts:
        for name, count in of_process.items():
            total[name] = total.get(name, 0) + count
    return total


def _operations(
    spec: PipelineSpec, configs: Mapping[str, PreTrainedConfig], trained: Counts, stored: Counts | None
) -> dict[str, Any]:
    """Return the operations of the run, in all and by who did them."""
    without_weights = {teacher.name for teacher in spec.teachers if not teacher.has_weights}
    flops = {}
    for name, config in configs.items():
        flops[name] = 0.0 if name in without_weights else _model_flops(config, name, trained)
    if stored is not None:
        flops[STORE] = _store_flops(spec, {**trained, **stored})
    elif active_losses(spec):
        flops["alignment"] = sum(_alignment_flops(spec, teacher.name, trained) for teacher in spec.teachers)
    hidden_flops = [_hidden_alignment_flops(spec, name, trained) for name in hidden_teachers(spec)]
    if hidden_flops:
        flops["alignment of hidden states"] = sum(hidden_flops)
    return {"flops": sum(flops.values()), "flops_of": flops}


def _store_flops(spec: PipelineSpec, counts: Counts) -> float:
    """Return the operations of making the store: the teachers' passes and their alignment."""
    total = 0.0
    for teacher in spec.teachers:
        if teacher.has_weights:
            total += _model_flops(sized_config(teacher, where=teacher.name), teacher.name, counts)
        total += _alignment_flops(spec, teacher.name, counts)
    return total


def store_counts(spec: PipelineSpec, data: Data, pipeline: KVPipeline) -> dict[str, float]:
    """Return what ``Ledger.state`` would have counted while the run's store was made.

    Every training text is read once, without padding. Validation examples are stored as well and, like
    evaluation, not counted.
    """
    items = {example_key(item.example): item for item in data.train_items.items}.values()
    geometries = config_geometries(spec, data)
    counts: dict[str, float] = {}
    for aligner in pipeline.teachers:
        name = aligner.name
        lengths = [len(item.teachers[name].input_ids) for item in items]
        # The teacher runs only up to the last layer that is read.
        depth = (max(aligner.sources) + 1) / geometries[name].layer
        counts[f"tokens {name}"] = float(sum(lengths))
        counts[f"positions {name}"] = depth * sum(lengths)
        counts[f"pairs {name}"] = depth * sum(length**2 for length in lengths)
        counts[f"passes {name}"] = len(lengths) / spec.train.batch_size
    return counts


def _model_flops(config: PreTrainedConfig, name: str, counts: Counts) -> float:
    """Return the operations of all passes of one model."""
    once = forward_flops(config, SHORT, head=False)
    twice = forward_flops(config, 2 * SHORT, head=False)
    of_pair = (twice - 2 * once) / (2 * SHORT**2)
    of_position = (once - of_pair * SHORT**2) / SHORT
    of_head = (forward_flops(config, SHORT, head=True) - once) / SHORT
    positions = counts.get(f"positions {name}", 0.0)
    pairs = counts.get(f"pairs {name}", 0.0)
    head_positions = counts.get(f"positions {name} {HEAD}", 0.0)
    return of_position * positions + of_pair * pairs + of_head * head_positions


def _alignment_flops(spec: PipelineSpec, teacher: str, counts: Counts) -> float:
    """Return the operations of aligning a teacher every time it ran, at the mean lengths of its batches."""
    passes = counts.get(f"passes {teacher}", 0)
    if not passes:
        return 0.0
    return alignment_flops(_dry_at_mean_lengths(spec, teacher, counts), teacher) * passes


def _hidden_alignment_flops(spec: PipelineSpec, teacher: str, counts: Counts) -> float:
    """Return the operations of aligning a teacher's hidden states, likewise."""
    passes = counts.get(f"passes {teacher}", 0)
    if not passes:
        return 0.0
    return hidden_alignment_flops(_dry_at_mean_lengths(spec, teacher, counts), teacher) * passes


def _dry_at_mean_lengths(spec: PipelineSpec, teacher: str, counts: Counts) -> DryRun:
    time, t_time = _mean_length(counts, STUDENT), _mean_length(counts, teacher)
    return dry_pipeline(spec, batch=spec.train.batch_size, time=time, t_time=t_time)


def _mean_length(counts: Counts, name: str) -> int:
    """Return how many positions a model looked back on in the mean, which is the length of its batches."""
    return max(SHORT, round(counts[f"pairs {name}"] / counts[f"positions {name}"]))
