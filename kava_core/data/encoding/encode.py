"""Encode texts: tokens of one tokenizer, each with its segment and the characters it covers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kava_core.data.encoding.tokenize import TokenizedPart, tokenize_parts
from kava_core.data.examples import Example, Part, Text, render_example, shorten_to_end
from kava_core.errors import SpecError
from kava_core.protocols.timeline import ANSWER, PROMPT
from kava_core.specfile.sections.data import Template

LossOn = Literal["completion", "all"]

NO_LABEL = -100
"""Label of a token without cross-entropy, as in transformers."""


@dataclass(frozen=True)
class EncodedText:
    """One text in one tokenizer; ``time`` is its number of tokens, without padding."""

    input_ids: Int[Tensor, " time"]
    segments: Int[Tensor, " time"]
    """PROMPT, REASONING or ANSWER; never decreasing."""
    spans: Int[Tensor, "time 2"]
    """Half-open character spans in the text, as the tokenizer reports them; zero-width at special tokens."""
    labels: Int[Tensor, " time"]
    """The token itself, or NO_LABEL; not shifted."""
    answer_boundary: int
    """Index of the token before the first of the example's own answer."""

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def prompt_length(self) -> int:
        """Return the number of tokens of the prompt."""
        return int((self.segments == PROMPT).sum())


class EncodedPiece(NamedTuple):
    """Tokens of a text that follows others, without what a tokenizer adds."""

    ids: Int[Tensor, " time"]
    spans: Int[Tensor, "time 2"]
    """Half-open character spans in this text."""


def encode_text(
    text: Text,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    loss_on: LossOn = "completion",
) -> EncodedText | None:
    """Encode one text; None if it has more than ``max_length`` tokens. See ``encode_texts``."""
    return encode_texts([text], tokenizer, max_length=max_length, loss_on=loss_on)[0]


def encode_texts(
    texts: Sequence[Text],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    loss_on: LossOn = "completion",
) -> list[EncodedText | None]:
    """Encode texts; None for a text with more than ``max_length`` tokens.

    Special tokens are those the tokenizer adds, and one EOS at the end if it has one and does not add it.
    Special tokens before the text belong to the prompt, those after it to the answer. Any other token
    belongs to the segment of its last character, so a token that begins with a space goes with the word.
    With ``loss_on="completion"`` the prompt has no labels.

    Raises:
        SpecError: the tokenizer's offsets run backwards.
    """
    encoded: list[EncodedText | None] = []
    tokenized = tokenize_parts([text.whole for text in texts], tokenizer)
    for text, without_eos in zip(texts, tokenized, strict=True):
        tokens = _append_eos(without_eos, tokenizer.eos_token_id)
        fits = max_length is None or len(tokens.ids) <= max_length
        encoded.append(_encode_tokens(text, tokens, tokenizer, loss_on) if fits else None)
    return encoded


def encode_pieces(parts: Sequence[Part], tokenizer: PreTrainedTokenizerBase) -> list[EncodedPiece]:
    """Encode texts that follow others."""
    pieces = []
    for tokens in tokenize_parts(parts, tokenizer, add_special_tokens=False):
        pieces.append(EncodedPiece(torch.tensor(tokens.ids, dtype=torch.long), _span_tensor(tokens.offsets)))
    return pieces


def prompt_ids(prompts: Sequence[Part], tokenizer: PreTrainedTokenizerBase) -> list[Int[Tensor, " time"]]:
    """Return the tokens of prompts as generation starts from them: without what a tokenizer adds at the end.

    They are the first tokens of the whole text's, except if the tokenizer merges the prompt's last
    characters with the first of the completion; ``count_prefix_mismatches`` counts that.
    """
    prompt_tokens = []
    for tokens in tokenize_parts(prompts, tokenizer):
        end = len(tokens.ids) - tokens.count_trailing()
        prompt_tokens.append(torch.tensor(tokens.ids[:end], dtype=torch.long))
    return prompt_tokens


def count_prefix_mismatches(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, template: Template
) -> int:
    """Count the examples whose prompt, tokenized alone, does not begin their whole text's tokens.

    The student is trained on the tokens of the whole text and writes answers after those of the prompt, so a
    count above 0 means that evaluation begins from tokens it was not trained on.
    """
    texts = [render_example(example, template) for example in examples]
    prompts = prompt_ids([text.prompt_part for text in texts], tokenizer)
    whole_texts = tokenize_parts([text.whole for text in texts], tokenizer)
    mismatches = 0
    for prompt, whole in zip(prompts, whole_texts, strict=True):
        mismatches += prompt.tolist() != whole.ids[: len(prompt)]
    return mismatches


def find_answer_boundary(spans: Int[Tensor, "time 2"], text: str, answer_start: int, *, where: str) -> int:
    """Return the index of the token before the first that covers characters from ``answer_start`` on.

    0 where that is the first token, and the last token where there is nothing but white space from there on.

    Args:
        spans: of the text's tokens.
        text: what they are tokens of.
        answer_start: the answer's first character.
        where: names the tokenizer in the error.

    Raises:
        SpecError: there is an answer, and no token covers it.
    """
    reaches_answer = (spans[:, 1] > answer_start) & (spans[:, 1] > spans[:, 0])
    if not reaches_answer.any():
        if text[answer_start:].strip():
            raise SpecError(
                f"{where}: no token covers the answer of the text {shorten_to_end(text)!r}: nothing would be "
                "learnt or judged there"
            )
        return max(len(spans) - 1, 0)
    return max(int(reaches_answer.int().argmax()) - 1, 0)


def _append_eos(tokens: TokenizedPart, eos: int | None) -> TokenizedPart:
    """Append EOS to the tokens, unless the text ends with it already or the tokenizer has none."""
    if eos is None or tokens.ids[-1:] == [eos]:
        return tokens
    return TokenizedPart([*tokens.ids, eos], [*tokens.offsets, (0, 0)], [*tokens.is_added, 1])


def _encode_tokens(
    text: Text, tokens: TokenizedPart, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn
) -> EncodedText:
    input_ids = torch.tensor(tokens.ids, dtype=torch.long)
    text_start = tokens.count_leading()
    text_end = len(input_ids) - tokens.count_trailing()
    spans = _span_tensor(tokens.offsets)
    spans[:text_start] = 0
    spans[text_end:] = text.bounds[-1]
    segments = _segments_of_spans(spans, text)
    segments[:text_start] = PROMPT
    segments[text_end:] = ANSWER
    if (segments.diff() < 0).any():
        raise SpecError(f"tokenizer {tokenizer.name_or_path!r}: its character offsets run backwards")
    has_label = segments.ge(PROMPT) if loss_on == "all" else segments.ne(PROMPT)
    labels = torch.where(has_label, input_ids, NO_LABEL)
    where = f"tokenizer {tokenizer.name_or_path!r}"
    boundary = find_answer_boundary(spans[:text_end], text.text, text.answer_start, where=where)
    return EncodedText(input_ids, segments, spans, labels, boundary)


def _span_tensor(offsets: Sequence[tuple[int, int]]) -> Int[Tensor, "time 2"]:
    return torch.tensor(offsets, dtype=torch.long).reshape(-1, 2)


def _segments_of_spans(spans: Int[Tensor, "time 2"], text: Text) -> Int[Tensor, " time"]:
    """Return the segment of each token's last character; of the character before it for a token without
    any."""
    last_characters = spans[:, 1].clamp_min(1)
    return torch.bucketize(last_characters, torch.tensor(text.bounds[1:3]))
