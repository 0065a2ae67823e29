"""Examples encoded once for every side, before training."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TypeVar

from torch.utils.data import Dataset

from kava_core.data.collate import Collator, EncodedExample
from kava_core.data.examples import Example
from kava_core.errors import SpecError

T = TypeVar("T")

TEXTS_AT_ONCE = 1024
"""Texts handed to a tokenizer at once."""


class EncodedDataset(Dataset[EncodedExample]):
    """The examples that fit ``collator.max_length`` on every side; pass the collator its batches of items."""

    def __init__(
        self, examples: Sequence[Example], collator: Collator, teachers: Collection[str] | None = None
    ) -> None:
        """Encode all examples.

        Args:
            examples: what there is.
            collator: encodes every side that an example has to fit.
            teachers: sides that are kept; default: all.

        Raises:
            SpecError: no example is left.
        """
        chunks = (examples[start : start + TEXTS_AT_ONCE] for start in range(0, len(examples), TEXTS_AT_ONCE))
        fitting = (item for chunk in chunks for item in collator.encode(chunk) if item is not None)
        self.items = [item if teachers is None else _keep_teachers(item, teachers) for item in fitting]
        self.dropped = len(examples) - len(self.items)
        """Examples left out because they are too long on some side."""
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
        """The examples that were kept, in order."""
        return [item.example for item in self.items]


def _keep_teachers(item: EncodedExample, teachers: Collection[str]) -> EncodedExample:
    return replace(item, teachers={name: side for name, side in item.teachers.items() if name in teachers})


def split_nearly_equal(entries: Sequence[T], most: int) -> list[Sequence[T]]:
    """Batches of about one size: a last one of a single example would have no other to be exchanged with."""
    count = -(-len(entries) // most)
    return [entries[len(entries) * i // count : len(entries) * (i + 1) // count] for i in range(count)]
