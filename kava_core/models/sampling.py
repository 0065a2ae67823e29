"""Sample texts from a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from kava_core.kv.capture.attention_layers import without_adapters


@torch.no_grad()
def sample_tokens(
    model: nn.Module,
    prompts: Mapping[str, Tensor],
    *,
    seed: int,
    temperature: float,
    max_new_tokens: int,
    count: int = 1,
) -> Tensor:
    """Sample ``count`` texts for every prompt, and return their tokens with the prompt's before them.

    Nothing but the temperature changes the model's probabilities, whatever its own generation settings are.
    The random state is left as it was.

    Args:
        model: a causal language model, in the mode it is to write in.
        prompts: ``input_ids`` and ``attention_mask``, padded left.
        seed: fixes what is drawn.
        temperature: of the sampling.
        max_new_tokens: most tokens of a text beside its prompt.
        count: texts for a prompt.
    """
    device = prompts["input_ids"].device
    generate: Any = model.generate
    with (
        _plain_generation_config(model),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
    ):
        torch.manual_seed(seed)
        tokens: Tensor = generate(
            **prompts,
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            num_return_sequences=count,
            max_new_tokens=max_new_tokens,
        )
    return tokens


@contextmanager
def _plain_generation_config(model: Any) -> Iterator[None]:
    """Keep only the special tokens of the model's generation settings; PEFT hands its own copy on."""
    inner = without_adapters(model)
    models = [model] if inner is model else [model, inner]
    before = [owner.generation_config for owner in models]
    tokens = {name: getattr(before[0], name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    try:
        for owner in models:
            owner.generation_config = GenerationConfig(**tokens)
        yield
    finally:
        for owner, settings in zip(models, before, strict=True):
            owner.generation_config = settings


def decode_new_tokens(tokenizer: Any, tokens: Tensor, length: int) -> list[str]:
    """Return the text that was written after the first ``length`` tokens of each row.

    Decoded together with the prompt: many tokenizers drop the space before the first word they decode.

    Args:
        tokenizer: of the model.
        tokens: ``batch time``, prompts included.
        length: tokens of a prompt, padding included.
    """
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    prompts = tokenizer.batch_decode(tokens[:, :length], skip_special_tokens=True)
    alone = tokenizer.batch_decode(tokens[:, length:], skip_special_tokens=True)
    written = []
    for text, prompt, rest in zip(texts, prompts, alone, strict=True):
        written.append(text[len(prompt) :] if text.startswith(prompt) else rest)
    return written


def real_tokens(tokens: Tensor, eos: int | None) -> Tensor:
    """Return which tokens were written: those up to the first EOS, which is included; the rest is padding.

    Args:
        tokens: what was written, ``batch time``.
        eos: number of the token that ends a text; None: there is none.
    """
    ended = tokens.eq(-1 if eos is None else eos).long()
    return (ended.cumsum(1) - ended).eq(0)
