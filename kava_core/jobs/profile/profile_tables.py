"""Print a profile as tables, and all variants side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from rich.console import Console
from rich.table import Table

from kava_core.console import print_whole
from kava_core.jobs.profile.layer_comparison import Entropy
from kava_core.jobs.profile.profiled_stages import CAPTURED, PLAN, STEP, STUDENT
from kava_core.jobs.profile.quality_gate import ARMS, Gate
from kava_core.jobs.profile.variant_profile import Profile

LEFT_COLUMNS = {"variant", "teacher", "part", "stage", "shape", "dtype", "gate", "of"}
"""Columns that are aligned left."""


def print_profile(variant: str, profile: Profile, console: Console) -> None:
    """Print stages, costs, layers, the gate if it was asked for, and notes."""
    print_whole(_stages_table(variant, profile), console)
    print_whole(_costs_table(variant, profile), console)
    print_whole(_layers_table(variant, profile), console)
    if profile.gates is not None:
        print_whole(_gates_table(variant, profile.gates, profile.layers), console)
    for note in profile.notes:
        console.print(f"note: {note}", soft_wrap=True, markup=False)


def print_warnings(variant: str, warnings: Sequence[str], console: Console) -> None:
    """Print one line on whether something looks wrong, and one for each thing."""
    verdict = "passed"
    if warnings:
        count = len(warnings)
        verdict = f"failed: {count} {'thing looks' if count == 1 else 'things look'} wrong"
    console.print(f"{variant}: {verdict}", soft_wrap=True, markup=False)
    for line in warnings:
        console.print(f"  {line}", soft_wrap=True, markup=False)


def side_by_side_table(profiles: Mapping[str, Profile]) -> Table:
    """Return a table with one row for each variant and teacher, means over layers."""
    table = _new_table(
        "variants side by side (means over layers)",
        *("variant", "teacher", "step ms", "alignment ms", "MiB", "cosine keys", "cosine values"),
        *("entropy before", "aligned", "student", "covered", "gate true", "shuffled", "random", "gate"),
    )
    for variant, profile in profiles.items():
        for teacher in profile.teachers:
            table.add_row(variant, teacher, *_side_by_side_cells(profile, teacher))
    return table


def _side_by_side_cells(profile: Profile, name: str) -> list[str]:
    teacher = profile.teachers[name]
    alignment = [
        cost for cost in profile.costs if cost.teacher == name and cost.stage not in (CAPTURED, PLAN)
    ]
    cells = [
        f"{_step_milliseconds(profile):.1f}",
        f"{sum(cost.milliseconds for cost in alignment):.2f}",
        f"{sum(cost.mebibytes for cost in alignment):.2f}",
        _number_cell(_mean(teacher.cosines.get("keys", ()))),
        _number_cell(_mean(teacher.cosines.get("values", ()))),
    ]
    for entropy in (teacher.before, teacher.after, profile.student):
        cells.append(_number_cell(_mean(() if entropy is None else entropy.share)))
    cells.append(f"{teacher.covered:.0%}")
    gate = (profile.gates or {}).get(name)
    if gate is None:
        return [*cells, *["–"] * len(ARMS), "–"]
    return [*cells, *(_number_cell(gate.mean[arm]) for arm in ARMS), _gate_word(gate)]


def _step_milliseconds(profile: Profile) -> float:
    return next(cost.milliseconds for cost in profile.costs if cost.stage == STEP)


def _stages_table(variant: str, profile: Profile) -> Table:
    table = _new_table(
        f"{variant}: what every stage holds",
        *("teacher", "part", "stage", "shape", "dtype"),
        *("NaN/inf", "min", "max", "mean", "std", "rank", "dead"),
    )
    last_teacher = None
    for stage in profile.stages:
        if stage.teacher != last_teacher:
            table.add_section()
        last_teacher = stage.teacher
        numbers = stage.numbers
        statistics = (numbers.low, numbers.high, numbers.mean, numbers.std, numbers.rank)
        table.add_row(
            stage.teacher or "–",
            stage.part,
            stage.stage,
            " × ".join(map(str, numbers.shape)),
            numbers.dtype,
            f"{numbers.bad:.1%}",
            *map(_number_cell, statistics),
            _share_cell(numbers.dead),
        )
    return table


def _costs_table(variant: str, profile: Profile) -> Table:
    memory = "MiB made" if not _has_gpu() else "MiB at peak"
    table = _new_table(
        f"{variant}: time and memory, forward, first batch", "teacher", "stage", "ms", "of step", memory
    )
    step = _step_milliseconds(profile)
    for cost in profile.costs:
        share = "–" if cost.stage == PLAN else f"{cost.milliseconds / step:.0%}"
        table.add_row(
            cost.teacher or "–",
            cost.stage,
            f"{cost.milliseconds:.2f}",
            share,
            f"{cost.mebibytes:.2f}",
            end_section=cost.stage == STUDENT,
        )
    return table


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _layers_table(variant: str, profile: Profile) -> Table:
    """Return the layers' cosines, and entropies in nats with the share of log n in brackets."""
    table = _new_table(
        f"{variant}: layer by layer; entropy of attention in nats (share of log n)",
        *("of", "layer", "cosine keys", "cosine values", "entropy"),
    )
    for name, teacher in profile.teachers.items():
        for row, layer in enumerate(teacher.sources):
            table.add_row(f"{name}, captured", str(layer), "", "", _entropy_cell(teacher.before, row))
        for row, layer in enumerate(profile.layers):
            keys = _cosine_cell(teacher.cosines.get("keys", ()), row, len(profile.layers))
            values = _cosine_cell(teacher.cosines.get("values", ()), row, len(profile.layers))
            table.add_row(f"{name}, aligned", str(layer), keys, values, _entropy_cell(teacher.after, row))
        table.add_section()
    for row, layer in enumerate(profile.layers):
        table.add_row("the student", str(layer), "", "", _entropy_cell(profile.student, row))
    return table


