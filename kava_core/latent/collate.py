"""Collate batches for latent reasoning: the student reads the prompt and writes the answer alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kava_core.data.collate import Collator, Side, pad_id, pad_left
from kava_core.data.encoding.encode import (
    NO_LABEL,
    EncodedPiece,
    EncodedText,
    encode_pieces,
    find_answer_boundary,
    prompt_ids,
)
from kava_core.data.examples import Example, Part, Text, render_example
from kava_core.errors import SpecError
from kava_core.latent.curriculum import ALWAYS, step_of_tokens
from kava_core.protocols.timeline import REASONING
from kava_core.specfile.sections.latent import LatentSpec

BEGIN, END = "<bot>", "<eot>"
"""Tokens before and after the latent ones (begin and end of thought, as in Coconut, arXiv 2412.06769)."""


@dataclass(frozen=True)
class LatentEncoded:
    """One example as the latent student reads it."""

    before: Int[Tensor, " _"]
    """Prompt, and BEGIN if it is used."""
    after: Int[Tensor, " time"]
    """END, with a curriculum the written steps, answer and EOS."""
    steps: Int[Tensor, " time"]
    """The step each token of ``after`` is written in; ALWAYS outside of the steps."""
    answer_boundary: int
    """The token of ``after`` before the first of the example's own answer."""
    trace: Int[Tensor, " _"]
    """Tokens of the written steps, as labels of the latent tokens."""
    latents: int
    """Latent tokens between the two."""

    def __len__(self) -> int:
        return len(self.before) + self.latents + len(self.after)

    @property
    def prompt_length(self) -> int:
        """Count the tokens before the first that is written: prompt, latent tokens and END."""
        return len(self.before) + self.latents + 1


