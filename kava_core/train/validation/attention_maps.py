"""What every model of a finished run attends to in one validation example, for the report to draw."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from kava_core.json_files import write_json
from kava_core.kv.capture.attention_layers import without_adapters
from kava_core.runs.folder import Folder

LAYERS, LONGEST = 3, 64
"""Layers that are kept, evenly from the first to the last, and tokens."""


def spread(count: int) -> list[int]:
    """At most ``LAYERS`` of ``count`` layers, the first and the last among them."""
    kept = min(count, LAYERS)
    return [round(place * (count - 1) / max(1, kept - 1)) for place in range(kept)]


@torch.no_grad()
def attention_maps(
    model: nn.Module, input_ids: Tensor, layers: list[int] | None = None
) -> tuple[list[int], Float[Tensor, "layer time time"]]:
    """Layers and their attention weights over one text, the mean of the heads, by transformers' own eager
    attention: sinks, windows and position biases included."""
    with _eager(model):
        found = model(input_ids=input_ids[None, :LONGEST], use_cache=False, output_attentions=True)
    there = [one for one in found.attentions if one is not None]  # hybrids: some layers have none
    layers = spread(len(there)) if layers is None else layers
    return layers, torch.stack([there[layer][0].float().mean(0) for layer in layers]).cpu()


@contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and eager attention, put back afterwards."""
    inner, training = without_adapters(model), model.training
    before = inner.config._attn_implementation
    inner.set_attn_implementation("eager")
    model.eval()
    try:
        yield
    finally:
        inner.set_attn_implementation(before)
        model.train(training)


def keep_attention(
    folder: Folder,
    models: Mapping[str, nn.Module],
    batch: Mapping[str, Any],
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
) -> None:
    """Write both files; a model that cannot tell is left out, and why is noted: a trained run is not lost.

    Args:
        folder: of the run.
        models: by name, the student under ``student``.
        batch: one example, as the collator makes it.
        tokenizers: by the same names.
    """
    sides = {"student": batch["student"], **batch["teachers"]}
    kept: dict[str, Tensor] = {}
    told: dict[str, Any] = {}
    for name, model in models.items():
        ids = sides[name]["input_ids"][0][sides[name]["attention_mask"][0].bool()]
        ids = ids.to(next(model.parameters()).device)
        try:
            layers, maps = attention_maps(model, ids)
            words = [tokenizers[name].decode([token]) for token in ids[:LONGEST].tolist()]
        except Exception as error:  # models of others can raise anything
            told[name] = {"unknown": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
            continue
        kept[name], told[name] = maps, {"layers": layers, "tokens": words}
    save_file({name: x.half().contiguous() for name, x in kept.items()}, folder.attention_maps)
    write_json(folder.attention_tokens, told)
