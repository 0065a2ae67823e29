"""Split texts into tokens, where some characters are a template's and some are the data's own.

Special tokens of the template are special tokens; the same characters in the data are text. Without that an
example that mentions ``<eos>`` would end in the middle.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from kava_core.data.examples import Part


@dataclass(frozen=True)
class TokenizedPart:
    """What a tokenizer makes of one text."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    is_added: list[int]
    """1 if the token is not from the text: the tokenizer added it."""

    def count_leading(self) -> int:
        """Count the added tokens before the text; all tokens if there is no text at all."""
        for index, added in enumerate(self.is_added):
            if not added:
                return index
        return len(self.ids)

    def count_trailing(self) -> int:
        """Count the added tokens after the text; 0 if there is no text at all."""
        for index, added in enumerate(reversed(self.is_added)):
            if not added:
                return index
        return 0


def tokenize_parts(
    parts: Sequence[Part], tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool = True
) -> Iterator[TokenizedPart]:
    """Split texts into tokens; special tokens in their data's own characters are read as text.

    Args:
        parts: the texts.
        tokenizer: a fast one.
        add_special_tokens: let the tokenizer add what it adds around a text.
    """
    if not parts:
        return
    special = special_numbers(tokenizer)
    tokenized = _tokenize([part.text for part in parts], tokenizer, add_special_tokens=add_special_tokens)
    for part, tokens in zip(parts, tokenized, strict=True):
        if any(_is_data(tokens, index, special, part) for index in range(len(tokens.ids))):
            yield _with_data_as_text(tokens, special, part, tokenizer)
        else:
            yield tokens


def special_numbers(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the numbers of a tokenizer's special tokens."""
    added = tokenizer.added_tokens_decoder
    return frozenset(number for number, token in added.items() if token.special)


def _tokenize(
    texts: list[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_special_tokens: bool,
    specials_as_text: bool = False,
) -> Iterator[TokenizedPart]:
    output = tokenizer(
        texts,
        add_special_tokens=add_special_tokens,
        split_special_tokens=specials_as_text,
        padding=False,
        truncation=False,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        verbose=False,
    )
    yield from map(
        TokenizedPart, output["input_ids"], output["offset_mapping"], output["special_tokens_mask"]
    )


def _is_data(tokens: TokenizedPart, index: int, special: frozenset[int], part: Part) -> bool:
    """Return whether a token is a special one that holds a character of the data."""
    if tokens.ids[index] not in special or tokens.is_added[index]:
        return False
    begin, end = tokens.offsets[index]
    return any(begin < last and first < end for first, last in part.from_data)


def _with_data_as_text(
    tokens: TokenizedPart, special: frozenset[int], part: Part, tokenizer: PreTrainedTokenizerBase
) -> TokenizedPart:
    """Split a text again, in pieces between those special tokens that are the template's."""
    before, behind = tokens.count_leading(), len(tokens.ids) - tokens.count_trailing()
    ids, offsets = tokens.ids[:before], list(tokens.offsets[:before])
    position = 0
    for index in range(before, behind):
        if tokens.ids[index] not in special or _is_data(tokens, index, special, part):
            continue
        begin, end = tokens.offsets[index]
        _append_piece(ids, offsets, part.text, (position, begin), tokenizer)
        ids.append(tokens.ids[index])
        offsets.append((begin, end))
        position = end
    _append_piece(ids, offsets, part.text, (position, len(part.text)), tokenizer)
    text_length = len(ids) - before
    ids += tokens.ids[behind:]
    offsets += tokens.offsets[behind:]
    is_added = [1] * before + [0] * text_length + [1] * (len(tokens.ids) - behind)
    return TokenizedPart(ids, offsets, is_added)


def _append_piece(
    ids: list[int],
    offsets: list[tuple[int, int]],
    text: str,
    piece: tuple[int, int],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Append the tokens of a range of characters, in which special tokens are text."""
    start, end = piece
    if start == end:
        return
    (tokens,) = _tokenize([text[start:end]], tokenizer, add_special_tokens=False, specials_as_text=True)
    ids += tokens.ids
    offsets += [(first + start, last + start) for first, last in tokens.offsets]