class LatentCollator(Collator):
    """Collates as ``Collator``, but the student's side has latent tokens in place of the reasoning.

    In the student's side:

    - ``attention_mask``, ``segments``, ``spans``: of the latent tokens, ``batch latents``; all real, all
      REASONING, without characters
    - ``trace``: labels of the latent tokens, ``batch latents``
    - ``before``, ``before_mask``: prompt and BEGIN, padded left
    - ``after``, ``after_mask``: END, written steps and answer, padded right
    - ``labels``, ``steps``, ``answer_boundary``: of ``after``

    Teachers have ``labels`` and ``answer_boundary`` as well.
    """

    def __init__(self, *args: Any, latent: LatentSpec, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.latent = latent
        self.end = token_id(self.student_tokenizer, END)

    def encode_student(self, examples: Sequence[Example]) -> list[Any]:
        """Encode every example for the student; None for one that is longer than ``max_length`` tokens."""
        texts = [render_example(example, self.template) for example in examples]
        befores = self._prompts([text.prompt_part for text in texts])
        traces = encode_pieces([text.part(*text.bounds[1:3]) for text in texts], self.student_tokenizer)
        answers = encode_pieces([text.part(*text.bounds[2:]) for text in texts], self.student_tokenizer)
        kept = []
        for parts in zip(examples, texts, befores, traces, answers, strict=True):
            encoded = self._encoded(*parts)
            fits = self.max_length is None or len(encoded) <= self.max_length
            kept.append(encoded if fits else None)
        return kept

    def _encoded(
        self, example: Example, text: Text, before: Tensor, trace: EncodedPiece, answer: EncodedPiece
    ) -> Any:
        """Encode one example; ``after`` is END, the steps that are written at first, the answer and EOS."""
        mark, eos = answer.ids.new_tensor([self.end]), self._eos
        written = trace.ids if self.latent.curriculum is not None else trace.ids[:0]
        inside = self.template.reasoning.index("{reasoning}")
        steps = step_of_tokens(trace.spans - inside, example.reasoning, self.separator)[: len(written)]
        answer_boundary = find_answer_boundary(
            F.pad(answer.spans, (0, 0, 1, 0)),
            text.text[text.bounds[2] :],
            text.answer_start - text.bounds[2],
            where="the student's tokenizer",
        )
        kept = trace.spans[:, 1] <= inside + len(example.reasoning)
        return LatentEncoded(
            before,
            torch.cat([mark, written, answer.ids, eos]),
            F.pad(steps, (1, len(answer.ids) + len(eos)), value=ALWAYS),
            answer_boundary + len(written),
            thin_evenly(trace.ids[kept], self.latent.count),
            self.latent.count,
        )

    @property
    def _eos(self) -> Tensor:
        eos = self.student_tokenizer.eos_token_id
        return torch.tensor([] if eos is None else [eos], dtype=torch.long)

    def _prompts(self, prompts: Sequence[Part]) -> list[Tensor]:
        return before_thought(prompts, self.student_tokenizer, begin=self.latent.begin)

    def student_side(self, rows: Sequence[LatentEncoded]) -> Side:
        """Return the tensors of the student's side of a batch."""
        labels = [torch.cat([row.after.new_full((1,), NO_LABEL), row.after[1:]]) for row in rows]
        shape = (len(rows), self.latent.count)
        return {
            **self._before([row.before for row in rows]),
            "after": self._pad([row.after for row in rows], pad_id(self.student_tokenizer)),
            "after_mask": self._pad([torch.ones_like(row.after) for row in rows], 0),
            "labels": self._pad(labels, NO_LABEL),
            "steps": self._pad([row.steps for row in rows], ALWAYS),
            "answer_boundary": torch.tensor([row.answer_boundary for row in rows]),
            "trace": torch.stack([row.trace for row in rows]),
            "attention_mask": torch.ones(shape, dtype=torch.long),
            "segments": torch.full(shape, REASONING),
            "spans": torch.zeros(*shape, 2, dtype=torch.long),
        }

    def teacher_side(self, rows: Sequence[EncodedText], tokenizer: PreTrainedTokenizerBase) -> Side:
        """Return the tensors of a teacher's side of a batch; the teacher may be the student itself."""
        labels = self._pad([row.labels for row in rows], NO_LABEL)
        answer_boundary = torch.tensor([row.answer_boundary for row in rows])
        return super().teacher_side(rows, tokenizer) | {"labels": labels, "answer_boundary": answer_boundary}

    def _before(self, rows: list[Tensor]) -> Side:
        before, mask = pad_left(rows, pad_id(self.student_tokenizer))
        return {"before": before, "before_mask": mask}

    def prompts(self, batch: Sequence[Any]) -> tuple[Side, list[str]]:
        """Return the prompts of a batch as ``before`` and ``before_mask``, and the expected answers."""
        examples = [getattr(entry, "example", entry) for entry in batch]
        rows = self._prompts([render_example(example, self.template).prompt_part for example in examples])
        return self._before(rows), [example.answer for example in examples]


def thin_evenly(trace: Int[Tensor, " time"], count: int) -> Int[Tensor, " {count}"]:
    """Return ``count`` labels of a trace of tokens.

    A shorter trace is followed by NO_LABEL; of a longer one evenly spaced tokens are kept.
    """
    if len(trace) <= count:
        return F.pad(trace, (0, count - len(trace)), value=NO_LABEL)
    return trace[(2 * torch.arange(count) + 1) * len(trace) // (2 * count)]


def before_thought(
    prompts: Sequence[Part], tokenizer: PreTrainedTokenizerBase, *, begin: bool
) -> list[Int[Tensor, " _"]]:
    """Return the tokens of each prompt, followed by BEGIN if ``begin`` is True."""
    last = [token_id(tokenizer, BEGIN)] if begin else []
    return [torch.cat([ids, ids.new_tensor(last)]) for ids in prompt_ids(prompts, tokenizer)]


def with_thought_tokens(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Add BEGIN and END to a tokenizer that lacks them, in place, and return it.

    Raises:
        SpecError: a new token has the number of another one, as where a vocabulary leaves numbers out.
    """
    tokenizer.add_tokens([BEGIN, END], special_tokens=True)  # add_special_tokens would forget its others
    numbers = list(tokenizer.get_vocab().values())
    for token in (BEGIN, END):
        if numbers.count(token_id(tokenizer, token)) > 1:
            raise SpecError(
                f"the student's tokenizer: a new token {token!r} would get the number "
                f"{token_id(tokenizer, token)}, which another token has; its vocabulary leaves numbers out"
            )
    return tokenizer


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """Return a token's number.

    Raises:
        SpecError: the tokenizer does not have it.
    """
    number = tokenizer.get_vocab().get(token)
    if number is None:
        raise SpecError(f"the student's tokenizer has no token {token!r}; see with_thought_tokens")
    return int(number)
