"""Which modules of a model are its attention layers, and which models are refused before they run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kava_core.errors import KavaError, UnsupportedModelError


def without_adapters(model: nn.Module) -> Any:
    """The model that PEFT wraps, with the adapters it put inside; any other as it is."""
    return getattr(model, "get_base_model", lambda: model)()


def model_name(model: nn.Module) -> str:
    """Class name of the model, seen through PEFT."""
    return type(without_adapters(model)).__name__


def attention_layers(model: nn.Module) -> list[nn.Module]:
    """The attention modules in order: those named ``…Attention…`` that know their ``layer_idx``.

    UnsupportedModelError where there is none, or where two share a layer (encoder–decoders).
    """
    layers = [module for module in model.modules() if _is_attention(module)]
    if not layers:
        raise UnsupportedModelError(f"{model_name(model)}: no attention layer could be found")
    if len({module.layer_idx for module in layers}) < len(layers):
        raise UnsupportedModelError(
            f"{model_name(model)}: several attention modules share a layer, as in encoder–decoders; "
            "only decoders can be captured"
        )
    return layers


def attention_implementation(module: nn.Module, model: nn.Module) -> str:
    """The attention implementation the module looks up when it runs."""
    config: Any = getattr(module, "config", None) or model.config
    return getattr(config, "_attn_implementation", None) or "eager"


def has_rotary(model: nn.Module) -> bool:
    """Whether the model makes rotary angles."""
    return any("Rotary" in type(module).__name__ for module in model.modules())


def is_checkpointed(model: nn.Module) -> list[nn.Module]:
    """The modules that can recompute their activations."""
    return [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]


def refuse_reentrant(layers: list[nn.Module], name: str) -> None:
    """KavaError where a training forward would checkpoint reentrantly: same loss, wrong gradient."""
    if torch.is_grad_enabled() and any(map(_reentrant, layers)):
        raise KavaError(
            f"{name}: reentrant gradient checkpointing detaches captured keys; enable it with "
            "{'use_reentrant': False}"
        )


def _reentrant(module: nn.Module) -> bool:
    if not (module.training and module.gradient_checkpointing):
        return False
    keywords = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
    return bool(keywords.get("use_reentrant", False))


def _is_attention(module: nn.Module) -> bool:
    return isinstance(getattr(module, "layer_idx", None), int) and "Attention" in type(module).__name__


def with_hooks(model: nn.Module) -> bool:
    """Whether something must run after the modules it wraps: sharding, offloading, a compiler."""
    return any(
        hasattr(module, "_hf_hook")
        or hasattr(module, "_get_fsdp_state")
        or module._compiled_call_impl is not None
        or type(module).__name__ in ("OptimizedModule", "FullyShardedDataParallel")
        for module in model.modules()
    )
