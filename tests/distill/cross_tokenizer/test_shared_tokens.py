"""Tokens that two vocabularies share."""

from __future__ import annotations

from typing import Any

import pytest

from kava_core.distill.cross_tokenizer.shared_tokens import SharedTokens, shared_tokens, token_texts
from tests.support import tiny_models

KINDS = ("chars", "bpe", "unigram")


def texts_of(tokenizer: Any, numbers: list[int]) -> list[str]:
    """What each token adds behind another one."""
    before = tokenizer.encode("a", add_special_tokens=False)
    start = len(tokenizer.decode(before))
    return [tokenizer.decode([*before, number])[start:] for number in numbers]


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_those_that_tokens_stand_for(kind: str) -> None:
    """Every token of a text covers the characters that its own text says; spaces included."""
    tokenizer = tiny_models.tokenizer(kind)
    written = "4-1+1= 3 and 40"
    encoded = tokenizer(written, return_offsets_mapping=True, add_special_tokens=False)
    texts = token_texts(tokenizer)
    found = [texts[number][1] for number in encoded["input_ids"]]
    assert "".join(text or "?" for text in found).strip() == written
    assert all(texts[number][1] is None for number in tokenizer.all_special_ids)


@pytest.mark.parametrize("student", KINDS)
@pytest.mark.parametrize("teacher", KINDS)
def test_shared_tokens_stand_for_the_same_text(student: str, teacher: str) -> None:
    own, theirs = tiny_models.tokenizer(student), tiny_models.tokenizer(teacher)
    numbers, t_numbers = (tensor.tolist() for tensor in shared_tokens(own, theirs))
    assert len(numbers) == len(set(numbers)) == len(set(t_numbers))
    special = set(own.all_special_ids)
    plain = [place for place, number in enumerate(numbers) if number not in special]
    mine = texts_of(own, [numbers[place] for place in plain])
    others = texts_of(theirs, [t_numbers[place] for place in plain])
    # A part of a character has no text of its own; it is matched by how it is written.
    whole = [(a, b) for a, b in zip(mine, others, strict=True) if "\ufffd" not in a]
    assert all(a == b for a, b in whole)
    assert {"3", "+"} <= {a for a, _ in whole}


@pytest.mark.parametrize("kind", KINDS)
def test_a_vocabulary_shares_all_of_itself(kind: str) -> None:
    tokenizer = tiny_models.tokenizer(kind)
    numbers, t_numbers = shared_tokens(tokenizer, tokenizer)
    assert numbers.tolist() == t_numbers.tolist() == sorted(tokenizer.get_vocab().values())


def test_the_rest_is_all_that_is_not_shared() -> None:
    own, theirs = tiny_models.tokenizer("chars"), tiny_models.tokenizer("bpe")
    shared = SharedTokens(own, theirs)
    assert sorted([*shared.own.tolist(), *shared.own_rest.tolist()]) == list(range(shared.width))
    assert sorted([*shared.theirs.tolist(), *shared.their_rest.tolist()]) == list(range(shared.t_width))
    assert len(shared.their_rest) > len(shared.own_rest) > 0
    assert not shared.state_dict()
