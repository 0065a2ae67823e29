"""Draw how similar the layers of two models are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

MOST_WITH_VALUES = 16
"""Most layers on a side for which the values are written into the cells."""


def draw_similarity(
    similarity: Float[Tensor, "layer t_layer"],
    weights: Float[Tensor, "layer t_layer"],
    path: Path,
    *,
    teacher: str,
    title: str,
) -> bool:
    """Draw student layers upwards, teacher layers to the right, and a frame around what is read.

    Args:
        similarity: what the colours show.
        weights: above 0 if a student layer reads a teacher layer.
        path: of the PNG file.
        teacher: the teacher's name.
        title: what was measured.

    Returns:
        False if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    layer, t_layer = similarity.shape
    cell = min(0.46, 16 / max(layer, t_layer))
    size = (2.6 + cell * max(t_layer, 6), 1.6 + cell * max(layer, 3))
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.add_subplot()
    low, high = _colour_range(similarity)
    image = axis.imshow(similarity.numpy(), origin="lower", cmap="viridis", vmin=low, vmax=high)
    colour_bar = axis.inset_axes((1 + 0.3 / t_layer, 0, 0.4 / t_layer, 1))  # as high as the map
    figure.colorbar(image, cax=colour_bar, label="similarity")
    axis.set(xlabel=f"layer of teacher {teacher}", ylabel="student layer", title=title)
    axis.set(xticks=_layer_ticks(t_layer), yticks=_layer_ticks(layer))
    if max(layer, t_layer) <= MOST_WITH_VALUES:
        write_values(axis, similarity, dark_below=low + 0.6 * (high - low))
    _frame_read_layers(axis, weights)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return True


def _layer_ticks(count: int) -> list[int]:
    return list(range(0, count, 1 if count <= 32 else 4))


def _colour_range(similarity: Tensor) -> tuple[float, float]:
    """Return the least and the largest value, at least a tenth apart."""
    low, high = float(similarity.min()), float(similarity.max())
    return min(low, high - 0.1), high


def write_values(axis: Any, values: Tensor, dark_below: float) -> None:
    """Write every cell's value into it, in white if the cell is dark."""
    for row, cells in enumerate(values.tolist()):
        for column, value in enumerate(cells):
            colour = "white" if value < dark_below else "black"
            axis.text(column, row, f"{value:.2f}", color=colour, ha="center", va="center", fontsize=8)


def _frame_read_layers(axis: Any, weights: Tensor) -> None:
    from matplotlib.patches import Rectangle

    for layer, t_layer in weights.gt(0).nonzero().tolist():
        corner = (t_layer - 0.45, layer - 0.45)
        axis.add_patch(Rectangle(corner, 0.9, 0.9, fill=False, edgecolor="red", linewidth=1.8))
