"""Turn ``keep_layers`` of every model of a spec into numbers of layers, by measuring where it is asked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from kava_core.build.data import load_or_train_tokenizer
from kava_core.build.provenance import Subject, model_identity
from kava_core.console import quiet, tell_once
from kava_core.data.examples import render_example
from kava_core.data.splits import load_splits, split_hash
from kava_core.files import cache_folder, locked, make_folder, write_json
from kava_core.models.assembled.cut_config import cut_config, model_depth
from kava_core.models.assembled.influence import block_influence
from kava_core.models.assembled.kept_layers import is_measured, kept_layers, layer_rule, most_influential
from kava_core.models.config import whole_config
from kava_core.models.load import load_model
from kava_core.specfile.sections.models import ModelSpec, TeacherSpec
from kava_core.specfile.sections.pipeline import PipelineSpec
from kava_core.versions import versions

M = TypeVar("M", bound=ModelSpec)

TEXTS_AT_ONCE = 8
"""Texts of a pass in a measurement; fixed, so that a spec's batch size does not change what is kept."""


def with_kept_layers(spec: PipelineSpec) -> PipelineSpec:
    """Return the spec with numbers of layers in place of rules in ``keep_layers``; print which are kept.

    Args:
        spec: with every model ready to load.

    Raises:
        SpecError: a model does not have such layers, or they cannot be taken out of it.
        NonFiniteError: a measured hidden state is not finite.
        KavaError: the cache cannot be written.
    """
    student = _with_numbers(spec, spec.student, where="student")
    teachers = tuple(_with_numbers(spec, t, where=f"teacher {t.name!r}") for t in spec.teachers)
    return spec.model_copy(update={"student": student, "teachers": teachers})


def kept_layers_of(spec: PipelineSpec) -> dict[str, list[int]]:
    """Return the numbers of the kept layers by model, of those models that are cut.

    Args:
        spec: as ``with_kept_layers`` returned it.
    """
    models: dict[str, ModelSpec] = {"student": spec.student}
    models |= {teacher.name: teacher for teacher in spec.teachers}
    kept = {}
    for name, model in models.items():
        if model.keep_layers is not None and not isinstance(model.keep_layers, str):
            kept[name] = list(model.keep_layers)
    return kept


def _with_numbers(spec: PipelineSpec, model: M, *, where: str) -> M:
    asked = model.keep_layers
    if asked is None:
        return model
    config = whole_config(model, where=where)
    depth = model_depth(config, where=where)
    kept = kept_layers(asked, depth, where=where)
    if is_measured(asked):
        assert isinstance(asked, str)
        kept = most_influential(_influence(spec, model, where), layer_rule(asked)[1])
    cut_config(config, kept, where=where)
    tell_once(f"{where}: keeps layers {', '.join(map(str, kept))} of {depth}{_rule_text(asked)}")
    return model.model_copy(update={"keep_layers": kept})


def _rule_text(asked: Any) -> str:
    return f" ({asked})" if isinstance(asked, str) else ""


def _influence(spec: PipelineSpec, model: ModelSpec, where: str) -> list[float]:
    """Return the Block Influence of every layer of a model; measured once, and kept in the cache.

    One process of several measures: others could differ in the last digit, and keep other layers.
    """
    whole = _whole_model(model)
    splits = load_splits(spec.data, root=Path.cwd())
    template = (model.template if isinstance(model, TeacherSpec) else None) or spec.data.template
    examples = splits.train[: spec.train.calibration_examples]
    with quiet():
        tokenizer = load_or_train_tokenizer(whole, splits, template, where=where)
    subject: Subject = {
        "model": model_identity(whole, tokenizer),
        "data": {"examples": len(examples), "sha256": split_hash(examples)},
        "template": template.model_dump(mode="json"),
        "max_length": spec.train.max_length,
        "versions": {name: versions().get(name) for name in ("torch", "transformers")},
    }
    name = hashlib.sha256(json.dumps(subject, sort_keys=True).encode()).hexdigest()[:32]
    file = cache_folder() / "influence" / f"{name}.json"
    make_folder(file.parent)
    with locked(file.with_suffix(".lock")):
        known = _read_influence(file)
        if known is None:
            tell_once(f"{where}: influence of its layers on {len(examples)} examples")
            texts = [render_example(example, template).text for example in examples]
            known = _measure(whole, tokenizer, texts, spec.train.max_length, where)
            write_json(file, {"influence": known, "measured": subject})
    return known


def _whole_model(model: ModelSpec) -> ModelSpec:
    """Return the model with all its layers, as it is before it is quantised or gets adapters."""
    fields = {name: getattr(model, name) for name in ModelSpec.model_fields if name != "keep_layers"}
    return ModelSpec(**fields)


def _read_influence(file: Path) -> list[float] | None:
    """Return what was measured before; None if nothing was, or the file is damaged."""
    try:
        return [float(value) for value in json.loads(file.read_text(encoding="utf-8"))["influence"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _measure(
    model: ModelSpec, tokenizer: Any, texts: Sequence[str], max_length: int, where: str
) -> list[float]:
    """Load the whole model and measure it on texts; random states are left as they were."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.random.fork_rng(devices=[]), quiet():
        loaded = load_model(model, tokenizer, seed=0, where=where).to(device)
        batches = _text_batches(tokenizer, texts, max_length, device)
        influence: list[float] = block_influence(loaded, batches, where=where).tolist()
    return influence


def _text_batches(
    tokenizer: Any, texts: Sequence[str], max_length: int, device: torch.device
) -> Iterator[Mapping[str, Tensor]]:
    """Yield the texts as token ids and masks, padded on the right; longer ones are cut off."""
    encoded = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    for begin in range(0, len(encoded), TEXTS_AT_ONCE):
        rows = [torch.tensor(ids) for ids in encoded[begin : begin + TEXTS_AT_ONCE]]
        masks = [torch.ones_like(row) for row in rows]
        pad = torch.nn.utils.rnn.pad_sequence
        yield {
            "input_ids": pad(rows, batch_first=True, padding_value=tokenizer.pad_token_id or 0).to(device),
            "attention_mask": pad(masks, batch_first=True).to(device),
        }
