"""Write greedy answers of a student, with latent tokens or written steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from kava_core.data.collate import Collator
from kava_core.data.examples import Example
from kava_core.distill.distiller import Distiller
from kava_core.latent.collate import END, token_id
from kava_core.latent.student import Control, write_answers


class AnswerWriter:
    """Lets a student write greedy answers.

    Args:
        collator: makes prompts.
        tokenizer: the student's.
        max_new_tokens: longest answer.
    """

    def __init__(self, collator: Collator, tokenizer: Any, max_new_tokens: int) -> None:
        self.collator, self.tokenizer, self.max_new_tokens = collator, tokenizer, max_new_tokens

    def __call__(
        self,
        distiller: Distiller,
        examples: Sequence[Example],
        device: torch.device,
        control: Control | None = None,
    ) -> tuple[list[str], int]:
        """Return the texts, and how many forward passes they took together."""
        student = distiller.student
        prompts = send_to_device(self.collator.prompts(examples)[0], device)
        if distiller.latents is not None:
            tokens = write_answers(
                student,
                distiller.latents,
                **prompts,
                end=token_id(self.tokenizer, END),
                max_new_tokens=self.max_new_tokens,
                control=control,
            )
            return self._decode_tokens(tokens), len(examples) * distiller.latents.rounds + self._passes(
                tokens
            )
        with torch.compiler.set_stance("force_eager"):  # every length would be compiled anew
            tokens = student.generate(
                input_ids=prompts["input_ids"],
                attention_mask=prompts["attention_mask"],
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
            )
        new_tokens = tokens[:, prompts["input_ids"].shape[1] :]
        return self._decode_tokens(new_tokens), self._passes(new_tokens)

    def _decode_tokens(self, tokens: Tensor) -> list[str]:
        texts: list[str] = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return texts

    def _passes(self, tokens: Tensor) -> int:
        """Count the passes that tokens took: one each, EOS too; what is behind it took none."""
        eos = -1 if self.tokenizer.eos_token_id is None else self.tokenizer.eos_token_id
        is_eos = tokens.eq(eos).long()
        eos_before = is_eos.cumsum(1) - is_eos
        return int(eos_before.eq(0).sum())
