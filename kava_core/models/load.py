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
from kava_core.data.pretrained.origin import find_origin, is_adapter
from kava_core.data.tokenizers import vocabulary_size
from kava_core.errors import KavaError, SpecError
from kava_core.kv.capture.geometry import auto_class
from kava_core.models.assembled.cut_config import model_depth
from kava_core.models.assembled.cut_model import cut_model
from kava_core.models.assembled.gguf_weights import dequantised_folder
from kava_core.models.assembled.kept_layers import is_measured, kept_layers
from kava_core.models.assembled.merged_adapter import merged_model
from kava_core.models.config import model_config, reason_of, whole_config
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
        model = _load_or_make(spec, tokenizer, seed, where)
    except KavaError:
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


def _load_or_make(spec: ModelSpec, tokenizer: PreTrainedTokenizerBase, seed: int, where: str) -> nn.Module:
    quantized = isinstance(spec, TeacherSpec) and spec.quantize is not None
    if spec.path is not None and not _is_assembled(spec):
        return _load_quantised(spec, where) if quantized else _load_stored(spec, where)
    if spec.path is None:
        model = _with_random_weights(spec, tokenizer, seed, where)
    else:
        model = _assemble(spec, where)
    if not quantized:
        return model
    with tempfile.TemporaryDirectory(prefix="kava-") as folder:  # the libraries quantise while loading
        model.save_pretrained(folder)
        saved = {"path": folder, "revision": None, "keep_layers": None}
        return _load_quantised(spec.model_copy(update=saved), where)


def _is_assembled(spec: ModelSpec) -> bool:
    """Return whether the weights are changed after they are loaded from the path."""
    return spec.keep_layers is not None or is_adapter(str(spec.path))


def _assemble(spec: ModelSpec, where: str) -> nn.Module:
    """Load a model's weights, merge the adapter into them, and take out the layers that are not kept."""
    assert spec.path is not None
    assert not is_measured(spec.keep_layers), "layers are measured by kava_core.build.kept_layers first"
    origin = find_origin(spec.path, spec.revision, where=where)
    model = _load_stored(spec, where)
    if origin.adapter is not None:
        model = merged_model(model, origin.adapter, where=where)
    if spec.keep_layers is None:
        return model
    kept = kept_layers(spec.keep_layers, model_depth(model.config, where=where), where=where)
    return cut_model(model, kept, attention=spec.attention, where=where)


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
    """Load weights as they are stored; transformers would fill missing ones with random numbers.

    From safetensors only. Of an adapter the base model is loaded, and always all layers.
    """
    folder, revision = _weights_of(spec, where)
    config = whole_config(spec, where=where)
    model, loading_info = auto_class(config).from_pretrained(
        folder,
        config=config,
        revision=revision,
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
        raise SpecError(f"{where}: {folder}: {len(missing)} weights are missing, such as {missing[0]}")
    unused = sorted(loading_info["unexpected_keys"])
    if unused:
        tell_once(
            f"{where}: {folder}: {len(unused)} weights of the checkpoint are not used, such as {unused[0]}"
        )
    return model


def _weights_of(spec: ModelSpec, where: str) -> tuple[str, str | None]:
    """Return folder or hub name of the safetensors of a path, and their revision on the hub."""
    assert spec.path is not None
    origin = find_origin(spec.path, spec.revision, where=where)
    if origin.gguf is None:
        return origin.config, origin.revision
    if spec.encoder:
        raise SpecError(f"{where}: encoder: not from a GGUF file; give the folder of a transformers model")
    return str(dequantised_folder(origin.gguf, spec.dtype, where=where)), None


def _loading_options(spec: ModelSpec) -> dict[str, Any]:
    return {"dtype": getattr(torch, spec.dtype), "attn_implementation": spec.attention}


def _check_vocabulary(model: nn.Module, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    size = vocabulary_size(tokenizer)
    if size > rows:
        raise SpecError(
            f"{where}: the tokenizer numbers its tokens up to {size - 1} but the model has only {rows}"
        )
