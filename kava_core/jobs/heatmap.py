"""A picture of how similar the layers of two models are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

WRITTEN = 16
"""Most layers on a side for which the values are written into the cells."""


def draw_similarity(
    similarity: Float[Tensor, "layer t_layer"],
    weights: Float[Tensor, "layer t_layer"],
    path: Path,
    *,
    teacher: str,
    title: str,
) -> bool:
    """Student layers upwards, teacher layers to the right; the layers that are read have a frame.

    Args:
        similarity: what the colours show.
        weights: above 0 where a student layer reads a teacher layer.
        path: of the PNG file.
        teacher: the teacher's name.
        title: what was measured.

    Returns:
        False where matplotlib is not installed.
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
    low, high = _range(similarity)
    image = axis.imshow(similarity.numpy(), origin="lower", cmap="viridis", vmin=low, vmax=high)
    beside = axis.inset_axes((1 + 0.3 / t_layer, 0, 0.4 / t_layer, 1))  # as high as the map
    figure.colorbar(image, cax=beside, label="similarity")
    axis.set(xlabel=f"layer of teacher {teacher}", ylabel="student layer", title=title)
    axis.set(xticks=_ticks(t_layer), yticks=_ticks(layer))
    if max(layer, t_layer) <= WRITTEN:
        write_values(axis, similarity, dark_below=low + 0.6 * (high - low))
    _frame(axis, weights)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return True


def _ticks(count: int) -> list[int]:
    return list(range(0, count, 1 if count <= 32 else 4))


def _range(similarity: Tensor) -> tuple[float, float]:
    """From the least to the largest value, at least a tenth apart."""
    low, high = float(similarity.min()), float(similarity.max())
    return min(low, high - 0.1), high


def write_values(axis: Any, similarity: Tensor, dark_below: float) -> None:
    """Every cell's value in it; white where the cell is dark."""
    style = {"ha": "center", "va": "center", "fontsize": 8}
    for i, row in enumerate(similarity.tolist()):
        for j, value in enumerate(row):
            axis.text(j, i, f"{value:.2f}", color="white" if value < dark_below else "black", **style)


def _frame(axis: Any, weights: Tensor) -> None:
    from matplotlib.patches import Rectangle

    for i, j in weights.gt(0).nonzero().tolist():
        axis.add_patch(Rectangle((j - 0.45, i - 0.45), 0.9, 0.9, fill=False, edgecolor="red", linewidth=1.8))
