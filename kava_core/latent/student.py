"""Run the student's forward pass with latent tokens, and let it write an answer after them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kava_core.errors import UnsupportedModelError
from kava_core.kv.capture.attention_layers import without_adapters
from kava_core.latent.growing_text import GrowingText, position_ids
from kava_core.latent.tokens import LatentTokens, extend_mask
from kava_core.models.writing import CHECK, CHECKED_TOKENS, agrees, largest_difference, options_of_writing

Control = Literal["zeroed", "shuffled"]
"""Latent tokens that know nothing: zeros, or those of the next example of the batch."""


class RefinedLatents(NamedTuple):
    """Prompt, BEGIN and the refined latent tokens, as inputs of the final pass."""

    inputs: Float[Tensor, "batch time hidden"]
    mask: Bool[Tensor, "batch time"]
    latents: int
    """How many of them, at the end, are latent tokens."""

    def controlled(self, control: Control) -> RefinedLatents:
        """Return the same with latent tokens that do not depend on the example.

        Args:
            control: ``zeroed``: zeros; ``shuffled``: those of the next example of the batch.
        """
        prefix, thought = self.inputs.split([self.inputs.shape[1] - self.latents, self.latents], 1)
        ignorant = torch.zeros_like(thought) if control == "zeroed" else thought.roll(-1, 0)
        return self._replace(inputs=torch.cat([prefix, ignorant], 1))


def refine_latents(
    model: Any,
    latents: LatentTokens,
    before: Int[Tensor, "batch time"],
    before_mask: Int[Tensor, "batch time"],
    read: GrowingText | None = None,
) -> RefinedLatents:
    """Compute the refined latent tokens after the prompt, in ``latents.rounds`` forward passes.

    Args:
        model: a causal language model of transformers, possibly with adapters.
        latents: the latent tokens.
        before: prompt and BEGIN, padded on the left.
        before_mask: its real positions.
        read: reads the text, and keeps what is final; None: a new reader.

    Source: PCCoT (arXiv 2506.18582).
    """
    mask = before_mask.bool()
    prefix = model.get_input_embeddings()(before)
    inputs = torch.cat([prefix, latents(model, prefix, mask, read)], 1)
    return RefinedLatents(inputs, extend_mask(mask, latents.active), latents.active)


def final_pass(model: Any, thought: RefinedLatents, side: Mapping[str, Tensor], **options: Any) -> Any:
    """Run the model over prompt, latent tokens and answer, and return transformers' outputs.

    Args:
        model: a causal language model of transformers, possibly with adapters.
        thought: prompt and refined latent tokens.
        side: the collator's tensors of the student's side; ``after`` holds the answer.
        options: further arguments of the model.

    Keys and values of the latent tokens are at ``latent_columns``. ``answer_logits``, ``writer_logits`` and
    ``states_at_answer_boundary`` pick further parts of the outputs.
    """
    answer = model.get_input_embeddings()(side["after"])
    mask = torch.cat([thought.mask, side["after_mask"].bool()], 1)
    return model(
        inputs_embeds=torch.cat([thought.inputs, answer], 1),
        attention_mask=mask.long(),
        position_ids=position_ids(mask),
        use_cache=False,
        **options,
    )


def latent_columns(side: Mapping[str, Tensor]) -> slice:
    """Return the positions of the latent tokens in the final pass."""
    begin = side["before"].shape[1]
    return slice(begin, begin + side["segments"].shape[1])


def answer_logits(
    logits: Float[Tensor, "batch time vocab"], side: Mapping[str, Tensor]
) -> Float[Tensor, "batch _ vocab"]:
    """Return the logits at the positions of ``after``; END's predict the answer's first token."""
    return logits[:, logits.shape[1] - side["after"].shape[1] :]


def writer_logits(
    logits: Float[Tensor, "batch time vocab"], side: Mapping[str, Tensor]
) -> Float[Tensor, "batch _ vocab"]:
    """Return the logits at the position before each latent token, from whose hidden state it is written."""
    behind = side["after"].shape[1] + 1
    return logits[:, -behind - side["segments"].shape[1] : -behind]


def logits_kept(model: nn.Module, side: Mapping[str, Tensor], *, writers: bool) -> dict[str, int]:
    """Return the model's option that restricts the head to the answer's positions.

    Empty for a model that has no such option.

    Args:
        model: possibly with adapters.
        side: the collator's tensors of the student's side.
        writers: keep the positions of ``writer_logits`` as well.
    """
    count = side["after"].shape[1] + (side["segments"].shape[1] + 1 if writers else 0)
    takes = "logits_to_keep" in inspect.signature(without_adapters(model).forward).parameters
    return {"logits_to_keep": count} if takes else {}


def states_at_answer_boundary(
    hidden: Sequence[Float[Tensor, "batch time hidden"]], answer_boundary: Int[Tensor, " batch"]
) -> Float[Tensor, "layer batch hidden"]:
    """Gather all layers' hidden states at one position of each example.

    Args:
        hidden: of every layer.
        answer_boundary: the position, for each example.
    """
    rows = torch.arange(len(answer_boundary), device=answer_boundary.device)
    return torch.stack([states[rows, answer_boundary] for states in hidden])


@torch.no_grad()
def write_answers(
    model: Any,
    latents: LatentTokens,
    before: Int[Tensor, "batch time"],
    before_mask: Int[Tensor, "batch time"],
    *,
    end: int,
    max_new_tokens: int,
    control: Control | None = None,
) -> Int[Tensor, "batch _"]:
    """Write greedy answers after the latent tokens and the token ``end``; return the new tokens alone.

    Takes ``latents.rounds`` passes for the latent tokens, then one for every new token. What is final after
    the former is not read again.

    Args:
        model: a causal language model of transformers, possibly with adapters.
        latents: the latent tokens.
        before: prompt and BEGIN, padded on the left.
        before_mask: its real positions.
        end: number of the token END.
        max_new_tokens: most tokens of an answer.
        control: latent tokens that do not depend on the example, for comparison; None: the refined ones.
    """
    start = _start_of_answers(model, latents, before, before_mask, end=end, control=control)
    answers: Tensor = model.generate(**start, max_new_tokens=max_new_tokens, do_sample=False)
    return answers


def _start_of_answers(
    model: Any,
    latents: LatentTokens,
    before: Tensor,
    before_mask: Tensor,
    *,
    end: int,
    control: Control | None = None,
) -> dict[str, Any]:
    """Return what ``generate`` starts from: prompt, latent tokens and END, and the cache of what was read."""
    read = GrowingText(model)
    thought = refine_latents(model, latents, before, before_mask, read)
    known = before.shape[1] + (latents.active if control is None else 0)
    thought = thought if control is None else thought.controlled(control)
    last = model.get_input_embeddings()(before.new_full((len(before), 1), end))
    return options_of_writing(model) | {
        "inputs_embeds": torch.cat([thought.inputs, last], 1),
        "attention_mask": extend_mask(thought.mask, 1).long(),
        "past_key_values": read.kept(known),
    }


@torch.no_grad()
def check_writing(
    model: Any, latents: LatentTokens, before: Tensor, before_mask: Tensor, *, end: int
) -> None:
    """Check on a few tokens that answers are written from the logits that the final pass has in training.

    Args:
        model: as in ``write_answers``.
        latents: likewise.
        before: likewise.
        before_mask: likewise.
        end: likewise.

    Raises:
        UnsupportedModelError: the logits differ, as where a model counts its positions in another way.
    """
    output = model.generate(
        **_start_of_answers(model, latents, before, before_mask, end=end),
        **CHECK,
    )
    after = F.pad(output.sequences[:, :-1], (1, 0), value=end)
    thought = refine_latents(model, latents, before, before_mask)
    outputs = final_pass(model, thought, {"after": after, "after_mask": torch.ones_like(after)})
    plain = outputs.logits[:, -CHECKED_TOKENS:]
    difference = largest_difference(torch.stack(output.logits, 1), plain)
    if not agrees(difference, model):
        raise UnsupportedModelError(
            f"student: generate() of {type(without_adapters(model)).__name__} has other logits behind latent "
            f"tokens than a plain pass (by {difference:.2g} of their standard deviation): its answers cannot "
            "be judged"
        )
