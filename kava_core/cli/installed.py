"""Define the verbs about what is installed, and those that write new plugins and specs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from kava_core.errors import KavaError


def plugins(
    format: Annotated[Literal["table", "json"], typer.Option("--format", help="How to print.")] = "table",
) -> None:
    """List the installed components and who registered them."""
    from kava_core.registry import Registry

    registry = Registry.build()
    if format == "json":
        rows = [_fields_of_component(component) for component in registry.table()]
        failures = [vars(failure) for failure in registry.failures]
        clashes = list(registry.clashes.values())
        listed = {"components": rows, "failures": failures, "clashes": clashes}
        typer.echo(json.dumps(listed, indent=2, ensure_ascii=False))
        return
    for line in _aligned_lines([_fields_of_component(component).values() for component in registry.table()]):
        typer.echo(line)
    for line in (*map(str, registry.failures), *registry.clashes.values()):
        typer.echo(line)


def schema(
    output: Annotated[Path | None, typer.Option("--output", help="Write to this file instead.")] = None,
) -> None:
    """Print the JSON Schema of specs with what is installed."""
    from kava_core.registry import Registry
    from kava_core.specfile.schema import json_schema

    text = json.dumps(json_schema(Registry.build()), indent=2, ensure_ascii=False)
    if output is None:
        typer.echo(text)
        return
    try:
        output.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise KavaError(f"{output}: cannot be written: {error.strerror}") from error


def env(
    devices: Annotated[
        bool, typer.Option("--devices", help="Also list accelerators (imports torch).")
    ] = False,
) -> None:
    """Print the versions a run depends on."""
    import platform

    from kava_core.versions import versions

    rows = [("python", platform.python_version()), ("platform", platform.platform())]
    rows += [(name, version or "not installed") for name, version in versions().items()]
    if devices:
        rows += _device_rows()
    for line in _aligned_lines(rows):
        typer.echo(line)


OutputFolder = Annotated[Path, typer.Option("--output", help="Folder to write into.")]


def new_plugin(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the component.", show_default=False)],
    kind: Annotated[
        str,
        typer.Option(
            metavar="KIND", help="head_adapter, time_warper, layer_mapper, dim_projector, fuser or kv_loss."
        ),
    ] = "layer_mapper",
    output: OutputFolder = Path(),
) -> None:
    """Write a package with one component and its test."""
    from kava_core.cli.new_plugin import write_plugin

    folder = write_plugin(name, kind, output)
    typer.echo(f"{folder}: pip install -e '{folder}[test]' && pytest {folder}")


def new_spec(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the run.", show_default=False)],
    output: OutputFolder = Path(),
) -> None:
    """Write a small spec that runs as it is, with comments."""
    from kava_core.cli.new_spec import write_spec

    file = write_spec(name, output)
    typer.echo(f"{file}: kava check {file} && kava train {file}")


def _fields_of_component(registered: Any) -> dict[str, str]:
    fields = ("kind", "name", "distribution", "version", "doc")
    return {field: getattr(registered, field) for field in fields}


def _aligned_lines(rows: Iterable[Iterable[str]]) -> list[str]:
    """Return a line for each row, with columns as wide as their widest cell and two spaces between."""
    table = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def _device_rows() -> list[tuple[str, str]]:
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return [(f"cuda:{index}", name) for index, name in enumerate(names)] or [("cuda", "no device")]
