"""Models from a spec: from a folder or hub name, or with random weights from a config."""

from __future__ import annotations

import copy
import difflib
import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from kava_core import shapecheck
from kava_core.errors import SpecError, did_you_mean
from kava_core.kv.capture.geometry import ENCODER, auto_class
from kava_core.specfile.sections.models import Lora, ModelSpec, StudentSpec, TeacherSpec
from kava_core.train.denoise import Denoiser
from kava_core.train.quantize import check_quantised, explained, loading_options


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
            return _for(
                spec, AutoConfig.from_pretrained(spec.path, revision=spec.revision, trust_remote_code=False)
            )
        fields = dict(spec.config or {})
        if tokenizer is not None:
            fields = _from_tokenizer(tokenizer) | fields
        _check_model_type(fields["model_type"], where)
        _check_keys(spec.config or {}, where)
        config = _for(spec, AutoConfig.for_model(fields.pop("model_type"), **fields))
    except SpecError:
        raise
    except Exception as error:
        raise SpecError(f"{where}: cannot make a model config: {_told(error)}") from error
    _check_heads(config, where)
    return config


def _for(spec: ModelSpec, config: PreTrainedConfig) -> PreTrainedConfig:
    """The config, which says that the encoder alone is wanted, if it is."""
    if spec.encoder or hasattr(config, ENCODER):
        setattr(config, ENCODER, spec.encoder)
    return config


def _check_model_type(given: str, where: str) -> None:
    possible = CONFIG_MAPPING.keys()
    if given not in possible:
        near = did_you_mean(given, possible)
        raise SpecError(f"{where}: config.model_type: transformers knows no {given!r}{near}")


TYPO = 0.85
"""How alike a config key must be to a field to be taken for a slip of the hand."""


def _check_keys(fields: dict[str, Any], where: str) -> None:
    """SpecError for a misspelt field, which transformers would keep and ignore.

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
        if near := difflib.get_close_matches(key, possible, n=1, cutoff=TYPO):
            raise SpecError(
                f"{where}: config.{key}: not a field of {model_type!r}; did you mean {near[0]!r}?"
            )


def _check_heads(config: PreTrainedConfig, where: str) -> None:
    """transformers finds this out in the first forward pass."""
    text = config.get_text_config()
    query, key = (getattr(text, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if not isinstance(query, int) or not isinstance(key, int):
        return
    if key < 1 or query % key:
        raise SpecError(
            f"{where}: num_attention_heads={query} is not a multiple of num_key_value_heads={key}"
        )


RELATIVE = ("t5", "mt5", "umt5", "longt5", "switch_transformers")
"""Relative positions have no end, whatever ``n_positions`` says."""

AFTER_PADDING = (
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "roberta-prelayernorm",
    "camembert",
    "data2vec-text",
)
"""They count positions from the padding token's number on."""


def positions(config: PreTrainedConfig) -> int | None:
    """The longest text a model is made for, in tokens; None where its config names no limit."""
    text = config.get_text_config()
    if text.model_type in RELATIVE:
        return None
    found = (getattr(text, name, None) for name in ("max_position_embeddings", "n_positions"))
    most = next((limit for limit in found if isinstance(limit, int) and limit > 0), None)
    return most if most is None or text.model_type not in AFTER_PADDING else most - text.pad_token_id - 1


