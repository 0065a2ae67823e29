"""Greedy answers of a student, with latent tokens or written steps."""

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


class Answers:
    """Writes answers.

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
        """Texts, and how many forward passes they took together."""
        student = distiller.student
        prompts = send_to_device(self.collator.prompts(examples)[0], device)
        if distiller.latents is not None:
            how: dict[str, Any] = {
                "end": token_id(self.tokenizer, END),
                "max_new_tokens": self.max_new_tokens,
            }
            tokens = write_answers(student, distiller.latents, **prompts, **how, control=control)
            return self._told(tokens, len(examples) * distiller.latents.rounds)
        with torch.compiler.set_stance("force_eager"):  # every length would be compiled anew
            tokens = student.generate(
                input_ids=prompts["input_ids"],
                attention_mask=prompts["attention_mask"],
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
            )
        return self._told(tokens[:, prompts["input_ids"].shape[1] :], 0)

    def _told(self, tokens: Tensor, before: int) -> tuple[list[str], int]:
        """Each token took a pass, EOS too; what stands after it took none."""
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        ended = tokens.eq(-1 if self.tokenizer.eos_token_id is None else self.tokenizer.eos_token_id)
        return texts, before + int((ended.long().cumsum(1) - ended.long()).eq(0).sum())
