"""The student's forward pass with latent tokens, and how it writes an answer after them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kava_core.latent.growing_text import positions
from kava_core.latent.tokens import LatentTokens, extended


class Thought(NamedTuple):
    """Prompt, BEGIN and the refined latent tokens, as inputs of the final pass."""

    inputs: Float[Tensor, "batch time hidden"]
    mask: Bool[Tensor, "batch time"]


def think(
    model: Any,
    latents: LatentTokens,
    before: Int[Tensor, "batch time"],
    before_mask: Int[Tensor, "batch time"],
) -> Thought:
    """Refine the latent tokens after ``before``, which is padded on the left: ``latents.passes`` passes."""
    mask = before_mask.bool()
    prefix = model.get_input_embeddings()(before)
    return Thought(torch.cat([prefix, latents(model, prefix, mask)], 1), extended(mask, latents.count))


def answer_outputs(model: Any, thought: Thought, side: Mapping[str, Tensor], **options: Any) -> Any:
    """The final pass: transformers' outputs over prompt, latent tokens and answer (``after`` of the side).

    Keys and values of the latent tokens stand at ``latent_columns``; ``answer_logits`` are the answer's.
    """
    answer = model.get_input_embeddings()(side["after"])
    mask = torch.cat([thought.mask, side["after_mask"].bool()], 1)
    return model(
        inputs_embeds=torch.cat([thought.inputs, answer], 1),
        attention_mask=mask.long(),
        position_ids=positions(mask),
        use_cache=False,
        **options,
    )


def latent_columns(side: Mapping[str, Tensor]) -> slice:
    """Where the latent tokens stand in the final pass."""
    begin = side["before"].shape[1]
    return slice(begin, begin + side["segments"].shape[1])


def answer_logits(
    logits: Float[Tensor, "batch time vocab"], side: Mapping[str, Tensor]
) -> Float[Tensor, "batch _ vocab"]:
    """Those of ``after``: END predicts the answer's first token."""
    return logits[:, logits.shape[1] - side["after"].shape[1] :]


@torch.no_grad()
def write_answers(
    model: Any,
    latents: LatentTokens,
    before: Int[Tensor, "batch time"],
    before_mask: Int[Tensor, "batch time"],
    *,
    end: int,
    max_new_tokens: int,
) -> Int[Tensor, "batch _"]:
    """Greedy answers after the latent tokens and the token ``end``: the new tokens alone.

    Takes ``latents.passes`` passes over prompt and latent tokens, then one for every new token.
    """
    thought = think(model, latents, before, before_mask)
    last = model.get_input_embeddings()(before.new_full((len(before), 1), end))
    found: Tensor = model.generate(
        inputs_embeds=torch.cat([thought.inputs, last], 1),
        attention_mask=extended(thought.mask, 1).long(),
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    return found
