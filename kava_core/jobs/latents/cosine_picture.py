"""Draw how much latent tokens resemble a teacher's keys and values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kava_core.config import Part
from kava_core.jobs.heatmap import MOST_WITH_VALUES, write_values
from kava_core.jobs.latents.cosine_map import CosineMaps, CosineSums, TeacherMaps

OFTEN = 4
"""A token of the reasoning is drawn if at least one example of so many reasons that long."""


def draw_cosine_maps(maps: TeacherMaps, layers: Sequence[int], path: Path, *, title: str) -> bool:
    """Draw for every teacher a row of layer × slot and one of slot × reasoning token, with shared colours.

    Parts are side by side, each with its control to the right of it.

    Args:
        maps: what is drawn, of at least one teacher.
        layers: the student layers' numbers.
        path: of the PNG file.
        title: of the picture.

    Returns:
        False if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows: list[PanelRow] = []
    for name, parts in maps.items():
        rows += _teacher_rows(name, parts, layers)
    widest = max(row.widest for row in rows)
    columns = max(len(row.panels) for row in rows)
    size = (1 + columns * min(max(2.8, 0.3 * widest), 6.0), 0.6 + 2.9 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, axes_of_row in zip(rows, axes, strict=True):
        row.draw(figure, axes_of_row)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return True


@dataclass(frozen=True)
class PanelRow:
    """Maps with the same axes and colours."""

    panels: list[tuple[str, Float[Tensor, "_ _"]]]
    """Each map with its title."""
    xlabel: str
    ylabel: str
    row_names: Sequence[int]
    """Names of the maps' rows, from below."""

    @property
    def widest(self) -> int:
        """Return the most columns of a map."""
        return max(cosines.shape[1] for _, cosines in self.panels)

    def draw(self, figure: Any, axes: Iterable[Any]) -> None:
        """Draw every map into its axis."""
        low, high = self._colour_range()
        row_ticks = _sparse_ticks(len(self.row_names))
        for axis, (title, cosines) in zip(axes, self.panels, strict=False):
            image = axis.imshow(
                cosines.numpy(), origin="lower", cmap="viridis", vmin=low, vmax=high, aspect="auto"
            )
            axis.set_title(title, fontsize="medium")
            axis.set(xlabel=self.xlabel, ylabel=self.ylabel, xticks=_sparse_ticks(cosines.shape[1]))
            axis.set_yticks(row_ticks, [str(self.row_names[row]) for row in row_ticks])
            if max(cosines.shape) <= MOST_WITH_VALUES // 2:
                write_values(axis, cosines, dark_below=low + 0.6 * (high - low))
        figure.colorbar(image, ax=axes[len(self.panels) - 1], label="mean cosine")

    def _colour_range(self) -> tuple[float, float]:
        """Return the least and the largest cosine, at least a tenth apart."""
        values = torch.cat([cosines.flatten() for _, cosines in self.panels])
        values = values[values.isfinite()]
        low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
        return min(low, high - 0.1), high


def _sparse_ticks(count: int) -> list[int]:
    """Return the places whose numbers are written: at most a dozen, evenly spaced."""
    return list(range(0, count, -(-count // 12) or 1))


def _teacher_rows(name: str, parts: dict[Part, CosineMaps], layers: Sequence[int]) -> list[PanelRow]:
    """Return the row of layer × slot, and that of slot × reasoning token if there is any reasoning."""
    by_slot: list[tuple[str, Tensor]] = []
    by_step: list[tuple[str, Tensor]] = []
    for part, maps in parts.items():
        by_slot.append((f"{part}: own example", maps.slots.mean))
        by_step.append((f"{part}: own example", _frequent_columns(maps.steps)))
        if maps.slots_next is not None and maps.steps_next is not None:
            by_slot.append((f"{part}: next example", maps.slots_next.mean))
            by_step.append((f"{part}: next example", _frequent_columns(maps.steps_next)))
    rows = [PanelRow(by_slot, f"slot, against {name} aligned", "student layer", layers)]
    _, first_steps = by_step[0]
    slots, longest = first_steps.shape
    if longest:
        rows.append(PanelRow(by_step, f"reasoning token of {name}", "slot", range(slots)))
    return rows


def _frequent_columns(steps: CosineSums) -> Tensor:
    """Return the mean cosines of the columns that many examples have."""
    examples = int(steps.count.max()) if len(steps.count) else 0
    return steps.mean[:, steps.count * OFTEN >= examples]
