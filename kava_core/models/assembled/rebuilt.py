"""Make a model anew from a config and weights that are there already."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from kava_core.kv.capture.geometry import auto_class


def rebuilt_model(
    config: PreTrainedConfig, weights: Mapping[str, Tensor], *, like: Any, attention: str
) -> nn.Module:
    """Return the model of a config with these weights, as transformers would load it from a folder.

    The weights are not copied. Random states are left as they were.

    Args:
        config: the new model's.
        weights: its ``state_dict``, complete.
        like: a model from which dtype and generation settings are taken.
        attention: the attention implementation of transformers.

    Raises:
        RuntimeError: the weights are not exactly those of the config.
    """
    with torch.random.fork_rng(devices=[]):
        model = auto_class(config).from_config(
            copy.deepcopy(config), dtype=like.dtype, attn_implementation=attention
        )
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    if getattr(like, "generation_config", None) is not None:
        model.generation_config = copy.deepcopy(like.generation_config)
    rebuilt: nn.Module = model.eval()
    return rebuilt
