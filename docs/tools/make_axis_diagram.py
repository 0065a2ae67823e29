"""Draw docs/pictures/axes.png, the picture of the README: ``python docs/tools/make_axis_diagram.py``."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

PICTURE = Path(__file__).parents[1] / "pictures" / "axes.png"
BLUE, GREEN, ORANGE, FUSED = "#3b76af", "#4b9560", "#dd8434", "#4f7d84"
GREY, DARK = "#dddddd", "#222222"
SLAB_SHIFT = 1.1
"""How far every layer is drawn to the right of and above the layer in front of it."""
COLUMN = 1.7
"""Width of one position of time."""


@dataclass(frozen=True)
class DrawnCache:
    """A cache as it is drawn: slabs are layers, rows heads, columns time; row height is the head width."""

    layer: int
    head: int
    time: int
    dim: float
    colour: str = BLUE
    compared: int | None = None
    """How many positions are valid; those after them are grey. None: all."""

    @property
    def height(self) -> float:
        """Return the height of one slab."""
        return self.head * self.dim

    def draw(self, axis: Axes, centre: tuple[float, float]) -> None:
        """Draw the slabs from the last to the first, around a point."""
        across = self.time * COLUMN + (self.layer - 1) * SLAB_SHIFT
        up = self.height + (self.layer - 1) * SLAB_SHIFT
        for slab in reversed(range(self.layer)):
            left = centre[0] - across / 2 + slab * SLAB_SHIFT
            bottom = centre[1] - up / 2 + slab * SLAB_SHIFT
            for row in range(self.head):
                for column in range(self.time):
                    self._draw_cell(axis, left + column * COLUMN, bottom + row * self.dim, row, column)

    def _draw_cell(self, axis: Axes, left: float, bottom: float, row: int, column: int) -> None:
        valid = self.compared is None or column < self.compared
        shade = 0.35 + 0.2 * ((row + column) % 2)
        colour = _lighter(self.colour, shade) if valid else GREY
        axis.add_patch(
            Rectangle((left, bottom), COLUMN, self.dim, facecolor=colour, edgecolor="white", linewidth=1.0)
        )


TEACHER = DrawnCache(layer=4, head=4, time=7, dim=2.4)
LAYERS = replace(TEACHER, layer=2)
HEADS = replace(LAYERS, head=2)
TIMES = replace(HEADS, time=5, compared=4)
ALIGNED = replace(TIMES, dim=1.5)
STUDENT = replace(ALIGNED, colour=ORANGE, compared=None)
OTHER = replace(ALIGNED, colour=GREEN, compared=5)

TOP, BOTTOM = 31.0, 9.5
PLACES = (11.0, 38.0, 62.0, 85.0, 107.0)
"""Where the five caches of the upper row stand."""
STAGES = (
    ("layer mapper", "t_layer → layer"),
    ("head adapter", "t_head → head"),
    ("time warper", "t_time → time"),
    ("dim projector", "t_dim → dim"),
)


def _lighter(colour: str, share: float) -> tuple[float, ...]:
    """Mix a colour with white."""
    return tuple(1 - share - 0.2 + (share + 0.2) * part for part in to_rgb(colour))


def _arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float], style: str = "-|>") -> None:
    arrow = {"arrowstyle": style, "color": DARK, "linewidth": 1.4, "mutation_scale": 13}
    axis.annotate("", xy=end, xytext=start, arrowprops=arrow)


def _title(axis: Axes, x: float, y: float, text: str, **style: object) -> None:
    axis.text(x, y, text, ha="center", va="center", color=DARK, **{"fontsize": 12.5, **style})


def _stage(axis: Axes, x: float, y: float, name: str, contract: str) -> None:
    """Write the name of a kind of component, and below it what it changes."""
    _title(axis, x, y, name, fontweight="bold")
    _title(axis, x, y - 2.6, contract, family="monospace", fontsize=10.5)


def draw_upper_row(axis: Axes) -> None:
    """Draw one teacher's cache on its way to the student's shape: each stage changes one axis."""
    caches = (TEACHER, LAYERS, HEADS, TIMES, ALIGNED)
    for cache, place in zip(caches, PLACES, strict=True):
        cache.draw(axis, (place, TOP))
    for (name, contract), left, right in zip(STAGES, PLACES, PLACES[1:], strict=False):
        middle = (left + right) / 2 + (1.2 if left == PLACES[0] else 0)
        _arrow(axis, (middle - 3.2, TOP), (middle + 3.2, TOP))
        _stage(axis, middle, TOP + 11.2, name, contract)
    _title(axis, PLACES[0], TOP - 9.2, "a teacher's cache")
    _title(axis, PLACES[-1], TOP - 5.4, "aligned cache")


def draw_lower_row(axis: Axes) -> None:
    """Draw what is compared: the fused target with the student's cache."""
    student, loss, target, fuser, other = 38.0, 51.5, 65.0, 83.0, 107.0
    STUDENT.draw(axis, (student, BOTTOM))
    replace(OTHER, colour=FUSED).draw(axis, (target, BOTTOM))
    OTHER.draw(axis, (other, BOTTOM))
    _title(axis, student, BOTTOM - 4.8, "the student's cache")
    _title(axis, target, BOTTOM - 4.8, "target")
    _title(axis, other, BOTTOM - 4.8, "another teacher's")
    _title(axis, loss, BOTTOM + 2.6, "KV loss", fontweight="bold")
    _arrow(axis, (loss - 5.5, BOTTOM), (loss + 5.5, BOTTOM), "<|-|>")
    box = {"boxstyle": "round,pad=0.5", "facecolor": "white", "edgecolor": DARK}
    _title(axis, fuser, BOTTOM, "fuser", fontweight="bold", bbox=box)
    _arrow(axis, (other - 7.5, BOTTOM), (fuser + 5.2, BOTTOM))
    _arrow(axis, (fuser - 5.2, BOTTOM), (target + 8.0, BOTTOM))
    _arrow(axis, (PLACES[-1] - 4.5, TOP - 7.6), (fuser + 4.5, BOTTOM + 2.6))


def draw_legend(axis: Axes) -> None:
    """Say which direction of a drawn cache is which axis."""
    lines = ("layer   slabs", "head    rows", "time    columns", "dim     row height", "grey    not compared")
    for number, line in enumerate(lines):
        axis.text(2.0, BOTTOM + 5.2 - 2.6 * number, line, family="monospace", fontsize=10.5, color=DARK)


def main() -> None:
    """Draw the picture and save it with few colours, which makes it small."""
    figure = Figure(figsize=(11, 4.7))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 118), ylim=(0, 46))
    axis.set_axis_off()
    draw_upper_row(axis)
    draw_lower_row(axis)
    draw_legend(axis)
    raw = io.BytesIO()
    figure.savefig(raw, dpi=150)
    Image.open(raw).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(PICTURE, optimize=True)


if __name__ == "__main__":
    main()
