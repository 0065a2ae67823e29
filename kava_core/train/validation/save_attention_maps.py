"""Save what every model of a finished run attends to in one validation example, for the report to draw."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from kava_core.files import replace_file, write_json
from kava_core.kv.capture.attention_layers import without_adapters
from kava_core.kv.capture.evaluation_mode import evaluation_mode
from kava_core.runs.folder import Folder

LAYERS, LONGEST = 3, 64
"""Layers that are kept, evenly from the first to the last, and tokens."""


def evenly_spaced_layers(count: int) -> list[int]:
    """Choose at most ``LAYERS`` of ``count`` layers, the first and the last among them."""
    kept = min(count, LAYERS)
    return [round(index * (count - 1) / max(1, kept - 1)) for index in range(kept)]


@torch.no_grad()
def compute_attention_maps(
    model: nn.Module, input_ids: Tensor, layers: list[int] | None = None
) -> tuple[list[int], Float[Tensor, "layer time time"]]:
    """Return layers and their attention weights over one text, the mean of the heads.

    They are computed by transformers' own eager attention: sinks, windows and position biases included.

    Args:
        model: a model of transformers.
        input_ids: one text.
        layers: which layers, counted among those that have attention weights; None: evenly spaced ones.
    """
    with _eager_attention(model), evaluation_mode(model):
        outputs = model(input_ids=input_ids[None, :LONGEST], use_cache=False, output_attentions=True)
    attentions = [weights for weights in outputs.attentions if weights is not None]  # hybrids have some None
    layers = evenly_spaced_layers(len(attentions)) if layers is None else layers
    return layers, torch.stack([attentions[layer][0].float().mean(0) for layer in layers]).cpu()


@contextmanager
def _eager_attention(model: nn.Module) -> Iterator[None]:
    """Make a model use eager attention, and restore its own afterwards."""
    inner = without_adapters(model)
    before = inner.config._attn_implementation
    inner.set_attn_implementation("eager")
    try:
        yield
    finally:
        inner.set_attn_implementation(before)


def save_attention_maps(
    folder: Folder,
    models: Mapping[str, nn.Module],
    batch: Mapping[str, Any],
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
) -> None:
    """Write the maps of all models, and their layers and tokens.

    A model that gives no attention weights is left out, and the reason is written: a trained run is not lost.

    Args:
        folder: of the run.
        models: by name, the student under ``student``.
        batch: one example, as the collator makes it.
        tokenizers: by the same names.
    """
    sides = {"student": batch["student"], **batch["teachers"]}
    kept: dict[str, Tensor] = {}
    descriptions: dict[str, Any] = {}
    for name, model in models.items():
        mask = sides[name]["attention_mask"][0].bool()
        ids = sides[name]["input_ids"][0][mask].to(next(model.parameters()).device)
        try:
            layers, maps = compute_attention_maps(model, ids)
            tokens = [tokenizers[name].decode([token]) for token in ids[:LONGEST].tolist()]
        except Exception as error:  # models of others can raise anything
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            descriptions[name] = {"unknown": reason}
            continue
        kept[name] = maps.half().contiguous()
        descriptions[name] = {"layers": layers, "tokens": tokens}
    replace_file(folder.attention_maps, save(kept))
    write_json(folder.attention_tokens, descriptions)
