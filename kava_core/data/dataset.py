"""Encode examples once for every side, before training."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TypeVar

from torch.utils.data import Dataset

from kava_core.data.collate import Collator, EncodedExample
from kava_core.data.examples import Example
from kava_core.errors import SpecError

Entry = TypeVar("Entry")

TEXTS_AT_ONCE = 1024
"""Number of texts handed to a tokenizer at once."""


class EncodedDataset(Dataset[EncodedExample]):
    """The examples that fit ``collator.max_length`` on every side. Batches of them are for the same
    collator."""

    def __init__(
        self, examples: Sequence[Example], collator: Collator, teachers: Collection[str] | None = None
    ) -> None:
        """Encode all examples.

        Args:
            examples: all that there are.
            collator: encodes every side that an example has to fit.
            teachers: names of the teachers whose sides are kept; default: all.

        Raises:
            SpecError: no example fits.
        """
        self.items: list[EncodedExample] = []
        for start in range(0, len(examples), TEXTS_AT_ONCE):
            for item in collator.encode(examples[start : start + TEXTS_AT_ONCE]):
                if item is not None:
                    self.items.append(item if teachers is None else _keep_teachers(item, teachers))
        self.dropped = len(examples) - len(self.items)
        """Number of examples left out because they are too long on some side."""
        if not self.items:
            raise SpecError(
                f"train.max_length: none of the {len(examples)} examples fits in {collator.max_length} tokens"
            )

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> EncodedExample:
        return self.items[index]

    @property
    def examples(self) -> list[Example]:
        """Return the examples that were kept, in order."""
        return [item.example for item in self.items]


def _keep_teachers(item: EncodedExample, teachers: Collection[str]) -> EncodedExample:
    kept = {name: side for name, side in item.teachers.items() if name in teachers}
    return replace(item, teachers=kept)


def split_nearly_equal(entries: Sequence[Entry], most: int) -> list[Sequence[Entry]]:
    """Split entries into batches of nearly one size, at most ``most``.

    A last batch of a single example would have no other to be exchanged with.
    """
    if not entries:
        return []
    count = -(-len(entries) // most)
    borders = [len(entries) * index // count for index in range(count + 1)]
    return [entries[start:end] for start, end in pairwise(borders)]
