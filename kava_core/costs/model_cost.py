"""Count one model's parameters, bytes of weights and work of passes, on the meta device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from kava_core.costs.dry_run import layers_note, sized_config, vocabulary_note
from kava_core.costs.flops import forward_flops, step_passes
from kava_core.kv.capture.attention_layers import has_rotary
from kava_core.kv.capture.geometry import fake_model
from kava_core.models import quantize
from kava_core.models.fsdp import decoder_layers
from kava_core.models.student import add_lora
from kava_core.specfile.sections.models import ModelSpec, StudentSpec

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

TRAINED_COPIES = 3
"""Numbers beside each trained weight, in its dtype: the gradient and AdamW's two moments."""


@dataclass(frozen=True)
class ModelCost:
    """What one model of the run takes."""

    name: str
    geometry: str
    parameters: int
    trainable: int
    held_bytes: int
    """Bytes of the weights, and of gradients and AdamW's two moments if they are trained."""
    flops: float
    """Operations over a batch: of a forward pass (teachers), or of forward and backward pass (student)."""
    vocabulary: int
    rotary: bool
    """Whether keys and queries are rotated."""
    note: str = ""
    """Why the vocabulary, and with it every count, may not be the run's; and which layers are kept."""
    largest_layer_bytes: int = 0
    """Bytes of the largest decoder layer's weights."""
    outside_layers_bytes: int = 0
    """Bytes of the weights outside the decoder layers."""
    trained_bytes: int = 0
    """Bytes of the weights that are trained."""


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of all these tensors' numbers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def model_cost(name: str, spec: ModelSpec, batch: int, time: int, *, geometry: str, head: bool) -> ModelCost:
    """Count a model that reads ``batch`` examples of ``time`` tokens in a step.

    Args:
        name: how the plan calls the model.
        spec: its declaration.
        batch: examples in a step.
        time: tokens of an example.
        geometry: its geometry in words.
        head: whether its language-model head runs.
    """
    config = sized_config(spec, where=name)
    model = _model_without_weights(spec, config)
    parameters = list(model.parameters())
    learns = isinstance(spec, StudentSpec) and not spec.frozen
    trained = [parameter for parameter in parameters if parameter.requires_grad and learns]
    layer_bytes = [tensor_bytes(layer.parameters()) for layer in decoder_layers(model)]
    return ModelCost(
        name,
        geometry,
        parameters=sum(parameter.numel() for parameter in parameters),
        trainable=sum(parameter.numel() for parameter in trained),
        held_bytes=_weight_bytes(model, spec) + TRAINED_COPIES * tensor_bytes(trained),
        flops=forward_flops(config, time, head=head) * batch * step_passes(spec),
        vocabulary=int(config.get_text_config().vocab_size),
        rotary=has_rotary(model),
        note=f"{vocabulary_note(spec)} {layers_note(spec, where=name)}".strip(),
        largest_layer_bytes=max(layer_bytes),
        outside_layers_bytes=tensor_bytes(parameters) - sum(layer_bytes),
        trained_bytes=tensor_bytes(trained),
    )


def _model_without_weights(spec: ModelSpec, config: PreTrainedConfig) -> nn.Module:
    """Return the model on the meta device with the run's dtypes and adapters, to look at its parameters.

    It is not made of fake tensors: peft cannot replace their modules' weights.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = fake_model(config, dtype=getattr(torch, spec.dtype))
        if isinstance(spec, StudentSpec) and spec.lora is not None:
            model = add_lora(model, spec.lora, seed=0)
    return model


def _weight_bytes(model: nn.Module, spec: ModelSpec) -> int:
    """Return the bytes of the weights, a quantised model's without its scales (a few percent more)."""
    format = getattr(spec, "quantize", None)
    if format is None:
        return tensor_bytes(model.parameters())
    quantised = [module.weight for module in model.base_model.modules() if isinstance(module, nn.Linear)]
    quantised_numbers = sum(weight.numel() for weight in quantised)
    unchanged_bytes = tensor_bytes(model.parameters()) - tensor_bytes(quantised)
    return unchanged_bytes + int(quantised_numbers * quantize.BYTES[format])
