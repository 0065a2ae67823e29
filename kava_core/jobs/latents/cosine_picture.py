"""A picture of how much latent tokens resemble a teacher's keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kava_core.config import Part
from kava_core.jobs.heatmap import WRITTEN, write_values
from kava_core.jobs.latents.cosine_map import CosineMaps, Maps, Sums

OFTEN = 4
"""A token of the reasoning is drawn where at least one example of so many reasons that long."""


def draw_cosines(maps: Maps, layers: Sequence[int], path: Path, *, title: str) -> bool:
    """For every teacher a row of layer × slot and one of slot × reasoning token, which share their colours.

    Parts stand side by side, each with its control to the right of it.

    Args:
        maps: what is drawn, of at least one teacher.
        layers: the student layers' numbers.
        path: of the PNG file.
        title: of the picture.

    Returns:
        False where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows = [row for name, parts in maps.items() for row in _rows(name, parts, layers)]
    wide = max(image.shape[1] for row in rows for _, image in row.panels)
    columns = max(len(row.panels) for row in rows)
    size = (1 + columns * min(max(2.8, 0.3 * wide), 6.0), 0.6 + 2.9 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, places in zip(rows, axes, strict=True):
        row.draw(figure, places)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return True


class Row:
    """Maps with the same axes and colours, each with its title."""

    def __init__(
        self, panels: list[tuple[str, Float[Tensor, "_ _"]]], xlabel: str, ylabel: str, names: Sequence[int]
    ) -> None:
        self.panels, self.xlabel, self.ylabel, self.names = panels, xlabel, ylabel, names

    def draw(self, figure: Any, axes: Sequence[Any]) -> None:
        """Draw every map into its axis."""
        low, high = self._range()
        for axis, (title, shown) in zip(axes, self.panels, strict=False):
            image = axis.imshow(
                shown.numpy(), origin="lower", cmap="viridis", vmin=low, vmax=high, aspect="auto"
            )
            axis.set_title(title, fontsize="medium")
            axis.set(xlabel=self.xlabel, ylabel=self.ylabel, xticks=_named(shown.shape[1]))
            places = _named(len(self.names))
            axis.set_yticks(places, [str(self.names[place]) for place in places])
            if max(shown.shape) <= WRITTEN // 2:
                write_values(axis, shown, dark_below=low + 0.6 * (high - low))
        figure.colorbar(image, ax=axes[len(self.panels) - 1], label="mean cosine")

    def _range(self) -> tuple[float, float]:
        """From the least to the largest cosine, at least a tenth apart."""
        values = torch.cat([shown.flatten() for _, shown in self.panels])
        values = values[values.isfinite()]
        low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
        return min(low, high - 0.1), high


def _named(count: int) -> list[int]:
    """Places whose numbers are written: at most a dozen, evenly spaced."""
    return list(range(0, count, -(-count // 12) or 1))


def _rows(name: str, parts: dict[Part, CosineMaps], layers: Sequence[int]) -> list[Row]:
    slots, steps = [], []
    for part, maps in parts.items():
        for beside, by_layer, by_step in (
            ("own example", maps.slots, maps.steps),
            ("next example", maps.slots_next, maps.steps_next),
        ):
            if by_layer is not None and by_step is not None:
                slots.append((f"{part}: {beside}", by_layer.mean))
                steps.append((f"{part}: {beside}", _often(by_step)))
    by_slot = Row(slots, f"slot, against {name} aligned", "student layer", layers)
    count, longest = steps[0][1].shape
    return [by_slot, Row(steps, f"reasoning token of {name}", "slot", range(count))] if longest else [by_slot]


def _often(steps: Sums) -> Tensor:
    """The columns that many examples have."""
    examples = int(steps.count.max()) if len(steps.count) else 0
    return steps.mean[:, steps.count * OFTEN >= examples]
