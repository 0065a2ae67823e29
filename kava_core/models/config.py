"""Read a model's config, and check what can be checked of it before weights are loaded."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from kava_core.data.pretrained.origin import find_origin
from kava_core.data.tokenizers import vocabulary_size
from kava_core.errors import KavaError, SpecError, did_you_mean
from kava_core.kv.capture.geometry import ENCODER, probe_geometry
from kava_core.models.assembled.cut_config import cut_config, model_depth
from kava_core.models.assembled.kept_layers import kept_layers
from kava_core.protocols.axes import Geometry
from kava_core.specfile.sections.models import ModelSpec


def model_config(
    spec: ModelSpec, tokenizer: PreTrainedTokenizerBase | None = None, *, where: str
) -> PreTrainedConfig:
    """Return the transformers config of a spec's model, cut down to the layers that it keeps.

    If the spec gives the config itself, the vocabulary and the special tokens come from the tokenizer.

    Args:
        spec: the model's section of the spec.
        tokenizer: of the model; None: the config's own numbers stay.
        where: how errors name the section.

    Raises:
        SpecError: no such folder or hub name, no such ``model_type``, fields it does not take, or layers to
            keep that it does not have.
    """
    config = whole_config(spec, tokenizer, where=where)
    if spec.keep_layers is None:
        return config
    kept = kept_layers(spec.keep_layers, model_depth(config, where=where), where=where)
    return cut_config(config, kept, where=where)


def whole_config(
    spec: ModelSpec, tokenizer: PreTrainedTokenizerBase | None = None, *, where: str
) -> PreTrainedConfig:
    """Return the config of a spec's model with all its layers; arguments and errors as ``model_config``."""
    try:
        if spec.path is not None:
            return auto_classes(spec, _stored_config(spec.path, spec.revision, where))
        fields = dict(spec.config or {})
        if tokenizer is not None:
            fields = _from_tokenizer(tokenizer) | fields
        _check_model_type(fields["model_type"], where)
        _check_keys(spec.config or {}, where)
        config = auto_classes(spec, AutoConfig.for_model(fields.pop("model_type"), **fields))
    except KavaError:
        raise
    except Exception as error:
        no_folder = (
            f"no folder {spec.path!r} here, and " if spec.path and not Path(spec.path).is_dir() else ""
        )
        raise SpecError(f"{where}: {no_folder}cannot make a model config: {reason_of(error)}") from error
    _check_heads(config, where)
    return config


def _stored_config(path: str, revision: str | None, where: str) -> PreTrainedConfig:
    origin = find_origin(path, revision, where=where)
    return AutoConfig.from_pretrained(origin.config, revision=origin.revision, trust_remote_code=False)


def auto_classes(spec: ModelSpec, config: PreTrainedConfig) -> PreTrainedConfig:
    """Set in the config whether only the model's encoder is wanted, and return it."""
    if spec.encoder or hasattr(config, ENCODER):
        setattr(config, ENCODER, spec.encoder)
    return config


def _check_model_type(given: str, where: str) -> None:
    possible = CONFIG_MAPPING.keys()
    if given not in possible:
        near = did_you_mean(given, possible)
        raise SpecError(f"{where}: config.model_type: transformers knows no {given!r}{near}")


TYPO = 0.85
"""Similarity to a field, from 0 to 1, from which on a config key is taken for a misspelling of it."""


def _check_keys(fields: dict[str, Any], where: str) -> None:
    """Refuse a misspelt field, which transformers would keep and ignore.

    Unknown keys that resemble no field pass: some are read by modelling code alone.
    """
    model_type = fields["model_type"]
    try:
        default = CONFIG_MAPPING[model_type]()
    except Exception:  # a few have no defaults that pass their own checks
        return
    possible = {*default.to_dict(), *default.attribute_map}
    for key in fields:
        if key in possible or hasattr(default, key):
            continue
        near = difflib.get_close_matches(key, possible, n=1, cutoff=TYPO)
        if near:
            raise SpecError(
                f"{where}: config.{key}: not a field of {model_type!r}; did you mean {near[0]!r}?"
            )


