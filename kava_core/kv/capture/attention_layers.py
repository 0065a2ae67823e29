"""Find a model's attention layers, and refuse models that cannot be captured before they run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kava_core.errors import KavaError, UnsupportedModelError


def without_adapters(model: nn.Module) -> Any:
    """Return the model that PEFT wraps, with the adapters inside it; any other model as it is."""
    return getattr(model, "get_base_model", lambda: model)()


def model_name(model: nn.Module) -> str:
    """Return the class name of a model, without PEFT's wrapper."""
    return type(without_adapters(model)).__name__


def attention_layers(model: nn.Module) -> list[nn.Module]:
    """List a model's attention modules in order.

    They are found by a class named ``…Attention…`` and an attribute ``layer_idx``.

    Raises:
        UnsupportedModelError: there are none, or two share a layer, as in encoder–decoders.
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


def layer_outputs(model: nn.Module) -> tuple[int, ...]:
    """Return the places of the attention layers' outputs among transformers' ``hidden_states``, in order.

    The first of these is the embedding. The last layer's output is normalised in most models.
    """
    return tuple(int(module.layer_idx) + 1 for module in attention_layers(model))  # type: ignore[arg-type]


def attention_implementation(module: nn.Module, model: nn.Module) -> str:
    """Return the name of the attention function that a module looks up when it runs, such as ``sdpa``."""
    config: Any = getattr(module, "config", None) or model.config
    return getattr(config, "_attn_implementation", None) or "eager"


def has_rotary(model: nn.Module) -> bool:
    """Return whether a model has a module that computes rotary angles."""
    return any("Rotary" in type(module).__name__ for module in model.modules())


def is_checkpointed(model: nn.Module) -> list[nn.Module]:
    """List the modules that can recompute their activations in the backward pass."""
    return [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]


def refuse_reentrant(layers: list[nn.Module], name: str) -> None:
    """Refuse a training forward pass under reentrant gradient checkpointing: same loss, wrong gradient.

    Args:
        layers: the modules that can recompute their activations.
        name: the model's, for the error.

    Raises:
        KavaError: one of them is in training mode and would checkpoint reentrantly.
    """
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
    """Return whether something must run after the modules of a model: sharding, offloading or a compiler."""
    return any(
        hasattr(module, "_hf_hook")
        or hasattr(module, "_get_fsdp_state")
        or module._compiled_call_impl is not None
        or type(module).__name__ in ("OptimizedModule", "FullyShardedDataParallel")
        for module in model.modules()
    )
