"""Models from a spec: from a folder or hub name, or with random weights from a config."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from kava_core.errors import SpecError, did_you_mean
from kava_core.spec.model import Lora, ModelSpec, StudentSpec


def model_config(
    spec: ModelSpec, tokenizer: PreTrainedTokenizerBase | None = None, *, where: str
) -> PreTrainedConfig:
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
        _check_model_type(fields["model_type"], where)
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    except SpecError:
        raise
    except Exception as error:
        raise SpecError(f"{where}: cannot make a model config: {_first_line(error)}") from error


def _check_model_type(given: str, where: str) -> None:
    possible = CONFIG_MAPPING.keys()
    if given not in possible:
        near = did_you_mean(given, possible)
        raise SpecError(f"{where}: config.model_type: transformers knows no {given!r}{near}")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


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
    try:
        model = _random(spec, tokenizer, seed, where) if spec.path is None else _stored(spec, where)
    except SpecError:
        raise
    except Exception as error:  # transformers, safetensors and torch each raise their own
        raise SpecError(f"{where}: cannot load the model: {_first_line(error)}") from error
    _check_vocabulary(model, tokenizer, where)
    model.generation_config.pad_token_id = _pad_id(tokenizer)
    return model


def _random(spec: ModelSpec, tokenizer: PreTrainedTokenizerBase, seed: int, where: str) -> nn.Module:
    config = model_config(spec, tokenizer, where=where)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), **_options(spec))


def _stored(spec: ModelSpec, where: str) -> nn.Module:
    """Weights from safetensors only; transformers would fill missing ones with random numbers."""
    load: Any = AutoModelForCausalLM.from_pretrained
    model, found = load(
        spec.path,
        revision=spec.revision,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        **_options(spec),
    )
    if missing := sorted(found["missing_keys"]):
        raise SpecError(f"{where}: {spec.path}: {len(missing)} weights are missing, such as {missing[0]}")
    return model


def _options(spec: ModelSpec) -> dict[str, Any]:
    return {"dtype": getattr(torch, spec.dtype), "attn_implementation": spec.attention}


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
    """The student with low-rank adapters; SpecError without peft, or where no module has such a name."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise SpecError("student.lora: needs peft: pip install 'kava[lora]'") from error
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    _check_targets(student, targets)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    try:
        return get_peft_model(student, config)
    except ValueError as error:
        raise SpecError(f"student.lora: {_first_line(error)}") from error


def _check_targets(student: nn.Module, targets: str | list[str]) -> None:
    """Every name must be a module's: peft is content if one of them is."""
    if isinstance(targets, str):
        return
    modules = [name for name, _ in student.named_modules() if name]
    possible = {name.rpartition(".")[2] for name in modules}
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in modules):
            raise SpecError(
                f"student.lora.targets: no module named {target!r}{did_you_mean(target, possible)}"
            )
