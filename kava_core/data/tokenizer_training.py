"""Train the four kinds of tokenizer that a spec can ask for, with the library ``tokenizers``.

All are cased and change nothing in the text, so that spans are those of the text. ``chars``, ``bpe`` and
``unigram`` give back the exact text when decoded: ``bpe`` any text, the others texts of the characters they
were trained on (and ``unigram`` texts without ``▁``). ``wordpiece`` keeps words alone: decoding puts one
space between any two.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from kava_core.errors import SpecError
from kava_core.specfile.sections.models import TrainTokenizer

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"


def train_on_texts(spec: TrainTokenizer, texts: Sequence[str]) -> Tokenizer:
    """Train a tokenizer of at most ``spec.vocab_size`` tokens.

    Raises:
        SpecError: so few tokens cannot spell the texts.
    """
    try:
        tokenizer = TRAINERS[spec.kind](_without_endless_words(texts), spec.vocab_size)
    except Exception as error:  # the Rust library raises bare Exception
        raise _training_error(spec, str(error)) from error
    size = tokenizer.get_vocab_size()
    if size > spec.vocab_size:
        raise _training_error(spec, f"its characters and special tokens alone need {size}")
    return tokenizer


LONGEST_WORD = 1000
"""Characters in a row, all space or none of them, after which a text is cut for training."""
_ENDLESS = re.compile(rf"\S{{{LONGEST_WORD}}}|\s{{{LONGEST_WORD}}}")


def _without_endless_words(texts: Sequence[str]) -> list[str]:
    """Return the texts, cut where a word is endless; texts of ordinary words are left as they are.

    The time that the trainers take grows with the square of a word's length: a word of a million letters
    would take them hours.
    """
    pieces = []
    for text in texts:
        cuts = [0, *(match.end() for match in _ENDLESS.finditer(text)), len(text)]
        pieces += [text[start:end] for start, end in pairwise(cuts) if start < end]
    return pieces


def _training_error(spec: TrainTokenizer, why: str) -> SpecError:
    return SpecError(f"tokenizer: cannot train {spec.kind!r} with vocab_size={spec.vocab_size}: {why}")


def _train_chars(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """The most frequent characters, in order of code points."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    special = [PAD, EOS, UNK]
    frequent = sorted(counts, key=lambda character: (-counts[character], character))
    kept = sorted(frequent[: max(0, vocab_size - len(special))])
    vocabulary = {token: number for number, token in enumerate([*special, *kept])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _train_bpe(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Byte-level: all 256 bytes are tokens, nothing is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _train_unigram(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """As SentencePiece does it, with no space put before the text; every line break is a token of its own."""
    special = [PAD, EOS, UNK]
    tokenizer = Tokenizer(models.Unigram())
    lines = pre_tokenizers.Split("\n", "isolated")
    words = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([lines, words])
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=special, unk_token=UNK, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    pieces = json.loads(tokenizer.to_str())["model"]["vocab"]
    scores = {piece: score for piece, score in pieces if piece not in special}
    vocabulary = [(token, 0.0) for token in special] + _reproducible_pieces(scores)
    tokenizer.model = models.Unigram(vocabulary, unk_id=special.index(UNK))
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    return tokenizer


def _reproducible_pieces(scores: dict[str, float]) -> list[tuple[str, float]]:
    """Return the pieces in an order, and with scores, that are the same in every run.

    The trainer walks through hash tables of random order: sums differ in their last digits, and characters
    it has no score for get the lowest one plus 0.0001 for each such character before.
    """
    lowest = min(scores.values(), default=0.0)
    unscored = lowest + 1e-4 * len(scores)
    rounded: list[tuple[str, float]] = []
    for piece, score in scores.items():
        has_no_score = len(piece) == 1 and score < unscored
        rounded.append((piece, round(lowest if has_no_score else score, 6)))
    return sorted(rounded, key=lambda item: (-item[1], item[0]))


def _train_wordpiece(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Words and runs of punctuation, in pieces; pieces that continue a word begin with ``##``."""
    split = pre_tokenizers.Whitespace()
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNK))
    tokenizer.pre_tokenizer = split
    # Given as special, the characters inside words get their numbers in order, not in that of a hash table.
    inside: set[str] = set()
    for text in texts:
        for word, _ in split.pre_tokenize_str(text):
            inside.update(word[1:])
    alphabet = [PAD, EOS, UNK, *(f"##{character}" for character in sorted(inside))]
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    # Made anew from the vocabulary, in which these characters are no longer special.
    trained = Tokenizer(models.WordPiece(tokenizer.get_vocab(), unk_token=UNK))
    trained.pre_tokenizer = split
    trained.decoder = decoders.WordPiece(cleanup=False)
    return trained


TRAINERS: dict[str, Callable[[Sequence[str], int], Tokenizer]] = {
    "chars": _train_chars,
    "bpe": _train_bpe,
    "unigram": _train_unigram,
    "wordpiece": _train_wordpiece,
}
"""``kind`` of ``TrainTokenizer`` to the function that trains it."""
