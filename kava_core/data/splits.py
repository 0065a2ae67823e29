"""Training and validation examples: counts, hashes, duplicates, contamination. No torch here."""

from __future__ import annotations

import hashlib
import json
import string
import unicodedata
from collections import Counter
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
"""Words in a row that count as contamination (GPT-3, arXiv 2005.14165, appendix C)."""


@dataclass(frozen=True)
class Splits:
    """The examples a run trains on and those it is judged by."""

    train: Sequence[Example]
    validation: Sequence[Example]

    def same_as(self, report: Mapping[str, Any]) -> bool:
        """Whether these are the very examples of a ``report``."""
        return all(
            split_hash(getattr(self, name)) == report[name]["sha256"] for name in ("train", "validation")
        )

    def report(self) -> dict[str, Any]:
        """What the run's record keeps: counts, hashes, duplicates and contamination.

        ``duplicates_in_train``: training examples whose prompt stood before. ``duplicates_across``:
        validation examples whose prompt is also a training prompt. (Both after Unicode, case and space are
        normalised.) ``count_contaminated``: validation examples whose prompt shares 13 words in a row with a
        training prompt.
        """
        train = Counter(text_fingerprint(example.prompt) for example in self.train)
        return {
            "train": {"examples": len(self.train), "sha256": split_hash(self.train)},
            "validation": {"examples": len(self.validation), "sha256": split_hash(self.validation)},
            "duplicates_in_train": len(self.train) - len(train),
            "duplicates_across": sum(
                text_fingerprint(example.prompt) in train for example in self.validation
            ),
            "contaminated": count_contaminated(self.train, self.validation),
        }


def load_splits(data: ChainData | JsonlData | HubData, *, root: Path) -> Splits:
    """The examples a spec's ``data`` describes; relative file names are relative to ``root``.

    SpecError, with file and line where there is one, for whatever is missing or malformed.
    """
    if isinstance(data, ChainData):
        return Splits(*chain_examples(data))
    if isinstance(data, JsonlData):
        return Splits(*jsonl_examples(data, root))
    return Splits(*hub_examples(data))


def split_hash(examples: Iterable[Example]) -> str:
    """SHA-256 over the examples in order, one line of canonical JSON (ASCII, sorted keys) each."""
    digest = hashlib.sha256()
    for example in examples:
        fields = {name: value for name, value in asdict(example).items() if name != "rationales" or value}
        line = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        digest.update(line.encode("ascii") + b"\n")
    return digest.hexdigest()


def text_fingerprint(text: str) -> bytes:
    """A hash that ignores compatibility forms, letter case and the amount of white space."""
    return hashlib.sha256(" ".join(_normalize_text(text).split()).encode("utf-8", "surrogatepass")).digest()


def count_contaminated(train: Iterable[Example], validation: Sequence[Example]) -> int:
    """Validation examples that share 13 words in a row with a training prompt.

    Words stand between white space and lose the punctuation around them, so text written without spaces has
    few.
    """
    owners: dict[tuple[str, ...], set[int]] = {}
    for index, example in enumerate(validation):
        for gram in _word_sequences(example.prompt):
            owners.setdefault(gram, set()).add(index)
    hit: set[int] = set()
    for example in train:
        hit.update(*(owners.get(gram, ()) for gram in _word_sequences(example.prompt)))
    return len(hit)


def _word_sequences(text: str) -> Iterator[tuple[str, ...]]:
    words = [word for raw in _normalize_text(text).split() if (word := raw.strip(string.punctuation))]
    return (
        tuple(words[start : start + CONTAMINATION_WORDS])
        for start in range(len(words) - CONTAMINATION_WORDS + 1)
    )


def _normalize_text(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()
