"""Match the tokens of two vocabularies that stand for the same text."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kava_core.data.tokenizers import vocabulary_size

ANCHOR = "a"
"""A text that is decoded before a token, since decoders strip the space of a first word."""

BROKEN = "\N{REPLACEMENT CHARACTER}"
"""What decoders write for a part of a character."""


class SharedTokens(torch.nn.Module):
    """The tokens that two vocabularies share, and the rest of each.

    Args:
        student: the student's tokenizer.
        teacher: the teacher's.
    """

    own: Tensor
    theirs: Tensor
    own_rest: Tensor
    their_rest: Tensor

    def __init__(self, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.width, self.t_width = vocabulary_size(student), vocabulary_size(teacher)
        own, theirs = shared_tokens(student, teacher)
        self._keep("own", own)
        self._keep("theirs", theirs)
        self._keep("own_rest", _all_but(own, self.width))
        self._keep("their_rest", _all_but(theirs, self.t_width))

    def _keep(self, name: str, tokens: Tensor) -> None:
        self.register_buffer(name, tokens, persistent=False)


def _all_but(tokens: Int[Tensor, " _"], width: int) -> Int[Tensor, " _"]:
    remains = torch.ones(width, dtype=torch.bool)
    remains[tokens] = False
    return remains.nonzero().flatten()


def shared_tokens(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> tuple[Int[Tensor, " _"], Int[Tensor, " _"]]:
    """Return the numbers, in both vocabularies, of the tokens that stand for the same text.

    A text that several tokens of one vocabulary stand for is matched only among tokens that are written alike
    as well. So are tokens without a text of their own: special ones, and parts of characters.

    Args:
        student: the student's tokenizer.
        teacher: the teacher's.
    """
    own, theirs = token_texts(student), token_texts(teacher)
    own_unique, their_unique = _by_unique_key(own, alike=False), _by_unique_key(theirs, alike=False)
    pairs = {own_unique[text]: their_unique[text] for text in own_unique.keys() & their_unique.keys()}
    taken = set(pairs.values())
    own_alike, their_alike = _by_unique_key(own, alike=True), _by_unique_key(theirs, alike=True)
    for key in own_alike.keys() & their_alike.keys():
        number, t_number = own_alike[key], their_alike[key]
        if number not in pairs and t_number not in taken:
            pairs[number] = t_number
    numbers = sorted(pairs)
    matched = [pairs[number] for number in numbers]
    return torch.tensor(numbers, dtype=torch.long), torch.tensor(matched, dtype=torch.long)


def token_texts(tokenizer: PreTrainedTokenizerBase) -> dict[int, tuple[str, str | None]]:
    """Return every token as it is written in the vocabulary, and its text, by its number.

    The text is what the token adds to a text before it; None for special tokens and parts of characters.
    """
    special = set(tokenizer.all_special_ids)
    written = {number: token for token, number in tokenizer.get_vocab().items()}
    anchor = tokenizer.encode(ANCHOR, add_special_tokens=False)
    before = _decode_all(tokenizer, [anchor])[0]
    decoded = _decode_all(tokenizer, [[*anchor, number] for number in written])
    texts: dict[int, tuple[str, str | None]] = {}
    for (number, token), whole in zip(written.items(), decoded, strict=True):
        text = whole.removeprefix(before)
        has_text = number not in special and whole.startswith(before) and text and BROKEN not in text
        texts[number] = (token, text if has_text else None)
    return texts


def _decode_all(tokenizer: PreTrainedTokenizerBase, rows: list[list[int]]) -> list[str]:
    return list(tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _by_unique_key(texts: Mapping[int, tuple[str, str | None]], *, alike: bool) -> dict[Hashable, int]:
    """Return the tokens whose key no other token has, by it: the text, or with it how it is written."""
    tokens: dict[Hashable, int] = {}
    repeated: set[Hashable] = set()
    for number, (written, text) in texts.items():
        key = (written, text) if alike else text
        if key is None or key in tokens:
            repeated.add(key)
            continue
        tokens[key] = number
    return {key: number for key, number in tokens.items() if key not in repeated}
