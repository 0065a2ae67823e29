"""Write greedy answers of a student, with latent tokens or written steps, and judge them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from kava_core.data.collate import Collator
from kava_core.data.encoding.answer_judge import AnswerJudge
from kava_core.data.examples import Example
from kava_core.distill.distiller import Distiller
from kava_core.latent.collate import END, token_id
from kava_core.latent.student import Control, check_writing, write_answers
from kava_core.models.writing import TextWriter, ends_of, rows_before_end, written_tokens


class WrittenAnswer(NamedTuple):
    """What a student wrote, and whether it is right."""

    text: str
    """With special tokens, up to the token that ends it."""
    correct: bool


class AnswerWriter:
    """Lets a student write greedy answers.

    Args:
        collator: makes prompts.
        tokenizer: the student's.
        judge: decides which answers are right.
        max_new_tokens: longest answer.
    """

    def __init__(self, collator: Collator, tokenizer: Any, judge: AnswerJudge, max_new_tokens: int) -> None:
        self.collator, self.tokenizer, self.judge = collator, tokenizer, judge
        self.max_new_tokens = max_new_tokens
        self._writer = TextWriter(tokenizer, "student")

    def check(self, distiller: Distiller, examples: Sequence[Example], device: torch.device) -> None:
        """Check on a few tokens that what is written is what a plain pass over the same text predicts.

        Args:
            distiller: in evaluation mode.
            examples: for their prompts.
            device: the student's.

        Raises:
            UnsupportedModelError: it is not, behind latent tokens.
        """
        prompts = self._prompts(examples[:2], device)
        if distiller.latents is None:
            self._writer.check(distiller.student, prompts)
        else:
            check_writing(distiller.student, distiller.latents, **prompts, end=token_id(self.tokenizer, END))

    def __call__(
        self,
        distiller: Distiller,
        examples: Sequence[Example],
        device: torch.device,
        control: Control | None = None,
    ) -> tuple[list[WrittenAnswer], int]:
        """Return the answers, and how many forward passes they took together."""
        prompts = self._prompts(examples, device)
        latents = distiller.latents
        if latents is None:
            tokens = self._writer.write(distiller.student, prompts, max_new_tokens=self.max_new_tokens)
            passes = 0
        else:
            tokens = write_answers(
                distiller.student,
                latents,
                **prompts,
                end=token_id(self.tokenizer, END),
                max_new_tokens=self.max_new_tokens,
                control=control,
            )
            passes = len(examples) * latents.rounds
        ends = ends_of(distiller.student)
        # One pass for each token, the end too.
        passes += int(written_tokens(tokens, ends).sum())
        rows = rows_before_end(tokens, ends)
        judged = [self.judge.judge(row, example) for row, example in zip(rows, examples, strict=True)]
        return [WrittenAnswer(*one) for one in judged], passes

    def _prompts(self, examples: Sequence[Example], device: torch.device) -> dict[str, Tensor]:
        prompts: dict[str, Tensor] = send_to_device(self.collator.prompts(examples)[0], device)
        return prompts
