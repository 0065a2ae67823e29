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

from kava_core.data.collate import Collator, Item
from kava_core.data.examples import Example, Text, split_written
from kava_core.spec.model import OnlineSpec
from kava_core.train.distiller import Distiller
from kava_core.train.ledger import HEAD, STUDENT, Ledger
from kava_core.train.time_plans import Collate

ITEMS = "items"
"""Where a batch keeps what it was made of."""

SALT = 0x6F776E
"""Keeps the random numbers of writing apart from those of dropout."""


class KeepsItems:
    """A collator whose batches bring along the items they were made of."""

    def __init__(self, collate: Collate) -> None:
        self.collate = collate

    def __call__(self, batch: Sequence[Item]) -> dict[str, Any]:
        """The collator's batch with its items."""
        return {**self.collate(batch), ITEMS: tuple(batch)}


class OwnTexts:
    """Puts texts of the student's own in the place of a batch's first ones.

    These rows have no cross-entropy: only caches are compared. A text that is too long for some side is not
    used; the example then keeps its own.

    Args:
        spec: how much, and how it is drawn.
        collator: encodes, and makes prompts.
        collate: makes batches of items, as in training.
        seed: the run's.
    """

    def __init__(self, spec: OnlineSpec, collator: Collator, collate: Collate, *, seed: int) -> None:
        self.spec, self.collator, self.collate, self.seed = spec, collator, collate, seed

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
            batch: of ``KeepsItems``.
            distiller: its student writes. Without KV losses nobody would read that: the rows only lose their
                labels.
            ledger: counts what writing costs.
            place: step, forward pass and process; fixes the random numbers.
            autocast: dtype of the student's passes.
        """
        items, device = list(batch[ITEMS]), batch["student"]["input_ids"].device
        count = round(self.spec.share * len(items))
        mine, others = items[:count], items[count:]
        written: list[Item | None] = [None] * count
        if count and distiller.pipeline is not None:
            texts = self._written(distiller, [item.example for item in mine], device, ledger, place, autocast)
            written = self.collator.encode_written([item.example for item in mine], texts)
        kept = [new or old for new, old in zip(written, mine, strict=True)]
        made = self.collate([*map(self.collator.unlabelled, kept), *others])
        return send_to_device(made, device)

    @torch.no_grad()
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
        length = prompts["input_ids"].shape[1]
        training, student = distiller.training, distiller.student.eval()
        devices = [device] if device.type == "cuda" else []
        with (
            torch.random.fork_rng(devices=devices),
            torch.autocast(device.type, autocast, enabled=autocast is not None),
            torch.compiler.set_stance("force_eager"),
        ):
            torch.manual_seed(int(SeedSequence((self.seed, SALT, *place)).generate_state(1)[0]))
            tokens = student.generate(
                **prompts,
                do_sample=True,
                temperature=self.spec.temperature,
                top_k=0,
                top_p=1.0,
                max_new_tokens=self.spec.max_new_tokens,
            )
        student.train(training)
        self._note(ledger, prompts["attention_mask"], tokens[:, length:])
        texts = self.collator.student_tokenizer.batch_decode(tokens[:, length:], skip_special_tokens=True)
        template = self.collator.template
        return [split_written(e, text, template) for e, text in zip(examples, texts, strict=True)]

    def _note(self, ledger: Ledger, mask: Tensor, new: Tensor) -> None:
        """A pass over the prompts, and one over each new token with all before it in the cache."""
        rows, length = mask.shape
        count = new.shape[1]
        with ledger.noting():
            ledger.add_tokens(STUDENT, mask)
            ledger.add_tokens(STUDENT, torch.ones_like(new))
            ledger.add(STUDENT, rows, length, length)
            ledger.add(STUDENT, rows, count, length + count // 2)
            ledger.add(f"{STUDENT} {HEAD}", rows, count, 1)
