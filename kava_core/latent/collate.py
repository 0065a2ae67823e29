"""Batches for latent reasoning: the student reads the prompt and writes the answer, nothing between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kava_core.data.collate import Collator, Side, pad_id, padded_left
from kava_core.data.encode import NO_LABEL, completion_ids, prompt_ids
from kava_core.data.examples import Example, render
from kava_core.errors import SpecError
from kava_core.kv.timeline import REASONING

BEGIN, END = "<bot>", "<eot>"
"""Tokens before and after the latent ones (begin and end of thought, as in Coconut, arXiv 2412.06769)."""


@dataclass(frozen=True)
class LatentEncoded:
    """One example as the latent student reads it; ``time`` tokens each."""

    before: Int[Tensor, " time"]
    """Prompt, and BEGIN if it is used."""
    after: Int[Tensor, " _"]
    """END, answer and EOS."""
    latents: int
    """Latent tokens between them."""

    def __len__(self) -> int:
        return len(self.before) + self.latents + len(self.after)

    @property
    def prompt_length(self) -> int:
        """Tokens before the answer's first."""
        return len(self.before) + self.latents + 1


class LatentCollator(Collator):
    """As ``Collator``, but the student's side has latent tokens in place of the reasoning.

    Its ``attention_mask``, ``segments`` and ``spans`` are of the latent tokens, ``[batch, latents]``: all
    real, all REASONING, without characters. Beside them stand ``before``, padded left, with ``before_mask``,
    and ``after``, padded right, with ``after_mask`` and its ``labels``.
    """

    def __init__(self, *args: Any, latents: int, begin: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.latents = latents
        self.begin = begin
        self.end = token_id(self.student_tokenizer, END)

    def encode_student(self, examples: Sequence[Example]) -> list[Any]:
        """Every example, None where it is longer than ``max_length``."""
        texts = [render(example, self.template) for example in examples]
        befores = self._prompts([text.prompt for text in texts])
        answers = completion_ids([text.text[text.bounds[2] :] for text in texts], self.student_tokenizer)
        afters = [torch.cat([answer.new_tensor([self.end]), answer]) for answer in answers]
        made = [LatentEncoded(*pair, self.latents) for pair in zip(befores, afters, strict=True)]
        return [one if self.max_length is None or len(one) <= self.max_length else None for one in made]

    def _prompts(self, prompts: Sequence[str]) -> list[Tensor]:
        return before_thought(prompts, self.student_tokenizer, begin=self.begin)

    def student_side(self, rows: Sequence[LatentEncoded]) -> Side:
        """The tensors of the student."""
        after = [row.after for row in rows]
        labels = [torch.cat([row.after.new_full((1,), NO_LABEL), row.after[1:]]) for row in rows]
        shape = (len(rows), self.latents)
        return {
            **self._before([row.before for row in rows]),
            "after": self._pad(after, pad_id(self.student_tokenizer)),
            "after_mask": self._pad([torch.ones_like(row) for row in after], 0),
            "labels": self._pad(labels, NO_LABEL),
            "attention_mask": torch.ones(shape, dtype=torch.long),
            "segments": torch.full(shape, REASONING),
            "spans": torch.zeros(*shape, 2, dtype=torch.long),
        }

    def _before(self, rows: list[Tensor]) -> Side:
        before, mask = padded_left(rows, pad_id(self.student_tokenizer))
        return {"before": before, "before_mask": mask}

    def prompts(self, batch: Sequence[Any]) -> tuple[Side, list[str]]:
        """``before`` and ``before_mask`` of the prompts, and the answers."""
        examples = [getattr(entry, "example", entry) for entry in batch]
        rows = self._prompts([render(example, self.template).prompt for example in examples])
        return self._before(rows), [example.answer for example in examples]


def before_thought(
    prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, begin: bool
) -> list[Int[Tensor, " _"]]:
    """The tokens of each prompt, and BEGIN if it is used."""
    last = [token_id(tokenizer, BEGIN)] if begin else []
    return [torch.cat([ids, ids.new_tensor(last)]) for ids in prompt_ids(prompts, tokenizer)]


def with_thought_tokens(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer with BEGIN and END, added where it lacks them; changes it in place."""
    tokenizer.add_tokens([BEGIN, END], special_tokens=True)  # add_special_tokens would forget its others
    return tokenizer


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """The token's id; SpecError where the tokenizer does not have it."""
    found = tokenizer.get_vocab().get(token)
    if found is None:
        raise SpecError(f"the student's tokenizer has no token {token!r}; see with_thought_tokens")
    return int(found)
