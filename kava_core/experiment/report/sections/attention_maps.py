"""Draw what student and teachers attend to at the end of training, in one validation example."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from kava_core.errors import CheckpointError
from kava_core.experiment.report.experiment_data import ExperimentData
from kava_core.experiment.report.figures.figure_style import Style, draw_picture
from kava_core.experiment.report.figures.gallery import gallery_section
from kava_core.experiment.report.pages.display_text import figure_text, shorten
from kava_core.experiment.report.pages.page_elements import Picture, Section
from kava_core.files import read_json_object
from kava_core.runs.folder import Folder

TITLE = "Attention"
LABELLED = 32
"""Most tokens that are written at the axes."""


@dataclass(frozen=True)
class ModelMaps:
    """One model's maps."""

    name: str
    layers: list[int]
    tokens: list[str]
    weights: NDArray[np.float64]
    """layer × query × key, the mean of the heads."""


@dataclass(frozen=True)
class RunMaps:
    """All models of one run."""

    variant: str
    seed: int
    models: list[ModelMaps]


def attention_section(data: ExperimentData) -> Section:
    """Return the maps of every variant's first seed that has them."""
    maps = [found for variant in data.experiment.variants for found in _first_maps(data, variant)]
    how = (
        "Where each token of the first validation example looks, at most three layers of every model, after "
        "training: queries downwards, keys to the right, the mean of the heads; darker is more, on a scale "
        "of square roots. Of every variant, the first seed that has maps."
    )
    absent = "No run has kept what its models attend to."
    return gallery_section("attention", TITLE, maps, partial(_maps_picture, data), how=how, absent=absent)


def _first_maps(data: ExperimentData, variant: str) -> Iterator[RunMaps]:
    for seed, run in data.complete_runs(variant).items():
        if run.folder.attention_maps.exists():
            models = _read_maps(run.folder)
            if models:
                yield RunMaps(variant, seed, models)
            return


def _read_maps(folder: Folder) -> list[ModelMaps]:
    from safetensors.numpy import load_file

    try:
        weights, facts = load_file(folder.attention_maps), read_json_object(folder.attention_tokens)
        models = []
        for name, known in facts.items():
            if "layers" in known:
                tokens = [str(token) for token in known["tokens"]]
                maps = weights[name].astype(np.float64)
                models.append(ModelMaps(name, list(known["layers"]), tokens, maps))
        return models
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{folder.attention_maps}: unreadable: {error}") from error


def _maps_picture(data: ExperimentData, run: RunMaps) -> Picture:
    names = ", ".join(f"{model.name} (layers {', '.join(map(str, model.layers))})" for model in run.models)
    alt = f"Attention maps after training, {run.variant} seed {run.seed}: {names}"
    return draw_picture(data.unique_name("attention", run.variant), alt, partial(_draw_maps, run), wide=True)


def _draw_maps(run: RunMaps, style: Style) -> Figure:
    columns = max(len(model.layers) for model in run.models)
    figure = Figure(figsize=(1 + 2.8 * columns, 0.6 + 2.9 * len(run.models)), layout="constrained")
    rows = figure.subplots(len(run.models), columns, squeeze=False)
    for model, axes in zip(run.models, rows, strict=True):
        for place, axis in enumerate(axes):
            if place < len(model.layers):
                _draw_map(axis, model, place)
            else:
                axis.set_axis_off()
    figure.suptitle(figure_text(f"{shorten(run.variant, 24)}, seed {run.seed}"), color=style.ink)
    return figure


def _draw_map(axis: Any, model: ModelMaps, place: int) -> None:
    axis.imshow(np.sqrt(model.weights[place]), cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
    axis.set_title(figure_text(f"{shorten(model.name, 18)}, layer {model.layers[place]}"), fontsize=9)
    axis.grid(visible=False)
    count = len(model.tokens)
    step = 1 if count <= LABELLED else math.ceil(count / LABELLED)
    places = range(0, count, step)
    words = [figure_text(shorten(model.tokens[i].strip() or "␣", 6)) for i in places]
    axis.set_xticks(places, words, fontsize=6, rotation=90)
    axis.set_yticks(places, words, fontsize=6)
