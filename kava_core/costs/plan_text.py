"""``kava plan`` for people: tables on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from kava_core.console import size_text
from kava_core.costs.plan import Plan
from kava_core.specfile.load import LoadedSpec


def show(plan: Plan, loaded: LoadedSpec) -> None:
    """Print where values come from, the shapes, the models, memory and cost."""
    console = Console()
    for table in (_origins(loaded), _shapes(plan), _models(plan), _memory(plan), _flops(plan), _store(plan)):
        if table.row_count:
            console.print(table)


def _table(title: str, *columns: str, numbers: int = 0) -> Table:
    """The last ``numbers`` columns are aligned right."""
    table = Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(
            column, justify="right" if place >= len(columns) - numbers else "left", overflow="fold"
        )
    return table


def _origins(loaded: LoadedSpec) -> Table:
    table = _table("resolved spec (values not listed are defaults)", "field", "value", "from")
    for path, origin in loaded.origins.items():
        table.add_row(path, _shown(loaded, path), origin)
    return table


def _shown(loaded: LoadedSpec, path: str) -> str:
    return str(_at(loaded.document.data, path.split(".")))


def _at(value: Any, keys: list[str]) -> Any:
    """What stands at a path; keys of a mapping may have dots themselves."""
    if not keys:
        return value
    if isinstance(value, list):
        return _at(value[int(keys[0])], keys[1:])
    for count in range(len(keys), 0, -1):
        if isinstance(value, dict) and (key := ".".join(keys[:count])) in value:
            return _at(value[key], keys[count:])
    return ""


def _shapes(plan: Plan) -> Table:
    table = _table("shapes: batch layer head time dim", "teacher", "stage", "part", "shape")
    last = None
    for row in plan.dry.shapes:
        if last is not None and row.teacher != last:
            table.add_section()
        last = row.teacher
        table.add_row(row.teacher, row.stage, row.part, " ".join(map(str, row.shape)))
    if plan.dry.pipeline is not None:
        layers = len(plan.dry.pipeline.layers)
        table.add_section()
        table.add_row(
            "student",
            "captured",
            f"layers {', '.join(map(str, plan.dry.pipeline.layers))}",
            f"{layers} of {plan.dry.student}",
        )
    return table


def _models(plan: Plan) -> Table:
    table = _table("models", "model", "geometry", "parameters", "trained", numbers=2)
    for cost in plan.models:
        name = f"{cost.name} {cost.note}".strip()
        table.add_row(name, cost.geometry, f"{cost.parameters:,}", f"{cost.trainable:,}")
    if plan.dry.pipeline is not None:
        parameters = list(plan.dry.pipeline.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        everything = sum(p.numel() for p in parameters) + sum(b.numel() for b in plan.dry.pipeline.buffers())
        table.add_row("alignment", "", f"{everything:,}", f"{trained:,}")
    return table


def _memory(plan: Plan) -> Table:
    ways = {"one process": plan.memory} | {
        f"each of {plan.processes}, {way}": memory for way, memory in plan.divided.items()
    }
    table = _table("memory at the peak of a step (about)", "what", *ways, numbers=len(ways))
    rows = dict.fromkeys(what for memory in ways.values() for what in memory)
    for what in rows:
        table.add_row(what, *(size_text(memory[what]) if what in memory else "" for memory in ways.values()))
    table.add_section()
    table.add_row("together", *(size_text(sum(memory.values())) for memory in ways.values()), style="bold")
    for device, size in plan.elsewhere.items():
        table.add_row(f"beside them on {device}: teachers", *[size_text(size)] * len(ways))
    return table


def _flops(plan: Plan) -> Table:
    total = sum(plan.flops.values())
    table = _table("floating-point operations of one optimizer step", "who", "FLOPs", "share", numbers=2)
    for who, count in plan.flops.items():
        table.add_row(who, f"{count:.3g}", f"{count / total:.1%}")
    return table


def _store(plan: Plan) -> Table:
    table = _table("teacher store on disk", "what", "bytes", numbers=1)
    if plan.store is None:
        return table
    one = plan.store.token * plan.store.time
    table.add_row("one student token, all teachers", size_text(plan.store.token))
    table.add_row(f"one example of {plan.store.time} tokens (the longest; see --time)", size_text(one))
    if plan.store.examples is None:
        table.add_row("all examples", "not known without the data")
    else:
        table.add_row(
            f"all {plan.store.examples:,} examples if each were that long",
            size_text(one * plan.store.examples),
        )
    return table
