"""Small tokenizers of three kinds, trained once on a few texts."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

from kava_core.data.tokenizers import load_tokenizer
from kava_core.files import cache_folder
from kava_core.specfile.sections.models import TrainTokenizer

TEXTS = ["say: 10+20= 30 and 4 #34", "4-1+1= 3 and and 40 #44", "5+1= naïve 🙂 6 #6", "0123456789 and so on"]


@cache
def _trained(kind: Literal["chars", "bpe", "unigram", "wordpiece"], vocab_size: int) -> Any:
    spec = TrainTokenizer(kind=kind, vocab_size=vocab_size)
    return load_tokenizer(spec, texts=TEXTS, cache=cache_folder() / "tokenizers")


def characters() -> Any:
    """One token for each character."""
    return _trained("chars", 96)


def byte_pairs() -> Any:
    """Byte-level pairs: words are one token, an emoji several."""
    return _trained("bpe", 290)


def pieces() -> Any:
    """Pieces as in SentencePiece, with a mark in place of spaces."""
    return _trained("unigram", 60)
