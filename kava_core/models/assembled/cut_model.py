"""Take a model of fewer layers out of a whole one: its vocabulary, head and final norm stay."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from kava_core.models.assembled.cut_config import cut_config, layer_list, model_depth
from kava_core.models.assembled.rebuilt import rebuilt_model


def cut_model(model: nn.Module, kept: tuple[int, ...], *, attention: str, where: str) -> nn.Module:
    """Return a model of some layers of another, which share its weights; that one is to be given up.

    It is exactly the model that transformers makes of the cut config, so attention layers have the right
    numbers in key-value caches, and its saved folder loads everywhere.

    Args:
        model: the whole one.
        kept: numbers of the kept layers, ascending.
        attention: the attention implementation of transformers.
        where: how errors name the section.

    Raises:
        SpecError: layers cannot be taken out of such a model.
    """
    depth = model_depth(model.config, where=where)
    if kept == tuple(range(depth)):
        return model
    config = cut_config(model.config, kept, where=where)
    found = layer_list(model, depth)
    assert found is not None
    weights = dict(_renumbered(model.state_dict(), found[0], kept))
    return rebuilt_model(config, weights, like=model, attention=attention)


def _renumbered(
    weights: Mapping[str, Tensor], layers: str, kept: tuple[int, ...]
) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors of the kept layers under their new numbers, and all that is in no layer."""
    pattern = re.compile(rf"{re.escape(layers)}\.(\d+)\.(.+)")
    numbers = {layer: index for index, layer in enumerate(kept)}
    for name, tensor in weights.items():
        match = pattern.fullmatch(name)
        if match is None:
            yield name, tensor
        elif int(match[1]) in numbers:
            yield f"{layers}.{numbers[int(match[1])]}.{match[2]}", tensor
