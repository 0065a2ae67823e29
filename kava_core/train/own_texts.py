"""Online distillation: a share of every batch is read in the words the student has written itself.

Text of the present student, not of the data: on-policy distillation (arXiv 2306.13649) with keys and values
in place of next-token distributions.
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
from kava_core.models.ledger import HEAD, STUDENT, Ledger
from kava_core.models.sampling import decode_new_tokens, real_tokens, sample_tokens
from kava_core.specfile.sections.training import OnlineSpec

EXAMPLES = "examples"
"""Where a batch keeps what it was made of."""

SALT = 0x6F776E
"""Keeps the random numbers of writing apart from those of dropout."""


class KeepsExamples:
    """A collator whose batches bring along their examples, not its tensors, which workers share as files."""

    def __init__(self, collate: Collate) -> None:
        self.collate = collate

    def __call__(self, batch: Sequence[EncodedExample]) -> dict[str, Any]:
        """The collator's batch with its examples."""
        return {**self.collate(batch), EXAMPLES: tuple(item.example for item in batch)}


class OwnTexts:
    """Puts texts of the student's own in the place of a batch's first ones.

    These rows have no cross-entropy: only caches are compared. A text that is too long for ``max_length`` or
    for a model's positions is not used; the example then keeps its own.

    Args:
        spec: how much, and how it is drawn.
        collator: encodes, and makes prompts.
        collate: makes batches of items, as in training.
        seed: the run's.
        rooms: positions of the student, under None, and of every teacher, by name; None: without limit.
    """

    def __init__(
        self,
        spec: OnlineSpec,
        collator: Collator,
        collate: Collate,
        *,
        seed: int,
        rooms: Mapping[str | None, int | None],
    ) -> None:
        self.spec, self.collator, self.collate, self.seed = spec, collator, collate, seed
        self.rooms = rooms

    def __call__(
        self,
        batch: Mapping[str, Any],
        distiller: Distiller,
        ledger: Ledger,
        place: tuple[int, ...],
        autocast: torch.dtype | None = None,
    ) -> dict[str, Any]:
        """The batch with the student's texts in its first rows.

        Args:
            batch: of ``KeepsExamples``.
            distiller: its student writes. Without KV losses nobody would read that: the rows only lose their
                labels.
            ledger: counts what writing costs.
            place: step, forward pass and process; fixes the random numbers.
            autocast: dtype of the student's passes.
        """
        examples, device = list(batch[EXAMPLES]), batch["student"]["input_ids"].device
        items = [item for item in self.collator.encode(examples) if item is not None]
        count = round(self.spec.share * len(items))
        new: list[EncodedExample | None] = [None] * count
        if count and distiller.pipeline.compared:
            texts = self._written(distiller, examples[:count], device, ledger, place, autocast)
            new = [self._fitting(item) for item in self.collator.encode_written(examples[:count], texts)]
        kept = [one or old for one, old in zip(new, items[:count], strict=True)]
        made: dict[str, Any] = send_to_device(
            self.collate([*map(self.collator.unlabelled, kept), *items[count:]]), device
        )
        return made

    def _fitting(self, item: EncodedExample | None) -> EncodedExample | None:
        """None where a side has more tokens than its model positions."""
        if item is None:
            return None
        lengths: dict[str | None, int] = {name: len(side) for name, side in item.teachers.items()}
        lengths[None] = len(item.student)
        fits = all((room := self.rooms.get(name)) is None or n <= room for name, n in lengths.items())
        return item if fits else None

    def _written(
        self,
        distiller: Distiller,
        examples: Sequence[Example],
        device: torch.device,
        ledger: Ledger,
        place: tuple[int, ...],
        autocast: torch.dtype | None,
    ) -> list[Text]:
        prompts = send_to_device(self.collator.prompts(examples)[0], device)
        seed = int(SeedSequence((self.seed, SALT, *place)).generate_state(1)[0])
        how: dict[str, Any] = {
            "temperature": self.spec.temperature,
            "max_new_tokens": self.spec.max_new_tokens,
        }
        training, student = distiller.training, distiller.student.eval()
        with (
            torch.autocast(device.type, autocast, enabled=autocast is not None),
            torch.compiler.set_stance("force_eager"),
        ):
            tokens = sample_tokens(student, prompts, seed=seed, **how)
        student.train(training)
        length, tokenizer = prompts["input_ids"].shape[1], self.collator.student_tokenizer
        real = real_tokens(tokens[:, length:], tokenizer.eos_token_id)
        self._note(ledger, prompts["attention_mask"], real)
        texts, template = decode_new_tokens(tokenizer, tokens, length), self.collator.template
        return [split_completion(e, text, template) for e, text in zip(examples, texts, strict=True)]

    def _note(self, ledger: Ledger, mask: Tensor, real: Tensor) -> None:
        """A pass over the prompts, and one over each new token but the last, which reads those before it."""
        (rows, length), count = mask.shape, real.shape[1]
        with ledger.noting():
            ledger.add_tokens(STUDENT, mask)
            ledger.add_tokens(STUDENT, real)
            ledger.add(STUDENT, rows, length, length)
            ledger.add(STUDENT, rows, count - 1, length + count // 2)
            ledger.add(f"{STUDENT} {HEAD}", rows, count, 1)
