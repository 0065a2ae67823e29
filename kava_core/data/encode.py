"""Text to tokens of one tokenizer, each with its segment and the characters it covers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kava_core.data.examples import Example, Text, render_example
from kava_core.errors import SpecError
from kava_core.protocols.timeline import ANSWER, PROMPT
from kava_core.specfile.sections.data import Template

LossOn = Literal["completion", "all"]

NO_LABEL = -100
"""Label of a token without cross-entropy, as transformers wants it."""


@dataclass(frozen=True)
class EncodedText:
    """One text in one tokenizer; ``time`` is its number of tokens, without padding."""

    input_ids: Int[Tensor, " time"]
    segments: Int[Tensor, " time"]
    """PROMPT, REASONING, ANSWER; never decreasing."""
    spans: Int[Tensor, "time 2"]
    """Half-open character spans in the text, as the tokenizer reports them; zero-width at special tokens."""
    labels: Int[Tensor, " time"]
    """The token itself, or NO_LABEL; not shifted."""
    answer_boundary: int
    """The token before the first of the example's own answer."""

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return int((self.segments == PROMPT).sum())


@dataclass(frozen=True)
class _TokenizedText:
    """What a tokenizer says about one text."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    added: list[int]
    """1 where the token does not come from the text: the tokenizer put it there."""

    def leading(self) -> int:
        """Added tokens before the text."""
        return next((place for place, added in enumerate(self.added) if not added), len(self.ids))

    def trailing(self) -> int:
        """Added tokens after the text; where there is no text at all, all of them stand before it."""
        return next((place for place, added in enumerate(reversed(self.added)) if not added), 0)


def encode_text(
    text: Text,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    loss_on: LossOn = "completion",
) -> EncodedText | None:
    """The text's tokens, or None where there are more than ``max_length``. See ``encode_texts``."""
    return encode_texts([text], tokenizer, max_length=max_length, loss_on=loss_on)[0]


def encode_texts(
    texts: Sequence[Text],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    loss_on: LossOn = "completion",
) -> list[EncodedText | None]:
    """The tokens of each text, None for a text with more than ``max_length``.

    Special tokens are those the tokenizer adds, and one EOS at the end if it has one and does not add it.
    Special tokens before the text belong to the prompt, those after it to the answer. Any other token
    belongs to the segment of its last character, so a token that begins with a space goes with the word.
    With ``loss_on="completion"`` the prompt has no labels.

    Raises:
        SpecError: the tokenizer's offsets run backwards.
    """
    tokens = _tokenize_texts([text.text for text in texts], tokenizer)
    fits = (_append_eos(each, tokenizer.eos_token_id) for each in tokens)
    return [
        _encode_tokens(text, each, tokenizer, loss_on)
        if max_length is None or len(each.ids) <= max_length
        else None
        for text, each in zip(texts, fits, strict=True)
    ]


def prompt_ids(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Int[Tensor, " time"]]:
    """The tokens of each prompt as generation starts from them: what a tokenizer adds after it is left out.

    They are the first tokens of the whole text's, except where the tokenizer merges the prompt's last
    characters with the first of the completion; ``count_prefix_mismatches`` counts that.
    """
    tokens = _tokenize_texts(prompts, tokenizer)
    return [torch.tensor(each.ids[: len(each.ids) - each.trailing()], dtype=torch.long) for each in tokens]


class EncodedPiece(NamedTuple):
    """Tokens of a text that stands after others, without what a tokenizer adds."""

    ids: Int[Tensor, " time"]
    spans: Int[Tensor, "time 2"]
    """Their characters in this text."""


def encode_pieces(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[EncodedPiece]:
    """The tokens of texts that stand after others."""
    if not texts:
        return []
    rules: dict[str, Any] = {"add_special_tokens": False, "padding": False, "truncation": False}
    found = tokenizer(list(texts), return_offsets_mapping=True, verbose=False, **rules)
    return [
        EncodedPiece(
            torch.tensor(ids, dtype=torch.long), torch.tensor(spans, dtype=torch.long).reshape(-1, 2)
        )
        for ids, spans in zip(found["input_ids"], found["offset_mapping"], strict=True)
    ]


def count_prefix_mismatches(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, template: Template
) -> int:
    """Examples whose prompt, tokenized alone, does not begin their whole text's tokens.

    The student is trained on the tokens of the whole text and writes answers after those of the prompt, so a
    count above 0 says that evaluation begins from tokens it was not trained on.
    """
    texts = [render_example(example, template) for example in examples]
    alone = prompt_ids([text.prompt for text in texts], tokenizer)
    whole = _tokenize_texts([text.text for text in texts], tokenizer)
    return sum(ids.tolist() != each.ids[: len(ids)] for ids, each in zip(alone, whole, strict=True))


def _tokenize_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[_TokenizedText]:
    if not texts:
        return
    found = tokenizer(
        list(texts),
        padding=False,
        truncation=False,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        verbose=False,
    )
    yield from map(_TokenizedText, found["input_ids"], found["offset_mapping"], found["special_tokens_mask"])


def _append_eos(tokens: _TokenizedText, eos: int | None) -> _TokenizedText:
    """The tokens with EOS at the end: appended, unless the tokenizer added it."""
    if eos is None or (tokens.ids and tokens.added[-1] and tokens.ids[-1] == eos):
        return tokens
    return _TokenizedText([*tokens.ids, eos], [*tokens.offsets, (0, 0)], [*tokens.added, 1])


def _encode_tokens(
    text: Text, tokens: _TokenizedText, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn
) -> EncodedText:
    input_ids = torch.tensor(tokens.ids, dtype=torch.long)
    leading, trailing = tokens.leading(), len(input_ids) - tokens.trailing()
    spans = torch.tensor(tokens.offsets, dtype=torch.long).reshape(-1, 2)
    spans[:leading], spans[trailing:] = 0, text.bounds[-1]
    segments = _segments_of_spans(spans, text)
    segments[:leading], segments[trailing:] = PROMPT, ANSWER
    if (segments.diff() < 0).any():
        raise SpecError(f"tokenizer {tokenizer.name_or_path!r}: its character offsets run backwards")
    labelled = segments.ge(PROMPT) if loss_on == "all" else segments.ne(PROMPT)
    return EncodedText(
        input_ids,
        segments,
        spans,
        _labels(input_ids, labelled),
        find_answer_boundary(spans, text.answer_start),
    )


def find_answer_boundary(spans: Int[Tensor, "time 2"], value: int) -> int:
    """The token before the first that covers characters from ``value`` on; 0 where there is none."""
    reaches = (spans[:, 1] > value) & (spans[:, 1] > spans[:, 0])
    return max(int(reaches.int().argmax()) - 1, 0)


def _segments_of_spans(spans: Int[Tensor, "time 2"], text: Text) -> Int[Tensor, " time"]:
    """Segment of each token's last character; of the character before it for a token without any."""
    last = spans[:, 1].clamp_min(1)
    return torch.bucketize(last, torch.tensor(text.bounds[1:3]))


def _labels(input_ids: Int[Tensor, " time"], labelled: Bool[Tensor, " time"]) -> Int[Tensor, " time"]:
    return torch.where(labelled, input_ids, NO_LABEL)
