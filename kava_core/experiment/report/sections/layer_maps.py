"""Draw measured layer maps: how similar the layers are, and which are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from kava_core.errors import CheckpointError
from kava_core.experiment.report.experiment_data import ExperimentData
from kava_core.experiment.report.figures.figure_style import Style, draw_picture
from kava_core.experiment.report.figures.gallery import gallery_section
from kava_core.experiment.report.pages.display_text import figure_text, shorten
from kava_core.experiment.report.pages.page_elements import Picture, Section
from kava_core.files import read_json_object

TITLE = "Layer maps"
MOST_LAYERS_WRITTEN = 16
"""Most layers on a side for which values are written into the cells."""

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class MeasuredMap:
    """One teacher's map of one run; both matrices student layer × teacher layer."""

    variant: str
    seed: int
    teacher: str
    on: str
    similarity: Numbers
    weights: Numbers


def layer_maps_section(data: ExperimentData) -> Section:
    """Return the map of every variant's first seed that has one, for every teacher."""
    maps = [found for variant in data.experiment.variants for found in _first_maps(data, variant)]
    how = (
        "Student layers upwards, teacher layers to the right; a frame marks the teacher layers that a "
        "student layer reads. Of every variant, the first seed that has a map."
    )
    absent = "No run has measured a layer map."
    return gallery_section("layer-maps", TITLE, maps, partial(_map_picture, data), how=how, absent=absent)


def _first_maps(data: ExperimentData, variant: str) -> Iterator[MeasuredMap]:
    for seed, run in sorted(data.experiment.runs_of_variant(variant).items()):
        files = sorted(run.folder.layer_maps.glob("*.safetensors"))
        if files:
            yield from (_read_map(file, variant, seed) for file in files)
            return


def _read_map(file: Path, variant: str, seed: int) -> MeasuredMap:
    from safetensors.numpy import load_file

    try:
        arrays = load_file(file)
        similarity = np.asarray(arrays["similarity"], np.float64)
        weights = np.asarray(arrays["matrix"], np.float64)
    except Exception as error:
        raise CheckpointError(f"{file}: unreadable: {error}") from error
    description = file.with_suffix(".json")
    on: Any = "layers"
    if description.exists():
        on = read_json_object(description).get("on", "layers")
    return MeasuredMap(variant, seed, file.stem, str(on), similarity, weights)


def _map_picture(data: ExperimentData, layer_map: MeasuredMap) -> Picture:
    best = ", ".join(f"{i}: {int(j)}" for i, j in enumerate(layer_map.weights.argmax(1)))
    alt = (
        f"Similarity of {layer_map.on}, {layer_map.variant} seed {layer_map.seed}, "
        f"teacher {layer_map.teacher}; student layer: heaviest teacher layer {best}"
    )
    return draw_picture(
        data.unique_name("layers", layer_map.variant, layer_map.teacher), alt, partial(_draw_map, layer_map)
    )


def _draw_map(layer_map: MeasuredMap, style: Style) -> Figure:
    layer, t_layer = layer_map.similarity.shape
    cell = min(0.5, 8 / max(layer, t_layer))
    figure = Figure(figsize=(2.2 + cell * max(t_layer, 7), 1.4 + cell * max(layer, 3)), layout="constrained")
    axis = figure.add_subplot()
    low, high = float(layer_map.similarity.min()), float(layer_map.similarity.max())
    low = min(low, high - 0.1)
    image = axis.imshow(layer_map.similarity, origin="lower", cmap="viridis", vmin=low, vmax=high)
    figure.colorbar(image, ax=axis, label=figure_text(f"similarity of {layer_map.on}"), shrink=0.9)
    title = f"{shorten(layer_map.variant, 24)}, seed {layer_map.seed}"
    axis.set(xlabel=figure_text(f"layer of teacher {shorten(layer_map.teacher, 24)}"), ylabel="student layer")
    axis.set(title=figure_text(title), xticks=_tick_places(t_layer), yticks=_tick_places(layer))
    axis.grid(visible=False)
    for i, j in zip(*np.nonzero(layer_map.weights > 0), strict=True):
        frame: Any = {"fill": False, "edgecolor": style.palette[1], "linewidth": 2}
        axis.add_patch(Rectangle((j - 0.46, i - 0.46), 0.92, 0.92, **frame))
    if max(layer, t_layer) <= MOST_LAYERS_WRITTEN:
        _write_values(axis, layer_map.similarity, low + 0.6 * (high - low))
    return figure


def _tick_places(count: int) -> list[int]:
    return list(range(0, count, 1 if count <= 16 else 4))


def _write_values(axis: Any, similarity: Numbers, dark_below: float) -> None:
    for (i, j), value in np.ndenumerate(similarity):
        colour = "white" if value < dark_below else "black"
        axis.text(j, i, f"{value:.2f}", color=colour, ha="center", va="center", fontsize=8)
