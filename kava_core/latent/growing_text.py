"""Compute hidden states of a text that is read again and again while more and more of its start is final."""

from __future__ import annotations

import copy
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from kava_core.errors import UnsupportedModelError
from kava_core.kv.capture.attention_layers import is_checkpointed, without_adapters


class GrowingText:
    """Reads a text several times, and keeps keys and values of what will not change, with their gradients.

    Hidden states are the same as those of reading the whole text each time. Models with sliding or linear
    attention, and models that recompute their activations, do read it all again.

    Args:
        model: a causal language model of transformers, possibly with adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        self._decoder = decoder_of(model)
        self._keeps = _can_keep(model)
        self._cache: DynamicCache | None = None
        self._known = 0

    def __call__(
        self, text: Float[Tensor, "batch time hidden"], mask: Bool[Tensor, "batch time"], *, final: int
    ) -> Float[Tensor, "batch _ hidden"]:
        """Return the last hidden states, normalised as the head reads them, of what is not kept yet.

        Args:
            text: input embeddings, padded on the left; what was ``final`` before must be as it was.
            mask: its real positions.
            final: how many of these inputs stay as they are in all later readings.
        """
        outputs = self._decoder(
            inputs_embeds=text[:, self._known :],
            attention_mask=mask.long(),
            position_ids=position_ids(mask)[:, self._known :],
            past_key_values=self._cache,
            use_cache=self._keeps,
        )
        if self._keeps:
            self._cache, self._known = _cropped(outputs.past_key_values, final), final
        hidden: Tensor = outputs.last_hidden_state
        return hidden

    def kept(self, length: int) -> DynamicCache | None:
        """Return keys and values of what is final among the first ``length`` inputs, to write on from them.

        None if nothing is kept.
        """
        return None if self._cache is None else _cropped(self._cache, min(length, self._known))


def _can_keep(model: Any) -> bool:
    recomputes = model.training and any(module.gradient_checkpointing for module in is_checkpointed(model))
    return not recomputes and all(
        type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers
    )


def _cropped(cache: DynamicCache, length: int) -> DynamicCache:
    """Return another cache with the first positions of this one, which is not changed."""
    layers: list[Any] = [copy.copy(layer) for layer in cache.layers]
    for layer in layers:
        layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]
    cropped = copy.copy(cache)
    cropped.layers = layers
    return cropped


def position_ids(mask: Bool[Tensor, "batch time"]) -> Int[Tensor, "batch time"]:
    """Number every real token in its own text, from 0; padding before it has 0."""
    return (mask.long().cumsum(1) - 1).clamp_min(0)


def decoder_of(model: Any) -> nn.Module:
    """Return a model's decoder without its head, with the adapters it has.

    Raises:
        UnsupportedModelError: the model has no decoder apart from its head.
    """
    causal = without_adapters(model)
    decoder: nn.Module = causal.base_model
    if decoder is causal:
        raise UnsupportedModelError(f"{type(causal).__name__}: has no decoder apart from its head")
    return decoder