def _check_heads(config: PreTrainedConfig, where: str) -> None:
    """Check width and head counts; transformers finds a mistake in them only in the first forward pass."""
    text = config.get_text_config()
    width = getattr(text, "hidden_size", None)
    if isinstance(width, int) and width < 1:
        raise SpecError(f"{where}: hidden_size={width} must be at least 1")
    query = getattr(text, "num_attention_heads", None)
    key = getattr(text, "num_key_value_heads", None)
    if not isinstance(query, int) or not isinstance(key, int):
        return
    if key < 1 or query % key:
        raise SpecError(
            f"{where}: num_attention_heads={query} is not a multiple of num_key_value_heads={key}"
        )


def config_geometry(config: PreTrainedConfig, *, where: str) -> Geometry:
    """Return a model's geometry from its config alone; no weights are loaded.

    Raises:
        SpecError: transformers makes no causal language model of this config.
        UnsupportedModelError: its cache cannot be captured.
    """
    try:
        return probe_geometry(config)
    except (ValueError, TypeError) as error:
        lines = _lines_of(error)
        reason = lines[-1] if lines else type(error).__name__
        raise SpecError(f"{where}: {reason}") from error


RELATIVE = ("t5", "mt5", "umt5", "longt5", "switch_transformers")
"""Models with relative positions, which have no end; their ``n_positions`` is no limit."""


AFTER_PADDING = (
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "roberta-prelayernorm",
    "camembert",
    "data2vec-text",
)
"""Models that count positions from the padding token's number on, and so have fewer than configured."""


def max_positions(config: PreTrainedConfig) -> int | None:
    """Return the longest text a model is made for, in tokens; None if its config names no limit."""
    text = config.get_text_config()
    if text.model_type in RELATIVE:
        return None
    for name in ("max_position_embeddings", "n_positions"):
        limit = getattr(text, name, None)
        if isinstance(limit, int) and limit > 0:
            return limit - text.pad_token_id - 1 if text.model_type in AFTER_PADDING else limit
    return None


def reason_of(error: Exception) -> str:
    """Return one line of an error's text: the first, or the last if the first only announces the others."""
    lines = _lines_of(error)
    if not lines:
        return type(error).__name__
    if lines[0].endswith(":"):
        return lines[-1]
    return lines[0] if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {lines[0]}"


def _lines_of(error: Exception) -> list[str]:
    lines = (line.strip() for line in str(error).splitlines())
    return [line for line in lines if line]


def _from_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary_size(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def check_fits_positions(config: PreTrainedConfig, longest: int, *, who: str) -> None:
    """Check that the longest example fits into a model's positions.

    Args:
        config: the model's.
        longest: tokens of the longest example.
        who: how the error names the model.

    Raises:
        SpecError: it has more tokens than the model positions.
    """
    room = max_positions(config)
    if room is not None and longest > room:
        raise SpecError(
            f"{who}: the longest example has {longest} tokens but the model only {room} positions; "
            "lower train.max_length, or give the config more positions"
        )


def check_answer_fits(
    config: PreTrainedConfig, prompt: int, new_tokens: int, *, field: str = "evaluate.max_new_tokens"
) -> None:
    """Check that prompt and written answer together fit into the student's positions.

    Args:
        config: the student's.
        prompt: tokens of the longest prompt.
        new_tokens: most tokens that are written.
        field: the spec's field that sets ``new_tokens``, for the error.

    Raises:
        SpecError: they may not fit.
    """
    room = max_positions(config)
    if room is not None and prompt + new_tokens > room:
        raise SpecError(
            f"{field}: the longest prompt and {new_tokens} new tokens are "
            f"{prompt + new_tokens} tokens but the student has {room} positions"
        )
