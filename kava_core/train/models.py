"""Models from a spec: from a folder or hub name, or with random weights from a config."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from kava_core.errors import SpecError
from kava_core.spec.model import Lora, ModelSpec, StudentSpec


def model_config(spec: ModelSpec, tokenizer: PreTrainedTokenizerBase | None = None, *, where: str) -> PreTrainedConfig:
    """The transformers config of a spec.

    With ``config`` the vocabulary and the special tokens come from the tokenizer, where one is given.

    Raises:
        SpecError: no such folder or hub name, no such ``model_type``, or fields it does not take.
    """
    try:
        if spec.path is not None:
            return AutoConfig.from_pretrained(spec.path, revision=spec.revision, trust_remote_code=False)
        fields = dict(spec.config or {})
        if tokenizer is not None:
            fields = _from_tokenizer(tokenizer) | fields
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    except Exception as error:
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SpecError(f"{where}: cannot make a model config: {said}") from error


def _from_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def load_model(spec: ModelSpec, tokenizer: PreTrainedTokenizerBase, *, seed: int, where: str) -> nn.Module:
    """The causal language model of a spec; ``seed`` fixes random weights.

    Raises:
        SpecError: it cannot be made or loaded, or its vocabulary is smaller than the tokenizer's.
    """
    config = model_config(spec, tokenizer, where=where)
    dtype = getattr(torch, spec.dtype)
    options = {"dtype": dtype, "attn_implementation": spec.attention}
    try:
        if spec.path is None:
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), **options)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                spec.path, revision=spec.revision, use_safetensors=True, trust_remote_code=False, **options
            )
    except (OSError, ValueError, ImportError) as error:
        raise SpecError(f"{where}: cannot load the model: {str(error).splitlines()[0]}") from error
    _check_vocabulary(model, tokenizer, where)
    model.generation_config.pad_token_id = _pad_id(tokenizer)
    return model


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def _check_vocabulary(model: nn.Module, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise SpecError(f"{where}: the tokenizer has {len(tokenizer)} tokens but the model only {rows}")


def load_student(spec: StudentSpec, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> nn.Module:
    """The student, with its adapters and gradient checkpointing if asked for."""
    student = load_model(spec, tokenizer, seed=seed, where="student")
    if spec.gradient_checkpointing:
        checkpoint_activations(student)
    if spec.lora is not None:
        if spec.gradient_checkpointing:
            student.enable_input_require_grads()
        student = add_lora(student, spec.lora, seed=seed)
    return student


def checkpoint_activations(model: nn.Module) -> None:
    """Gradient checkpointing, never in the reentrant form; renamed by transformers in 5.23."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def add_lora(student: nn.Module, lora: Lora, *, seed: int) -> nn.Module:
    """The student with low-rank adapters; SpecError where peft is not installed."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise SpecError("student.lora: needs peft: pip install 'kava[lora]'") from error
    targets = lora.targets if lora.targets == "all-linear" else list(lora.targets)
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, task_type="CAUSAL_LM"
    )
    torch.manual_seed(seed)
    return get_peft_model(student, config)
