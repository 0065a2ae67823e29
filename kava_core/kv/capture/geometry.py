"""Read a model's geometry off the tensors of a tiny forward pass, never off its configuration."""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, AutoModelForTextEncoding, PretrainedConfig

from kava_core.errors import UnsupportedModelError
from kava_core.kv.capture.attention_layers import model_name
from kava_core.kv.capture.capture import Capture
from kava_core.kv.capture.evaluation_mode import evaluation_mode
from kava_core.protocols.axes import PARTS, Geometry

PROBE_LENGTH = 4

ENCODER = "kava_encoder"
"""Attribute of the configuration of a model of which the encoder alone is wanted."""


def auto_class(config: PretrainedConfig) -> Any:
    """Return the transformers class that makes and loads the model of a configuration."""
    return AutoModelForTextEncoding if getattr(config, ENCODER, False) else AutoModelForCausalLM


def probe_geometry(config: PretrainedConfig) -> Geometry:
    """Return the geometry of the model that a configuration describes; no weights are allocated.

    A process measures a configuration once. The model is made of fake tensors and runs with plain rotary
    angles: some frequency schemes look at position values, which fake tensors do not have, and none changes
    an extent. Bare meta tensors do not serve, as transformers looks for packed sequences in the values of the
    positions. Experts run as batched products, since grouped ones exist for bfloat16 alone.

    Raises:
        UnsupportedModelError: No attention layer can be captured, or the layers are not alike.
    """
    key = config_key(config)
    if key not in _PROBED:
        with FakeTensorMode():
            _PROBED[key] = model_geometry(fake_model(config))
    return _PROBED[key]


_PROBED: dict[str, Geometry] = {}


def config_key(config: PretrainedConfig) -> str:
    """Return a text that is equal for configurations of equal models, and only for them."""
    fields = config.to_dict() | {
        "class": type(config).__qualname__,
        "attention": config._attn_implementation,
        "encoder": auto_class(config).__name__,
    }
    return json.dumps(fields, sort_keys=True, default=str)


def fake_model(config: PretrainedConfig, **options: Any) -> nn.Module:
    """Make the model of a configuration inside ``FakeTensorMode``; see ``probe_geometry``.

    Args:
        config: a transformers configuration; it is copied.
        options: further arguments of ``from_config``.
    """
    plain = copy.deepcopy(config)
    text = plain.get_text_config()
    if getattr(text, "rope_parameters", None):
        text.rope_parameters = _plain_angles(text.rope_parameters)
    model: nn.Module = auto_class(plain).from_config(plain, experts_implementation="batched_mm", **options)
    return model


def model_geometry(model: nn.Module) -> Geometry:
    """Return a model's geometry, measured by a forward pass over four tokens.

    Training mode, gradients and random state are as before. The model is one of transformers, possibly inside
    PEFT's.

    Raises:
        UnsupportedModelError: No attention layer can be captured, or the layers are not alike.
    """
    device = next(model.parameters()).device
    # No token may look like padding.
    token = int(getattr(model.config.get_text_config(), "pad_token_id", None) == 0)
    ids = torch.full((1, PROBE_LENGTH), token, dtype=torch.long, device=device)
    capture = Capture(model, parts=PARTS, rotary="keep", look_at_masks=True)
    with torch.no_grad(), evaluation_mode(model), capture:
        model(input_ids=ids, use_cache=False)
    parts = dict(capture.take().items())
    _, layer, head, _, dim = parts["keys"].shape
    return Geometry(layer, head, dim, parts["queries"].shape[2], _hidden(model), capture.logits())


def _hidden(model: Any) -> int:
    config = model.config.get_text_config()
    if getattr(config, "hidden_size", None) is None:
        raise UnsupportedModelError(f"{model_name(model)}: its configuration names no hidden_size")
    return int(config.hidden_size)


def _plain_angles(parameters: Any) -> Any:
    """The rotary parameters, also where they are nested by layer type, with the default scheme."""
    if not isinstance(parameters, dict):
        return parameters
    plain = {key: _plain_angles(value) for key, value in parameters.items()}
    return plain | {"rope_type": "default"} if "rope_type" in plain else plain
