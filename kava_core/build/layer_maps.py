"""Measure layer maps on training examples before the pipeline is built."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import send_to_device
from einops import rearrange
from jaxtyping import Float
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from kava_core.build.aligner import build_time_plan
from kava_core.build.data import Data
from kava_core.build.layer_map_files import (
    assert_same_code,
    assert_same_models,
    is_current,
    measured_from,
    write_map,
)
from kava_core.build.provenance import models_of
from kava_core.config import ComponentConfig
from kava_core.errors import NonFiniteError, PluginError, SpecError, UnsupportedModelError
from kava_core.kv.align.boundaries import (
    attribute_errors_to,
    build_component,
    finish_component,
    layer_matrix,
    show_component,
)
from kava_core.kv.align.time_plan import TimePlan
from kava_core.kv.capture.attention_layers import layer_outputs, model_name
from kava_core.kv.capture.capture import Capture
from kava_core.kv.capture.geometry import model_geometry
from kava_core.models.stand_ins.load_teacher import load_teacher, teacher_geometry
from kava_core.models.stand_ins.token_identity import TokenVectors
from kava_core.models.student import load_student
from kava_core.processes import world_size
from kava_core.protocols.layer_mapper import Measured
from kava_core.protocols.time_map import TimeMap
from kava_core.protocols.timeline import Timeline
from kava_core.specfile.questions import used_teachers
from kava_core.specfile.sections.models import TeacherSpec
from kava_core.specfile.sections.pipeline import PipelineSpec

Compared = Literal["hidden", "keys", "values"]


def assert_measures_text(spec: PipelineSpec) -> None:
    """Refuse to measure for a student without written steps.

    Raises:
        SpecError: the spec's trajectory is latent.
    """
    if spec.trajectory == "latent":
        raise SpecError(
            "trajectory: latent: layers cannot be measured on latent tokens; measure with trajectory: text "
            "by `kava calibrate` and give the layer mapper its 'map', or use ratio"
        )


def with_measured_maps(spec: PipelineSpec, folder: Path, data: Data, *, seed: int = 0) -> PipelineSpec:
    """Return the spec with a map file for every layer mapper that is measured and has none.

    Files in ``folder`` that were measured on the same models, data and settings are used again; others are
    replaced. One process of several measures, the others read.

    Args:
        spec: with every model ready to load.
        folder: where ``<teacher>.safetensors`` and ``<teacher>.json`` are.
        data: the run's.
        seed: the run's; it decides random weights of the student.

    Raises:
        SpecError: a map that the spec names was measured on other models.
        KavaError: the folder cannot be written, or there is too little to measure.
    """
    for teacher in used_teachers(spec):
        config: Any = teacher.align.layer_mapper
        if can_measure(config) and config.map is not None:
            assert_same_models(Path(config.map), models_of(spec, teacher, data), teacher=teacher.name)
            assert_same_code(Path(config.map), config, teacher=teacher.name)
    if not any(wants_measuring(teacher.align.layer_mapper) for teacher in used_teachers(spec)):
        return spec
    assert_measures_text(spec)
    with _main_process_first():
        teachers = tuple(_with_map(spec, teacher, folder, data, seed) for teacher in spec.teachers)
    return spec.model_copy(update={"teachers": teachers})


def can_measure(config: ComponentConfig) -> bool:
    """Return whether a layer mapper can be measured: it has a field ``map`` and a method ``observe``."""
    return "map" in type(config).model_fields and hasattr(config.implementation(), "observe")


def wants_measuring(config: ComponentConfig) -> bool:
    """Return whether a layer mapper is to be measured: it can be, and the spec gives it no map."""
    return can_measure(config) and getattr(config, "map", None) is None


def _main_process_first() -> AbstractContextManager[None]:
    if world_size() == 1:
        return nullcontext()
    return PartialState(cpu=not torch.cuda.is_available()).main_process_first()


def _with_map(spec: PipelineSpec, teacher: TeacherSpec, folder: Path, data: Data, seed: int) -> TeacherSpec:
    config = teacher.align.layer_mapper
    if not wants_measuring(config):
        return teacher
    path = measured_map(spec, teacher, config, folder, data, seed=seed)
    mapper = config.model_copy(update={"map": str(path)})
    return teacher.model_copy(update={"align": teacher.align.model_copy(update={"layer_mapper": mapper})})


def measured_map(
    spec: PipelineSpec, teacher: TeacherSpec, config: ComponentConfig, folder: Path, data: Data, *, seed: int
) -> Path:
    """Return the absolute path of a teacher's map file; measure it first unless it is there already.

    Args:
        spec: with every model ready to load.
        teacher: whose layers are measured.
        config: the layer mapper that measures.
        folder: where the file is or will be.
        data: the run's.
        seed: the run's; it decides random weights of the student.
    """
    path = (folder / f"{teacher.name}.safetensors").absolute()
    subject = measured_from(spec, teacher, config, data, seed=seed)
    if not is_current(path, subject):
        # Random states are left as they were: a run must not depend on whether it measured.
        with torch.random.fork_rng(devices=[]):
            mapper, weights = _measure_layers(spec, teacher, config, data, seed)
        examples = subject["data"]["examples"]
        write_map(path, mapper.state_dict(), weights, on=mapper.on, examples=examples, subject=subject)
    return path


def _measure_layers(
    spec: PipelineSpec, teacher: TeacherSpec, config: ComponentConfig, data: Data, seed: int
) -> tuple[Any, Float[Tensor, "layer t_layer"]]:
    """Return the mapper after it saw the first training examples, and its weights."""
    plain = spec.student.model_copy(update={"lora": None, "gradient_checkpointing": False})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student = load_student(plain, data.tokenizer, seed=seed).eval().to(device)
    tokenizer = data.teacher_tokenizers[teacher.name]
    model = load_teacher(teacher, tokenizer).eval().to(device)
    extents: dict[str, Any] = {"teacher": teacher_geometry(model), "student": model_geometry(student)}
    plan = build_time_plan(teacher.align, name=teacher.name, **extents)
    with attribute_errors_to(f"layer_mapper {config.name!r}, teacher {teacher.name!r}", config):
        mapper = _build_mapper(config, extents)
        for batch in _calibration_batches(spec, data, teacher.name):
            _show_batch(mapper, plan, (model, student), (batch["teachers"][teacher.name], batch["student"]))
        finish_component(mapper)
        return mapper, layer_matrix(mapper, **extents)


def _show_batch(
    mapper: Measured,
    plan: TimePlan,
    models: tuple[nn.Module, nn.Module],
    sides: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    """Show one batch to the mapper; in ``models`` and ``sides`` the teacher is first, the student second."""
    device = next(models[1].parameters()).device
    time_map = plan(*map(Timeline.from_batch, sides)).to(device)
    teacher = layers_to_compare(models[0], send_to_device(sides[0], device), mapper.on)
    student = layers_to_compare(models[1], send_to_device(sides[1], device), mapper.on)
    _assert_finite_layers(teacher, sides[0], f"the teacher's {mapper.on}")
    _assert_finite_layers(student, sides[1], f"the student's {mapper.on}")
    show_component(mapper, warp_layers(time_map, teacher), student, time_map.valid)


def _assert_finite_layers(x: Float[Tensor, "batch layer time dim"], side: dict[str, Any], whose: str) -> None:
    """Refuse to compare layers with NaN or infinity at real tokens.

    Raises:
        NonFiniteError: names the layers.
    """
    real = side["attention_mask"].bool().to(x.device)[:, None, :, None]
    bad_layers = (~torch.isfinite(x) & real).any(dim=(0, 2, 3))
    if bad_layers.any():
        layers = bad_layers.nonzero().flatten().tolist()
        raise NonFiniteError(f"{whose} of layers {layers} hold NaN or infinity; layers cannot be compared")


def _build_mapper(config: ComponentConfig, extents: dict[str, Any]) -> Any:
    mapper = build_component(config, **extents)
    if not isinstance(mapper, Measured):
        raise PluginError("has observe(), so it must have 'on' and finish() as well")
    return mapper


def _calibration_batches(spec: PipelineSpec, data: Data, teacher: str) -> Iterable[Any]:
    """Return batches of the first training examples, with a bar on a terminal and one line elsewhere."""
    count = min(spec.train.calibration_examples, len(data.train_items))
    loader = DataLoader(
        Subset(data.train_items, range(count)), spec.train.batch_size, collate_fn=data.plain_collator
    )
    title = f"{spec.name}: layers of student and teacher {teacher!r} on {count} examples"
    if sys.stderr.isatty() and "CI" not in os.environ:
        return track(loader, title, console=Console(stderr=True))
    print(title, file=sys.stderr, flush=True)
    return loader


@torch.no_grad()
def layers_to_compare(
    model: nn.Module, side: dict[str, Any], on: Compared
) -> Float[Tensor, "batch layer time dim"]:
    """Run a model and return what is compared of every attention layer.

    That is its output, or its keys or values, whose heads are then side by side along ``dim``. The output of
    the last layer is normalised in most models, as transformers returns it.

    Args:
        model: the teacher or the student.
        side: the collator's tensors of its side.
        on: which of the three.

    Raises:
        UnsupportedModelError: the model does not return an output for every attention layer.
    """
    if isinstance(model, TokenVectors):
        return model.layers_to_compare(side["input_ids"], on)
    inputs = {"input_ids": side["input_ids"], "attention_mask": side["attention_mask"], "use_cache": False}
    base: Any = model.base_model
    if on != "hidden":
        capture = Capture(model, parts=(on,), rotary="strip")
        with capture:
            base(**inputs)
        return rearrange(
            getattr(capture.take(), on), "batch layer head time dim -> batch layer time (head dim)"
        )
    outputs = base(**inputs, output_hidden_states=True).hidden_states
    wanted = layer_outputs(model)
    if outputs is None or len(outputs) <= max(wanted):
        raise UnsupportedModelError(
            f"{model_name(model)}: returns no hidden states for its attention layers; compare keys or values"
        )
    return torch.stack([outputs[index] for index in wanted], 1)


def warp_layers(
    time_map: TimeMap, x: Float[Tensor, "batch layer t_time dim"]
) -> Float[Tensor, "batch layer time dim"]:
    """Return layers of the teacher at the student's positions, in float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return time_map.apply(wide[:, :, None])[:, :, 0]
