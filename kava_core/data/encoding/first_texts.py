"""Look at what a tokenizer makes of the first texts, before anything is trained on them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from kava_core.data.encoding.tokenize import TokenizedPart, special_numbers, tokenize_parts
from kava_core.data.examples import Example, Part, render_example, shorten_to_end
from kava_core.errors import SpecError
from kava_core.specfile.sections.data import Template

LOOKED_AT = 64
"""Examples whose texts are looked at."""


def notices_on_texts(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], template: Template, *, who: str
) -> list[str]:
    """Return what a user should know of a tokenizer and the data, a line each.

    Told are tokens for unknown characters, characters that no token covers, and special tokens in the data.

    Args:
        tokenizer: a model's.
        examples: all of them; the first are tokenized.
        template: renders them for this model.
        who: names the model, such as ``teacher 'big'``.

    Raises:
        SpecError: a text would begin with two BOS tokens, one of the template and one that the tokenizer
        adds.
    """
    parts = [render_example(example, template).whole for example in examples[:LOOKED_AT]]
    tokenized = list(tokenize_parts(parts, tokenizer))
    for tokens in tokenized:
        _refuse_doubled_start(tokens, tokenizer, who)
    lines = [
        *_unknown_tokens(tokenized, tokenizer),
        *_dropped_characters(parts, tokenized),
        *_special_tokens_in_data(examples, tokenizer),
    ]
    return [f"{who}: {line}" for line in lines]


def _refuse_doubled_start(tokens: TokenizedPart, tokenizer: PreTrainedTokenizerBase, who: str) -> None:
    leading = tokens.count_leading()
    if leading < len(tokens.ids) and tokens.ids[leading] in tokens.ids[:leading]:
        token = tokenizer.convert_ids_to_tokens(tokens.ids[leading])
        raise SpecError(
            f"{who}: its texts would begin with {token!r} twice: the template has one and the tokenizer adds "
            "one; drop it from the template's prompt"
        )


def _unknown_tokens(tokenized: Sequence[TokenizedPart], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return
    of_texts = [tokens.ids[: len(tokens.ids) - tokens.count_trailing()] for tokens in tokenized]
    count = sum(ids.count(unknown) for ids in of_texts)
    if count:
        share = count / sum(len(ids) for ids in of_texts)
        with_unknown = sum(unknown in ids for ids in of_texts)
        yield (
            f"its tokenizer does not know everything in the data: {share:.2g} of the tokens, in "
            f"{with_unknown} of the first {len(of_texts)} examples, are {tokenizer.unk_token!r}"
        )


def _dropped_characters(parts: Sequence[Part], tokenized: Sequence[TokenizedPart]) -> Iterator[str]:
    """Tell of visible characters that are part of no token, so that the model never reads them."""
    dropped = [_uncovered(part.text, tokens) for part, tokens in zip(parts, tokenized, strict=True)]
    concerned = [characters for characters in dropped if characters]
    if concerned:
        yield (
            f"its tokenizer drops characters, such as {concerned[0][0]!r}, in {len(concerned)} of the first "
            f"{len(parts)} examples"
        )


def _uncovered(text: str, tokens: TokenizedPart) -> list[str]:
    covered = bytearray(len(text))
    for begin, end in tokens.offsets:
        covered[begin:end] = b"\x01" * (end - begin)
    return [
        char
        for char, seen in zip(text, covered, strict=True)
        if not seen and char.isprintable() and not char.isspace()
    ]


def _special_tokens_in_data(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    special = tokenizer.convert_ids_to_tokens(sorted(special_numbers(tokenizer)))
    if not special:
        return
    pattern = re.compile("|".join(map(re.escape, special)))
    found = [match for example in examples if (match := _first_match(pattern, example))]
    if found:
        yield (
            f"the data's own text holds special tokens of its tokenizer, such as {found[0]!r}, in "
            f"{len(found)} of {len(examples)} examples; they are read as text"
        )


def _first_match(pattern: re.Pattern[str], example: Example) -> str | None:
    match = pattern.search("\0".join((example.prompt, example.reasoning, example.answer)))
    return match[0] if match else None


def alteration(shown: tuple[str, str]) -> str:
    """Return the words for a text that encoding and decoding alter, and what it becomes."""
    before, after = (shorten_to_end(text.strip()) for text in shown)
    return f"its tokenizer does not give texts back as they were: {before!r} becomes {after!r}"
