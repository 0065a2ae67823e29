"""Load models of a spec: from a folder or hub name, or with random weights from a config."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import torch
from torch import nn
from transformers import (
    PreTrainedTokenizerBase,
)

from kava_core.console import tell_once
from kava_core.data.tokenizers import vocabulary_size
from kava_core.errors import SpecError
from kava_core.kv.capture.geometry import auto_class
from kava_core.models.config import model_config, reason_of
from kava_core.models.quantize import check_quantised, explain_loading_error, loading_options
from kava_core.models.writing import write_plainly
from kava_core.specfile.sections.models import ModelSpec, TeacherSpec


def load_model(
    spec: ModelSpec, tokenizer: PreTrainedTokenizerBase, *, seed: int, where: str, grow: bool = False
) -> nn.Module:
    """Load the causal language model of a spec, or its encoder.

    Args:
        spec: the model's section of the spec.
        tokenizer: of the model.
        seed: fixes random weights.
        where: how errors name the section.
        grow: add embeddings for tokens that the model has none for.

    Raises:
        SpecError: it cannot be made or loaded, or its vocabulary is smaller than the tokenizer's.
    """
    try:
        model = _made_from_config(spec, tokenizer, seed, where)
    except SpecError:
        raise
    except Exception as error:  # transformers, safetensors and torch each raise their own
        raise SpecError(f"{where}: cannot load the model: {reason_of(error)}") from error
    if grow and vocabulary_size(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        torch.manual_seed(seed)
        model.resize_token_embeddings(vocabulary_size(tokenizer))
    _check_vocabulary(model, tokenizer, where)
    if not spec.encoder:
        write_plainly(model, tokenizer)
    return model


def _made_from_config(
    spec: ModelSpec, tokenizer: PreTrainedTokenizerBase, seed: int, where: str
) -> nn.Module:
    quantized = isinstance(spec, TeacherSpec) and spec.quantize is not None
    if spec.path is not None:
        return _load_quantised(spec, where) if quantized else _load_stored(spec, where)
    if not quantized:
        return _with_random_weights(spec, tokenizer, seed, where)
    with tempfile.TemporaryDirectory(prefix="kava-") as folder:  # the libraries quantise while loading
        _with_random_weights(spec, tokenizer, seed, where).save_pretrained(folder)
        return _load_quantised(spec.model_copy(update={"path": folder, "revision": None}), where)


def _with_random_weights(
    spec: ModelSpec, tokenizer: PreTrainedTokenizerBase, seed: int, where: str
) -> nn.Module:
    config = model_config(spec, tokenizer, where=where)
    torch.manual_seed(seed)
    return auto_class(config).from_config(copy.deepcopy(config), **_loading_options(spec))


def _load_quantised(spec: Any, where: str) -> nn.Module:
    dtype = getattr(torch, spec.dtype)
    options = loading_options(spec.quantize, dtype, where=where)
    with explain_loading_error(spec.quantize, where=where):
        model = _load_stored(spec, where, **options)
    check_quantised(model, where=where)
    return model


def _load_stored(spec: ModelSpec, where: str, **more: Any) -> nn.Module:
    """Load weights from safetensors only; transformers would fill missing ones with random numbers."""
    config = model_config(spec, where=where)
    model, loading_info = auto_class(config).from_pretrained(
        spec.path,
        config=config,
        revision=spec.revision,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        **_loading_options(spec),
        **more,
    )
    missing = sorted(loading_info["missing_keys"])
    if spec.encoder:  # nothing reads its pooler
        missing = [name for name in missing if "pooler" not in name]
    if missing:
        raise SpecError(f"{where}: {spec.path}: {len(missing)} weights are missing, such as {missing[0]}")
    unused = sorted(loading_info["unexpected_keys"])
    if unused:
        tell_once(
            f"{where}: {spec.path}: {len(unused)} weights of the checkpoint are not used, such as {unused[0]}"
        )
    return model


def _loading_options(spec: ModelSpec) -> dict[str, Any]:
    return {"dtype": getattr(torch, spec.dtype), "attn_implementation": spec.attention}


def _check_vocabulary(model: nn.Module, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    size = vocabulary_size(tokenizer)
    if size > rows:
        raise SpecError(
            f"{where}: the tokenizer numbers its tokens up to {size - 1} but the model has only {rows}"
        )