def _cosine_cell(cosines: Sequence[float], row: int, layers: int) -> str:
    """Return the cosine of a layer; merged layers have one number for all, shown in the first row."""
    return _number_cell(cosines[row]) if row < len(cosines) <= layers else "–"


def _entropy_cell(entropy: Entropy | None, row: int) -> str:
    if entropy is None:
        return "–"
    return f"{entropy.nats[row]:.3f} ({_number_cell(entropy.share[row])})"


def _gates_table(variant: str, gates: Mapping[str, Gate | None], layers: Sequence[int]) -> Table:
    table = _new_table(f"{variant}: cosine of attention outputs", "teacher", "layer", *ARMS, "gate")
    for name, gate in gates.items():
        if gate is None:
            table.add_row(name, "–", "–", "–", "–", "its target does not have the student's heads and width")
            continue
        for row, layer in enumerate(layers):
            table.add_row(name, str(layer), *(_number_cell(gate.layers[arm][row]) for arm in ARMS), "")
        means = [_number_cell(gate.mean[arm]) for arm in ARMS]
        table.add_row(name, "mean", *means, gate_line(gate), end_section=True)
    return table


def gate_line(gate: Gate) -> str:
    """Return the verdict with the numbers and the rule behind it."""
    sign = ">" if gate.open else "not >"
    return (
        f"{_gate_word(gate)}: true − shuffled {gate.difference:+.3f} {sign} its spread {gate.spread:.3f} "
        f"(n = {gate.examples}, {gate.above:.0%} above)"
    )


def _gate_word(gate: Gate) -> str:
    return "open" if gate.open else "closed"


def _new_table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column in LEFT_COLUMNS else "right")
    return table


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else math.nan


def _number_cell(number: float) -> str:
    if math.isnan(number):
        return "–"
    return f"{number:.3g}" if abs(number) >= 100 else f"{number:.3f}"


def _share_cell(share: float) -> str:
    return "–" if math.isnan(share) else f"{share:.0%}"
