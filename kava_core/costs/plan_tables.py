"""Print what ``kava plan`` found as tables on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from kava_core.console import size_text
from kava_core.costs.plan import Plan
from kava_core.specfile.load import LoadedSpec


def print_plan(plan: Plan, loaded: LoadedSpec) -> None:
    """Print where values come from, the shapes, the models, memory and cost."""
    console = Console()
    tables = (
        _origins_table(loaded),
        _shapes_table(plan),
        _models_table(plan),
        _memory_table(plan),
        _flops_table(plan),
        _store_table(plan),
    )
    for table in tables:
        if table.row_count:
            console.print(table)


def _new_table(title: str, *columns: str, numbers: int = 0) -> Table:
    """Make an empty table whose last ``numbers`` columns are aligned right."""
    table = Table(title=title, title_justify="left")
    first_number = len(columns) - numbers
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index >= first_number else "left", overflow="fold")
    return table


def _origins_table(loaded: LoadedSpec) -> Table:
    table = _new_table("resolved spec (values not listed are defaults)", "field", "value", "from")
    for path, origin in loaded.origins.items():
        table.add_row(path, str(_value_at(loaded.document.data, path.split("."))), origin)
    return table


def _value_at(value: Any, keys: list[str]) -> Any:
    """Return the value at a path; keys of a mapping may contain dots themselves."""
    if not keys:
        return value
    if isinstance(value, list):
        return _value_at(value[int(keys[0])], keys[1:])
    if isinstance(value, dict):
        for count in range(len(keys), 0, -1):
            key = ".".join(keys[:count])
            if key in value:
                return _value_at(value[key], keys[count:])
    return ""


def _shapes_table(plan: Plan) -> Table:
    table = _new_table("shapes: batch layer head time dim", "teacher", "stage", "part", "shape")
    last_teacher = None
    for row in plan.dry.shapes:
        if last_teacher is not None and row.teacher != last_teacher:
            table.add_section()
        last_teacher = row.teacher
        table.add_row(row.teacher, row.stage, row.part, " ".join(map(str, row.shape)))
    if plan.dry.pipeline is not None:
        layers = plan.dry.pipeline.layers
        table.add_section()
        table.add_row(
            "student",
            "captured",
            f"layers {', '.join(map(str, layers))}",
            f"{len(layers)} of {plan.dry.student}",
        )
    return table


def _models_table(plan: Plan) -> Table:
    table = _new_table("models", "model", "geometry", "parameters", "trained", numbers=2)
    for cost in plan.models:
        name = f"{cost.name} {cost.note}".strip()
        table.add_row(name, cost.geometry, f"{cost.parameters:,}", f"{cost.trainable:,}")
    modules = plan.dry.beside_student
    if len(modules):
        parameters = list(modules.parameters())
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        everything = sum(tensor.numel() for tensor in (*parameters, *modules.buffers()))
        table.add_row("alignment", "", f"{everything:,}", f"{trained:,}")
    return table


def _memory_table(plan: Plan) -> Table:
    columns = {"one process": plan.memory}
    for way, memory in plan.divided.items():
        columns[f"each of {plan.processes}, {way}"] = memory
    table = _new_table("memory at the peak of a step (about)", "what", *columns, numbers=len(columns))
    rows: dict[str, None] = {}  # a set that keeps its order
    for memory in columns.values():
        rows |= dict.fromkeys(memory)
    for what in rows:
        cells = [size_text(memory[what]) if what in memory else "" for memory in columns.values()]
        table.add_row(what, *cells)
    table.add_section()
    totals = [size_text(sum(memory.values())) for memory in columns.values()]
    table.add_row("together", *totals, style="bold")
    for device, size in plan.elsewhere.items():
        table.add_row(f"beside them on {device}: teachers", *[size_text(size)] * len(columns))
    return table


def _flops_table(plan: Plan) -> Table:
    total = sum(plan.flops.values())
    table = _new_table("floating-point operations of one optimizer step", "who", "FLOPs", "share", numbers=2)
    for who, count in plan.flops.items():
        table.add_row(who, f"{count:.3g}", f"{count / total:.1%}")
    return table


def _store_table(plan: Plan) -> Table:
    table = _new_table("teacher store on disk", "what", "bytes", numbers=1)
    store = plan.store
    if store is None:
        return table
    example_bytes = store.token_bytes * store.time
    table.add_row("one student token, all teachers", size_text(store.token_bytes))
    table.add_row(f"one example of {store.time} tokens (the longest; see --time)", size_text(example_bytes))
    if store.examples is None:
        table.add_row("all examples", "not known without the data")
    else:
        all_bytes = example_bytes * store.examples
        table.add_row(f"all {store.examples:,} examples if each were that long", size_text(all_bytes))
    return table