def _told(error: Exception) -> str:
    """One line of what was raised: the first, or where that only announces the others, the last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if lines[0].endswith(":"):
        return lines[-1]
    return lines[0] if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {lines[0]}"


def _from_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def load_model(
    spec: ModelSpec, tokenizer: PreTrainedTokenizerBase, *, seed: int, where: str, grow: bool = False
) -> nn.Module:
    """The causal language model of a spec, or the encoder; ``seed`` fixes random weights.

    ``grow``: embeddings are added for tokens the model has none for.

    Raises:
        SpecError: it cannot be made or loaded, or its vocabulary is smaller than the tokenizer's.
    """
    try:
        model = _made(spec, tokenizer, seed, where)
    except SpecError:
        raise
    except Exception as error:  # transformers, safetensors and torch each raise their own
        raise SpecError(f"{where}: cannot load the model: {_told(error)}") from error
    if grow and len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        torch.manual_seed(seed)
        model.resize_token_embeddings(len(tokenizer))
    _check_vocabulary(model, tokenizer, where)
    if not spec.encoder:
        model.generation_config.pad_token_id = _pad_id(tokenizer)
    return model


def _made(spec: ModelSpec, tokenizer: PreTrainedTokenizerBase, seed: int, where: str) -> nn.Module:
    quantized = isinstance(spec, TeacherSpec) and spec.quantize is not None
    if spec.path is not None:
        return _quantized(spec, where) if quantized else _stored(spec, where)
    if not quantized:
        return _random(spec, tokenizer, seed, where)
    with tempfile.TemporaryDirectory(prefix="kava-") as folder:  # the libraries quantise while loading
        _random(spec, tokenizer, seed, where).save_pretrained(folder)
        return _quantized(spec.model_copy(update={"path": folder, "revision": None}), where)


def _random(spec: ModelSpec, tokenizer: PreTrainedTokenizerBase, seed: int, where: str) -> nn.Module:
    config = model_config(spec, tokenizer, where=where)
    torch.manual_seed(seed)
    return auto_class(config).from_config(copy.deepcopy(config), **_options(spec))


def _quantized(spec: Any, where: str) -> nn.Module:
    dtype = getattr(torch, spec.dtype)
    options = loading_options(spec.quantize, dtype, where=where)
    with explained(spec.quantize, where=where):
        model = _stored(spec, where, **options)
    check_quantised(model, where=where)
    return model


def _stored(spec: ModelSpec, where: str, **more: Any) -> nn.Module:
    """Weights from safetensors only; transformers would fill missing ones with random numbers."""
    config = model_config(spec, where=where)
    model, found = auto_class(config).from_pretrained(
        spec.path,
        config=config,
        revision=spec.revision,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        **_options(spec),
        **more,
    )
    wanted = (name for name in found["missing_keys"] if not (spec.encoder and "pooler" in name))
    if missing := sorted(wanted):
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


def load_student(
    spec: StudentSpec, tokenizer: PreTrainedTokenizerBase, *, seed: int, grow: bool = False
) -> nn.Module:
    """The student, with its adapters and gradient checkpointing if asked for.

    ``grow``: with embeddings for tokens that were added to its tokenizer.
    """
    student = load_model(spec, tokenizer, seed=seed, where="student", grow=grow)
    if spec.encoder:
        return Denoiser(student, len(tokenizer), tokenizer.mask_token_id)
    _check_causal(student)
    if spec.gradient_checkpointing:
        checkpoint_activations(student)
    if spec.lora is not None:
        if spec.gradient_checkpointing:
            student.enable_input_require_grads()
        student = add_lora(student, spec.lora, seed=seed)
    return student.requires_grad_(False) if spec.frozen else student


PROBE_LENGTH = 4


def _first_logits(model: nn.Module, where: str) -> tuple[Tensor, Tensor]:
    """Logits at the first of a few tokens, and the embeddings they were computed from."""
    embedded: list[Tensor] = []

    def follow(module: nn.Module, given: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    some = int(getattr(model.config.get_text_config(), "pad_token_id", None) == 0)  # nothing like padding
    handle, training = model.get_input_embeddings().register_forward_hook(follow), model.training
    try:
        ids = torch.full((1, PROBE_LENGTH), some, device=next(model.parameters()).device)
        with torch.enable_grad():
            return model.eval()(input_ids=ids, use_cache=False).logits[0, 0], embedded[0]
    except Exception as error:
        raise SpecError(f"{where}: {type(model).__name__} cannot run: {_told(error)}") from error
    finally:
        handle.remove()
        model.train(training)


def _check_causal(student: nn.Module) -> None:
    """SpecError where a token's logits depend on later tokens, as the gradient says without rounding."""
    logits, embedded = _first_logits(student, "student")
    (slope,) = torch.autograd.grad(logits.float().sum(), embedded)
    if (slope[:, 1:].abs() > 0).any():
        raise SpecError(
            f"student: {type(student).__name__} is not causal: its tokens attend to later ones; "
            "it may need is_decoder: true in its config"
        )


def checkpoint_activations(model: nn.Module) -> None:
    """Gradient checkpointing, never in the reentrant form; renamed by transformers in 5.23."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def compile_forward(model: nn.Module, backend: str) -> None:
    """torch.compile in place; SpecError together with shape checking, whose checks cannot be compiled."""
    if shapecheck.wanted():
        raise SpecError("train.compile: not together with shape checking (--check-shapes, KAVA_SHAPE_CHECK)")
    # Else a layer under gradient checkpointing runs uncompiled, as it leaves tensors in a capture's slot.
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    model.compile(backend=backend)


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
        raise SpecError(f"student.lora: {_told(error)}") from error


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
