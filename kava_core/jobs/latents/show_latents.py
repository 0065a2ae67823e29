"""Print and save what a finished run's latent tokens decode to, and what they resemble: ``kava latents``."""

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
from kava_core.files import finite_or_null, make_folder, write_json
from kava_core.jobs.latents.cosine_map import (
    CosineMaps,
    CosineSums,
    TeacherMaps,
    comparable_aligners,
    compute_cosine_maps,
)
from kava_core.jobs.latents.cosine_picture import draw_cosine_maps
from kava_core.jobs.latents.decoded_tokens import likely_tokens, reasoning_tokens, slot_logits
from kava_core.jobs.latents.latent_run import LatentRun, load_latent_run

PRINTED = 4
"""Examples that are printed; all of them are in the file."""

WIDEST = 40
"""Characters of a column of the table that holds text."""


def show_latents(run: Path, folder: Path, *, examples: int, top: int) -> None:
    """Print and save, for the first validation examples: ``latents.json``, ``cosine.json``, ``cosine.png``.

    Args:
        run: directory of a finished run with ``trajectory: latent``.
        folder: where the files go.
        examples: how many validation examples, or as many as there are.
        top: tokens for every slot.

    Raises:
        SpecError, CheckpointError: as ``load_latent_run``.
        KavaError: the folder cannot be written.
    """
    loaded = load_latent_run(run)
    make_folder(folder)
    console = Console()
    decoded = decode_examples(loaded, examples=examples, top=top)
    write_json(folder / "latents.json", decoded)
    print_whole(_token_table(decoded[:PRINTED], total=len(decoded)), console)
    console.print(f"latents: {folder / 'latents.json'}", soft_wrap=True)
    _show_cosines(loaded, folder, console, examples=len(decoded))


def decode_examples(loaded: LatentRun, *, examples: int, top: int) -> list[dict[str, Any]]:
    """Decode the latent tokens of the first validation examples.

    Returns:
        For every example its fields, ``written``: every teacher's tokens of the reasoning, and ``slots``: the
        ``top`` likeliest tokens of every slot.
    """
    distiller = loaded.distiller
    assert distiller.latents is not None
    originals = loaded.data.validation_items.examples
    decoded: list[dict[str, Any]] = []
    for batch in loaded.batches(examples):
        logits = slot_logits(distiller.student, distiller.latents, batch["student"])
        likely = likely_tokens(logits, loaded.data.tokenizer, top=top)
        written: dict[str, list[list[str]]] = {}
        for name, side in batch["teachers"].items():
            written[name] = reasoning_tokens(side, loaded.data.teacher_tokenizers[name])
        for row, slots in enumerate(likely):
            original = originals[len(decoded)]
            decoded.append(
                {
                    "prompt": original.prompt,
                    "answer": original.answer,
                    "reasoning": original.reasoning,
                    "written": {name: tokens[row] for name, tokens in written.items()},
                    "slots": slots,
                }
            )
    return decoded


def _token_table(decoded: Sequence[dict[str, Any]], *, total: int) -> Table:
    """Return a section for every example with a row for every slot."""
    table = Table(title=f"what the latent tokens say: {len(decoded)} of {total} validation examples")
    table.add_column("prompt → answer", max_width=WIDEST, overflow="fold")
    table.add_column("written steps", max_width=WIDEST, overflow="fold")
    table.add_column("slot", justify="right")
    table.add_column("likeliest tokens")
    for example in decoded:
        cells_of_example = (f"{example['prompt']} → {example['answer']}", _written_steps(example))
        for slot, likely in enumerate(example["slots"]):
            cells = cells_of_example if slot == 0 else ("", "")
            table.add_row(*map(Text, cells), str(slot), Text(_token_shares(likely)))
        table.add_section()
    return table


def _written_steps(example: dict[str, Any]) -> str:
    """Return every teacher's tokens of the steps; without teachers, the example's text."""
    lines = [f"{name}: {' '.join(map(_in_quotes, tokens))}" for name, tokens in example["written"].items()]
    return "\n".join(lines) or example["reasoning"]


def _token_shares(tokens: Sequence[tuple[str, float]]) -> str:
    return "  ".join(f"{_in_quotes(token)} {share:.2f}" for token, share in tokens)


def _in_quotes(token: str) -> str:
    """Return a token in quotation marks, so that white space is seen."""
    return json.dumps(token, ensure_ascii=False)


def _show_cosines(loaded: LatentRun, folder: Path, console: Console, *, examples: int) -> None:
    missing = loaded.missing
    if missing is None and not comparable_aligners(loaded.distiller):
        missing = "no teacher is brought to the student's heads and width"
    if missing is not None:
        console.print(f"no cosine map: {missing}", soft_wrap=True, markup=False)
        return
    maps = compute_cosine_maps(loaded.distiller, loaded.batches(examples))
    layers = _compared_layers(loaded)
    record = {"examples": examples, "layers": layers, "teachers": _plain_maps(maps)}
    write_json(folder / "cosine.json", record)
    print_whole(_mean_table(maps), console)
    console.print(f"cosines: {folder / 'cosine.json'}", soft_wrap=True)
    title = f"{loaded.spec.name}: keys and values of latent tokens, {examples} validation examples"
    if draw_cosine_maps(maps, layers, folder / "cosine.png", title=title):
        console.print(f"picture: {folder / 'cosine.png'}", soft_wrap=True)
    else:
        console.print("no picture: matplotlib is not installed (pip install 'kava[plots]')")


def _compared_layers(loaded: LatentRun) -> list[int]:
    """Return the numbers of the compared layers, counted anew if the head adapter merges them."""
    pipeline = loaded.distiller.pipeline
    count = pipeline.teachers[0].view.layer
    return list(pipeline.layers) if count == len(pipeline.layers) else list(range(count))


def _mean_table(maps: TeacherMaps) -> Table:
    """Return the means over layers and slots, beside the control."""
    table = Table(title="mean cosine of the latent tokens with the aligned teacher")
    for name in ("teacher", "part", "its own example", "next example's teacher"):
        table.add_column(name, justify="left" if name in ("teacher", "part") else "right")
    for teacher, parts in maps.items():
        for part, of_part in parts.items():
            table.add_row(teacher, part, _mean_cell(of_part.slots), _mean_cell(of_part.slots_next))
    return table


def _mean_cell(sums: CosineSums | None) -> str:
    return "–" if sums is None else f"{float(sums.mean.nanmean()):.3f}"


def _plain_maps(maps: TeacherMaps) -> dict[str, Any]:
    """Return all maps as plain values, by teacher and part."""
    plain: dict[str, Any] = {}
    for teacher, parts in maps.items():
        plain[teacher] = {part: _plain_map(of_part) for part, of_part in parts.items()}
    return plain


def _plain_map(maps: CosineMaps) -> dict[str, Any]:
    """Return a map as lists of rows, with null if no example has a value, and the number of examples."""
    plain = {}
    for name, sums in vars(maps).items():
        if sums is not None:
            plain[name] = {"cosine": _rounded_rows(sums.mean), "examples": sums.count.tolist()}
    return plain


def _rounded_rows(cosines: Tensor) -> list[list[float | None]]:
    rounded = [[round(value, 6) for value in row] for row in cosines.tolist()]
    rows: list[list[float | None]] = finite_or_null(rounded)
    return rows
