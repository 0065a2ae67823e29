"""Decode latent tokens: the states that write them, read by the model's own head.

For ordinary tokens this is reading a state with the last layer's lens.

Source: CODI (arXiv 2502.21074), which looks at its latent tokens in this way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kava_core.latent.student import final_pass, logits_kept, refine_latents, writer_logits
from kava_core.latent.tokens import LatentTokens
from kava_core.protocols.timeline import REASONING

LikelyTokens = list[list[tuple[str, float]]]
"""For every slot the likeliest tokens with their probabilities, falling."""


@torch.no_grad()
def slot_logits(
    model: Any, latents: LatentTokens, side: Mapping[str, Tensor]
) -> Float[Tensor, "batch _ vocab"]:
    """Return the next-token logits at the place before every slot, in the final pass.

    The hidden state at that place is what the slot is written from; place 0 is the last token before the
    first slot.

    Args:
        model: the student.
        latents: its latent tokens.
        side: the student's side of ``LatentCollator``.
    """
    thought = refine_latents(model, latents, side["before"], side["before_mask"])
    outputs = final_pass(model, thought, side, **logits_kept(model, side, writers=True))
    return writer_logits(outputs.logits, side)


def likely_tokens(
    logits: Float[Tensor, "batch time vocab"], tokenizer: PreTrainedTokenizerBase, *, top: int
) -> list[LikelyTokens]:
    """Return the ``top`` likeliest tokens of every slot of every example; all of a smaller vocabulary."""
    probabilities, tokens = logits.float().softmax(-1).topk(min(top, logits.shape[-1]))
    examples = []
    for ids_of_slots, shares_of_slots in zip(tokens.tolist(), probabilities.tolist(), strict=True):
        slots = []
        for ids, shares in zip(ids_of_slots, shares_of_slots, strict=True):
            slots.append(list(zip(token_texts(ids, tokenizer), shares, strict=True)))
        examples.append(slots)
    return examples


def token_texts(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return every token by itself as text, special tokens as well."""
    texts: list[str] = tokenizer.batch_decode([[token] for token in ids], clean_up_tokenization_spaces=False)
    return texts


def reasoning_tokens(side: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerBase) -> list[list[str]]:
    """Return the tokens of the reasoning that a teacher reads, of every example."""
    inside = side["segments"].eq(REASONING)
    examples = []
    for ids, of_reasoning in zip(side["input_ids"], inside, strict=True):
        examples.append(token_texts(ids[of_reasoning].tolist(), tokenizer))
    return examples
