"""A profile as tables, and all variants side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from rich.console import Console
from rich.table import Table

from kava_core.console import print_whole
from kava_core.jobs.profile.gate import ARMS, Gate
from kava_core.jobs.profile.profile import Profile
from kava_core.jobs.profile.stages import CAPTURED, PLAN, STEP, STUDENT

LEFT = {"variant", "teacher", "part", "stage", "shape", "dtype", "gate", "of"}


def show(variant: str, found: Profile, console: Console) -> None:
    """Stages, costs, layers, and the gate where it was asked for."""
    print_whole(_stages(variant, found), console)
    print_whole(_costs(variant, found), console)
    print_whole(_layers(variant, found), console)
    if found.gates is not None:
        print_whole(_gates(variant, found.gates, found.layers), console)
    for note in found.notes:
        console.print(f"note: {note}", soft_wrap=True, markup=False)


def show_verdict(variant: str, wrong: Sequence[str], console: Console) -> None:
    """One line that says whether something looks wrong, and one for each thing."""
    verdict = "passed" if not wrong else f"failed: {len(wrong)} things look wrong"
    console.print(
        f"{variant}: {verdict.replace('1 things look', '1 thing looks')}", soft_wrap=True, markup=False
    )
    for line in wrong:
        console.print(f"  {line}", soft_wrap=True, markup=False)


def side_by_side(profiles: Mapping[str, Profile]) -> Table:
    """One row a variant and teacher, means over layers."""
    shown = _table(
        "variants side by side (means over layers)",
        *("variant", "teacher", "step ms", "alignment ms", "MiB", "cosine keys", "cosine values"),
        *("entropy before", "aligned", "student", "covered", "gate true", "shuffled", "random", "gate"),
    )
    for variant, found in profiles.items():
        for name in found.teachers:
            shown.add_row(variant, name, *_row(found, name))
    return shown


def _row(found: Profile, name: str) -> list[str]:
    teacher, gate = found.teachers[name], (found.gates or {}).get(name)
    mine = [cost for cost in found.costs if cost.teacher == name and cost.stage not in (CAPTURED, PLAN)]
    step = next(cost for cost in found.costs if cost.stage == STEP)
    entropies = (teacher.before, teacher.after, found.student)
    return [
        f"{step.milliseconds:.1f}",
        f"{sum(cost.milliseconds for cost in mine):.2f}",
        f"{sum(cost.mebibytes for cost in mine):.2f}",
        *(_number(_mean(teacher.cosines.get(part, ()))) for part in ("keys", "values")),
        *(_number(_mean(() if e is None else e.share)) for e in entropies),
        f"{teacher.covered:.0%}",
        *(_number(math.nan if gate is None else gate.mean[arm]) for arm in ARMS),
        "–" if gate is None else _word(gate),
    ]


def _stages(variant: str, found: Profile) -> Table:
    shown = _table(
        f"{variant}: what every stage holds",
        *(
            "teacher",
            "part",
            "stage",
            "shape",
            "dtype",
            "NaN/inf",
            "min",
            "max",
            "mean",
            "std",
            "rank",
            "dead",
        ),
    )
    last = None
    for one in found.stages:
        if one.teacher != last:
            shown.add_section()
        last, held = one.teacher, one.numbers
        spread = map(_number, (held.low, held.high, held.mean, held.std, held.rank))
        shape = " × ".join(map(str, held.shape))
        who = one.teacher or "–"
        shown.add_row(
            who, one.part, one.stage, shape, held.dtype, f"{held.bad:.1%}", *spread, _share(held.dead)
        )
    return shown


def _costs(variant: str, found: Profile) -> Table:
    memory = "MiB made" if not _on_gpu() else "MiB at peak"
    shown = _table(
        f"{variant}: time and memory, forward, first batch", "teacher", "stage", "ms", "of step", memory
    )
    step = next(cost.milliseconds for cost in found.costs if cost.stage == STEP)
    for one in found.costs:
        share = "–" if one.stage == PLAN else f"{one.milliseconds / step:.0%}"
        shown.add_row(
            one.teacher or "–",
            one.stage,
            f"{one.milliseconds:.2f}",
            share,
            f"{one.mebibytes:.2f}",
            end_section=one.stage == STUDENT,
        )
    return shown


def _on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _layers(variant: str, found: Profile) -> Table:
    """Entropies in nats, and as a share of log n in brackets."""
    shown = _table(
        f"{variant}: layer by layer; entropy of attention in nats (share of log n)",
        *("of", "layer", "cosine keys", "cosine values", "entropy"),
    )
    for name, one in found.teachers.items():
        for place, layer in enumerate(one.sources):
            shown.add_row(f"{name}, captured", str(layer), "", "", _entropy(one.before, place))
        for place, layer in enumerate(found.layers):
            beside = (_at(one.cosines.get(part, ()), place, len(found.layers)) for part in ("keys", "values"))
            shown.add_row(f"{name}, aligned", str(layer), *beside, _entropy(one.after, place))
        shown.add_section()
    for place, layer in enumerate(found.layers):
        shown.add_row("the student", str(layer), "", "", _entropy(found.student, place))
    return shown


def _at(values: Sequence[float], place: int, layers: int) -> str:
    """Merged layers have one number for all, which stands in the first row."""
    return _number(values[place]) if place < len(values) <= layers else "–"


def _entropy(entropy: object, place: int) -> str:
    from kava_core.jobs.profile.layers import Entropy

    if not isinstance(entropy, Entropy):
        return "–"
    return f"{entropy.nats[place]:.3f} ({_number(entropy.share[place])})"


def _gates(variant: str, gates: Mapping[str, Gate | None], layers: Sequence[int]) -> Table:
    shown = _table(f"{variant}: cosine of attention outputs", "teacher", "layer", *ARMS, "gate")
    for name, gate in gates.items():
        if gate is None:
            shown.add_row(name, "–", "–", "–", "–", "its target does not have the student's heads and width")
            continue
        for place, layer in enumerate(layers):
            shown.add_row(name, str(layer), *(_number(gate.layers[arm][place]) for arm in ARMS), "")
        shown.add_row(
            name, "mean", *(_number(gate.mean[arm]) for arm in ARMS), gate_line(gate), end_section=True
        )
    return shown


def gate_line(gate: Gate) -> str:
    """The verdict with the numbers and the rule behind it."""
    sign = ">" if gate.open else "not >"
    return (
        f"{_word(gate)}: true − shuffled {gate.difference:+.3f} {sign} its spread {gate.spread:.3f} "
        f"(n = {gate.examples}, {gate.above:.0%} above)"
    )


def _word(gate: Gate) -> str:
    return "open" if gate.open else "closed"


def _table(title: str, *columns: str) -> Table:
    shown = Table(title=title)
    for name in columns:
        shown.add_column(name, justify="left" if name in LEFT else "right")
    return shown


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else math.nan


def _number(x: float) -> str:
    return "–" if math.isnan(x) else f"{x:.3g}" if abs(x) >= 100 else f"{x:.3f}"


def _share(x: float) -> str:
    return "–" if math.isnan(x) else f"{x:.0%}"
