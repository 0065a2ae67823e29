"""Replace a share of every batch with texts that the student writes itself: online distillation.

These are texts of the present student, not of the data.

Source: on-policy distillation (arXiv 2306.13649), with keys and values in place of next-token distributions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from numpy.random import SeedSequence
from torch import Tensor

from kava_core.build.time_plans import Collate
from kava_core.data.collate import Collator, EncodedExample
from kava_core.data.examples import Example, Text, split_completion
from kava_core.distill.distiller import Distiller
from kava_core.kv.capture.evaluation_mode import evaluation_mode
from kava_core.models.ledger import HEAD, STUDENT, Ledger
from kava_core.models.writing import (
    Sampling,
    TextWriter,
    decode_behind,
    ends_of,
    rows_before_end,
    written_tokens,
)
from kava_core.specfile.sections.training import OnlineSpec

EXAMPLES = "examples"
"""Key under which a batch keeps the examples it was made of."""

SALT = 0x6F776E
"""Keeps the random numbers of writing apart from those of dropout."""


class CollatorWithExamples:
    """A collator whose batches hold their examples, and not their tensors, which workers share as files."""

    def __init__(self, collate: Collate) -> None:
        self.collate = collate

    def __call__(self, batch: Sequence[EncodedExample]) -> dict[str, Any]:
        """Return the collator's batch with its examples."""
        return {**self.collate(batch), EXAMPLES: tuple(item.example for item in batch)}


class OwnTexts:
    """Replaces a batch's first texts with the student's own.

    These rows have no cross-entropy: only caches are compared. A text that is too long for ``max_length`` or
    for a model's positions is not used; the example then keeps its own.

    Args:
        spec: how much is replaced, and how texts are sampled.
        collator: encodes, and makes prompts.
        collate: makes batches of items, as in training.
        seed: the run's.
        position_limits: positions of the student, under None, and of every teacher, by name; None: no limit.
    """

    def __init__(
        self,
        spec: OnlineSpec,
        collator: Collator,
        collate: Collate,
        *,
        seed: int,
        position_limits: Mapping[str | None, int | None],
    ) -> None:
        self.spec, self.collator, self.collate, self.seed = spec, collator, collate, seed
        self.position_limits = position_limits
        self._writer = TextWriter(collator.student_tokenizer, "student")

    def __call__(
        self,
        batch: Mapping[str, Any],
        distiller: Distiller,
        ledger: Ledger,
        place: tuple[int, ...],
        autocast: torch.dtype | None = None,
    ) -> dict[str, Any]:
        """Return the batch with the student's texts in its first rows.

        Args:
            batch: of ``CollatorWithExamples``.
            distiller: its student writes. Without KV losses nobody would read that: the rows only lose their
                labels.
            ledger: counts what writing costs.
            place: step, forward pass and process; fixes the random numbers.
            autocast: dtype of the student's passes.
        """
        examples, device = list(batch[EXAMPLES]), batch["student"]["input_ids"].device
        items = [item for item in self.collator.encode(examples) if item is not None]
        count = round(self.spec.share * len(items))
        replaced = items[:count]
        if count and distiller.pipeline.compared:
            texts = self._write_texts(distiller, examples[:count], device, ledger, place, autocast)
            written = self.collator.encode_written(examples[:count], texts)
            for row, item in enumerate(written):
                if item is not None and self._fits_positions(item):
                    replaced[row] = item
        mixed = [*map(self.collator.unlabelled, replaced), *items[count:]]
        collated: dict[str, Any] = send_to_device(self.collate(mixed), device)
        return collated

    def _fits_positions(self, item: EncodedExample) -> bool:
        """Return whether no side has more tokens than its model positions."""
        lengths: dict[str | None, int] = {None: len(item.student)}
        lengths |= {name: len(side) for name, side in item.teachers.items()}
        for name, length in lengths.items():
            limit = self.position_limits.get(name)
            if limit is not None and length > limit:
                return False
        return True

    def _write_texts(
        self,
        distiller: Distiller,
        examples: Sequence[Example],
        device: torch.device,
        ledger: Ledger,
        place: tuple[int, ...],
        autocast: torch.dtype | None,
    ) -> list[Text]:
        """Let the student write a text for every example's prompt."""
        on_cpu = self.collator.prompts(examples)[0]
        prompts = send_to_device(on_cpu, device)
        seed = int(SeedSequence((self.seed, SALT, *place)).generate_state(1)[0])
        with (
            evaluation_mode(distiller.student),
            torch.autocast(device.type, autocast, enabled=autocast is not None),
        ):
            tokens = self._writer.write(
                distiller.student,
                prompts,
                max_new_tokens=self.spec.max_new_tokens,
                sampling=Sampling(self.spec.temperature, seed),
            )
        tokenizer, template = self.collator.student_tokenizer, self.collator.template
        ends = ends_of(distiller.student)
        self._count_writing(ledger, prompts["attention_mask"], written_tokens(tokens, ends))
        given = [ids[mask.bool()] for ids, mask in zip(*on_cpu.values(), strict=True)]
        texts = decode_behind(tokenizer, given, rows_before_end(tokens, ends))
        return [
            split_completion(example, text, template) for example, text in zip(examples, texts, strict=True)
        ]

    def _count_writing(self, ledger: Ledger, prompt_mask: Tensor, real: Tensor) -> None:
        """Count a pass over the prompts, and one over each new token but the last.

        Each of them reads the tokens before it, half of the new ones in the mean.
        """
        rows, length = prompt_mask.shape
        count = real.shape[1]
        with ledger.noting():
            ledger.add_tokens(STUDENT, prompt_mask)
            ledger.add_tokens(STUDENT, real)
            ledger.add(STUDENT, rows, length, length)
            ledger.add(STUDENT, rows, count - 1, length + count // 2)
            ledger.add(f"{STUDENT} {HEAD}", rows, count, 1)
