"""``kava latents``: what a finished run's latent tokens say, and what they resemble."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from kava_core.console import print_whole
from kava_core.data.examples import Example
from kava_core.jobs.latents.cosine_map import Maps, Sums, comparable, cosine_maps
from kava_core.jobs.latents.cosine_picture import draw_cosines
from kava_core.jobs.latents.decoded_tokens import likely_tokens, slot_logits, written_tokens
from kava_core.jobs.latents.finished_run import FinishedRun, finished_run
from kava_core.json_files import finite_or_null, write_json
from kava_core.paths import make_folder

SHOWN = 4
"""Examples that are printed; all of them are in the file."""

WIDEST = 40
"""Characters of a column of the table that holds text."""


def show_latents(run: Path, folder: Path, *, examples: int, top: int) -> None:
    """Print and save, for the first validation examples: ``latents.json``, ``cosine.json``, ``cosine.png``.

    Args:
        run: directory of a finished run with ``trajectory: latent``.
        folder: where the files go.
        examples: how many validation examples, as far as there are.
        top: tokens for every slot.

    Raises:
        SpecError, CheckpointError: as ``finished_run``.
        KavaError: the folder cannot be written.
    """
    made = finished_run(run)
    make_folder(folder)
    console = Console()
    found = decoded(made, examples=examples, top=top)
    write_json(folder / "latents.json", found)
    print_whole(_table(found[:SHOWN], of=len(found)), console)
    console.print(f"latents: {folder / 'latents.json'}", soft_wrap=True)
    _show_cosines(made, folder, console, examples=len(found))


def decoded(made: FinishedRun, *, examples: int, top: int) -> list[dict[str, Any]]:
    """For every example its fields, ``written``: every teacher's tokens of the reasoning, and ``slots``."""
    distiller = made.distiller
    found: list[dict[str, Any]] = []
    assert distiller.latents is not None
    told = made.data.validation_items.examples
    for batch in made.batches(examples):
        logits = slot_logits(distiller.student, distiller.latents, batch["student"])
        likely = likely_tokens(logits, made.data.tokenizer, top=top)
        written = {
            name: written_tokens(side, made.data.teacher_tokenizers[name])
            for name, side in batch["teachers"].items()
        }
        for row, slots in enumerate(likely):
            of_row = {name: tokens[row] for name, tokens in written.items()}
            found.append(_fields(told[len(found)]) | {"written": of_row, "slots": slots})
    return found


def _fields(example: Example) -> dict[str, Any]:
    return {"prompt": example.prompt, "answer": example.answer, "reasoning": example.reasoning}


def _table(found: Sequence[dict[str, Any]], *, of: int) -> Table:
    """A section for every example, a row for every slot."""
    shown = Table(title=f"what the latent tokens say: {len(found)} of {of} validation examples")
    shown.add_column("prompt → answer", max_width=WIDEST, overflow="fold")
    shown.add_column("written steps", max_width=WIDEST, overflow="fold")
    shown.add_column("slot", justify="right")
    shown.add_column("likeliest tokens")
    for one in found:
        beside = (f"{one['prompt']} → {one['answer']}", _written(one))
        for slot, likely in enumerate(one["slots"]):
            cells = beside if slot == 0 else ("", "")
            shown.add_row(*map(Text, cells), str(slot), Text(_likely(likely)))
        shown.add_section()
    return shown


def _written(one: dict[str, Any]) -> str:
    """Every teacher's tokens of the steps; without teachers, the example's text."""
    lines = (f"{name}: {' '.join(map(_quoted, tokens))}" for name, tokens in one["written"].items())
    return "\n".join(lines) or one["reasoning"]


def _likely(tokens: Sequence[tuple[str, float]]) -> str:
    return "  ".join(f"{_quoted(token)} {share:.2f}" for token, share in tokens)


def _quoted(token: str) -> str:
    """In quotation marks, so that white space is seen."""
    return json.dumps(token, ensure_ascii=False)


def _show_cosines(made: FinishedRun, folder: Path, console: Console, *, examples: int) -> None:
    missing = made.missing
    usable = comparable(made.distiller)
    if missing is None and not usable:
        missing = "no teacher is brought to the student's heads and width"
    if missing is not None:
        console.print(f"no cosine map: {missing}", soft_wrap=True, markup=False)
        return
    maps = cosine_maps(made.distiller, made.batches(examples))
    layers = _layers(made)
    write_json(folder / "cosine.json", {"examples": examples, "layers": layers, "teachers": _numbers(maps)})
    print_whole(_means(maps), console)
    console.print(f"cosines: {folder / 'cosine.json'}", soft_wrap=True)
    title = f"{made.spec.name}: keys and values of latent tokens, {examples} validation examples"
    if draw_cosines(maps, layers, folder / "cosine.png", title=title):
        console.print(f"picture: {folder / 'cosine.png'}", soft_wrap=True)
    else:
        console.print("no picture: matplotlib is not installed (pip install 'kava[plots]')")


def _layers(made: FinishedRun) -> list[int]:
    """Numbers of the compared layers; counted anew where the head adapter merges them."""
    pipeline = made.distiller.pipeline
    merged = pipeline.teachers[0].view.layer
    return list(pipeline.layers) if merged == len(pipeline.layers) else list(range(merged))


def _means(maps: Maps) -> Table:
    """Over layers and slots, beside the control."""
    shown = Table(title="mean cosine of the latent tokens with the aligned teacher")
    for name in ("teacher", "part", "its own example", "next example's teacher"):
        shown.add_column(name, justify="left" if name in ("teacher", "part") else "right")
    for teacher, parts in maps.items():
        for part, one in parts.items():
            shown.add_row(teacher, part, _mean(one.slots), _mean(one.slots_next))
    return shown


def _mean(sums: Sums | None) -> str:
    return "–" if sums is None else f"{float(sums.mean.nanmean()):.3f}"


def _numbers(maps: Maps) -> dict[str, Any]:
    """As JSON: maps as lists of rows, null where no example has a value."""
    return {
        teacher: {
            part: {name: _of_sums(sums) for name, sums in vars(one).items() if sums is not None}
            for part, one in parts.items()
        }
        for teacher, parts in maps.items()
    }


def _of_sums(sums: Sums) -> dict[str, Any]:
    return {"cosine": _rows(sums.mean), "examples": sums.count.tolist()}


def _rows(x: Tensor) -> list[list[float | None]]:
    rounded = [[round(value, 6) for value in row] for row in x.tolist()]
    rows: list[list[float | None]] = finite_or_null(rounded)
    return rows
