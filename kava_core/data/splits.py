"""Load training and validation examples; count, hash, find duplicates and contamination. No torch here."""

from __future__ import annotations

import hashlib
import json
import string
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kava_core.data.chain import chain_examples
from kava_core.data.examples import Example
from kava_core.data.hub import hub_examples
from kava_core.data.jsonl import jsonl_examples
from kava_core.specfile.sections.data import ChainData, HubData, JsonlData

CONTAMINATION_WORDS = 13
"""Number of words in a row that count as contamination (GPT-3, arXiv 2005.14165, appendix C)."""


@dataclass(frozen=True)
class Splits:
    """The examples a run trains on and those it is judged by."""

    train: Sequence[Example]
    validation: Sequence[Example]

    def same_as(self, report: Mapping[str, Any]) -> bool:
        """Return whether these are the very examples of a ``report``."""
        if split_hash(self.train) != report["train"]["sha256"]:
            return False
        return split_hash(self.validation) == report["validation"]["sha256"]

    def report(self) -> dict[str, Any]:
        """Return what the run's record keeps: counts, hashes, duplicates and contamination.

        ``duplicates_in_train`` counts the training examples whose prompt was there before,
        ``duplicates_across`` the validation examples whose prompt is also a training prompt; both after
        Unicode, case and space are normalised. ``contaminated`` counts the validation examples whose prompt
        shares 13 words in a row with a training prompt.
        """
        train_prompts = {text_fingerprint(example.prompt) for example in self.train}
        validation_prompts = [text_fingerprint(example.prompt) for example in self.validation]
        return {
            "train": {"examples": len(self.train), "sha256": split_hash(self.train)},
            "validation": {"examples": len(self.validation), "sha256": split_hash(self.validation)},
            "duplicates_in_train": len(self.train) - len(train_prompts),
            "duplicates_across": sum(prompt in train_prompts for prompt in validation_prompts),
            "contaminated": count_contaminated(self.train, self.validation),
        }


def load_splits(data: ChainData | JsonlData | HubData, *, root: Path) -> Splits:
    """Load the examples that a spec's ``data`` describes; relative file names are relative to ``root``.

    Raises:
        SpecError: something is missing or malformed; the message names file and line, if there is one.
    """
    if isinstance(data, ChainData):
        return Splits(*chain_examples(data))
    if isinstance(data, JsonlData):
        return Splits(*jsonl_examples(data, root))
    return Splits(*hub_examples(data))


def split_hash(examples: Iterable[Example]) -> str:
    """Return the SHA-256 of the examples in order, one line of canonical JSON (ASCII, sorted keys) each."""
    digest = hashlib.sha256()
    for example in examples:
        fields = asdict(example)
        if not example.rationales:  # Records of data without rationales hold hashes without that field.
            del fields["rationales"]
        line = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        digest.update(line.encode("ascii") + b"\n")
    return digest.hexdigest()


def text_fingerprint(text: str) -> bytes:
    """Return a hash that ignores compatibility forms, letter case and the amount of white space."""
    words = _normalize_text(text).split()
    return hashlib.sha256(" ".join(words).encode("utf-8", "surrogatepass")).digest()


def count_contaminated(train: Iterable[Example], validation: Sequence[Example]) -> int:
    """Count the validation examples whose prompt shares 13 words in a row with a training prompt.

    Words are separated by white space and lose the punctuation around them, so text written without spaces
    has few.
    """
    owners: dict[tuple[str, ...], set[int]] = {}
    for index, example in enumerate(validation):
        for sequence in _word_sequences(example.prompt):
            owners.setdefault(sequence, set()).add(index)
    contaminated: set[int] = set()
    for example in train:
        for sequence in _word_sequences(example.prompt):
            contaminated.update(owners.get(sequence, ()))
    return len(contaminated)


def _word_sequences(text: str) -> Iterator[tuple[str, ...]]:
    """Iterate over all sequences of 13 words in a row."""
    stripped = [word.strip(string.punctuation) for word in _normalize_text(text).split()]
    words = [word for word in stripped if word]
    for start in range(len(words) - CONTAMINATION_WORDS + 1):
        yield tuple(words[start : start + CONTAMINATION_WORDS])


def _normalize_text(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()
