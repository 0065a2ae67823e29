"""Measure the layers of every teacher, show what was found, keep it for later runs: ``kava calibrate``."""

from __future__ import annotations

from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from kava_core.build.data import make_data
from kava_core.build.layer_map_files import choose_layers
from kava_core.build.layer_maps import assert_measures_text, can_measure, measured_map
from kava_core.config import ComponentConfig
from kava_core.console import print_whole, quiet
from kava_core.errors import SpecError
from kava_core.files import make_folder
from kava_core.jobs.heatmap import draw_similarity
from kava_core.specfile.load import LoadedSpec
from kava_core.specfile.questions import used_teachers
from kava_core.specfile.sections.models import TeacherSpec
from kava_core.specfile.sections.pipeline import PipelineSpec
from kava_core.train.run import with_pretrained_models


def measure_layers(loaded: LoadedSpec, folder: Path) -> None:
    """Measure and print; models to be pretrained are trained first.

    Teachers whose layer mapper is not one that is measured are measured with the defaults of ``cka``.

    Raises:
        SpecError: there is no teacher that a loss looks at.
    """
    if not used_teachers(loaded.spec):
        raise SpecError("kava calibrate: no teacher is used; it needs 'teachers' and a loss of weight > 0")
    assert_measures_text(loaded.spec)
    make_folder(folder)
    with quiet():
        spec = with_pretrained_models(loaded.spec)
        data = make_data(spec)
        console = Console()
        for teacher in spec.teachers:
            config = _measuring_config(loaded, teacher)
            path = measured_map(spec, teacher, config, folder, data, seed=spec.seeds[0])
            _show_layer_map(console, spec, teacher, config, path)


def _measuring_config(loaded: LoadedSpec, teacher: TeacherSpec) -> ComponentConfig:
    """Return the layer mapper to measure with; a map that the spec names is measured again."""
    config = teacher.align.layer_mapper
    if can_measure(config):
        return config.model_copy(update={"map": None})
    return loaded.registry.get("layer_mapper", "cka").model_validate({})


def _show_layer_map(
    console: Console, spec: PipelineSpec, teacher: TeacherSpec, config: ComponentConfig, path: Path
) -> None:
    state = load_file(path)
    weights = state["matrix"]
    similarity = state.get("similarity", weights)
    print_whole(_layer_table(teacher.name, similarity, weights), console)
    if spec.student.path is None:
        seed = spec.seeds[0]
        console.print(
            f"note: the student was measured with its random weights of seed {seed}", soft_wrap=True
        )
    picture = path.with_suffix(".png")
    title = f"{spec.name}: {config.name} of {getattr(config, 'on', 'layers')}; framed: what is read"
    if draw_similarity(similarity, weights, picture, teacher=teacher.name, title=title):
        console.print(f"heat map: {picture}", soft_wrap=True)
    else:
        console.print("no heat map: matplotlib is not installed (pip install 'kava[plots]')")
    console.print(f"for the spec, under align of teacher {teacher.name}:", soft_wrap=True)
    console.print(spec_line(config, path), soft_wrap=True, markup=False, highlight=False)


def _layer_table(teacher: str, similarity: Tensor, weights: Tensor) -> Table:
    """Return a row for each student layer: the teacher layers it reads, with weight and similarity."""
    table = Table(title=f"layers of teacher {teacher}")
    table.add_column("student layer", justify="right")
    table.add_column("teacher layers: weight (similarity)")
    for layer, chosen in enumerate(choose_layers(weights)):
        cells = [
            f"{t_layer}: {weight:.2f} ({float(similarity[layer, t_layer]):.2f})" for t_layer, weight in chosen
        ]
        table.add_row(str(layer), "   ".join(cells))
    return table


def spec_line(config: ComponentConfig, path: Path) -> str:
    """Return the line that makes a spec use the file: ``layer_mapper: {name: cka, map: …}``."""
    changed = config.model_dump(mode="json", exclude_defaults=True)
    fields = {"name": config.name, **changed, "map": str(path)}
    flow = yaml.safe_dump(fields, default_flow_style=True, sort_keys=False, width=10_000).strip()
    return f"layer_mapper: {flow}"
