"""Judge written answers: by their text or, where a tokenizer does not give texts back, by their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from kava_core.data.answers import parse_number
from kava_core.data.encoding.encode import encode_text
from kava_core.data.encoding.first_texts import LOOKED_AT
from kava_core.data.examples import Example, Text, answer_frame, is_correct, render_example
from kava_core.specfile.sections.data import Template


def decode_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Return the text of tokens as it was written: with special tokens, and without removing spaces."""
    options: dict[str, Any] = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    return str(tokenizer.decode(list(tokens), **options))


def first_altered_text(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], template: Template
) -> tuple[str, str] | None:
    """Return the first text that encoding and decoding alter, and what it becomes; None: they alter none.

    White space at both ends is ignored, and so are texts with characters that the tokenizer does not know.

    Args:
        tokenizer: the student's.
        examples: of which the first are looked at.
        template: renders them.
    """
    for example in examples[:LOOKED_AT]:
        text = render_example(example, template)
        tokens = _own_tokens(text, tokenizer)
        if tokenizer.unk_token_id in tokens:
            continue
        given_back = decode_tokens(tokenizer, tokens)
        if given_back.strip() != text.text.strip():
            return text.text, given_back
    return None


def _own_tokens(text: Text, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens of a text without those that a tokenizer adds."""
    encoded = encode_text(text, tokenizer)
    assert encoded is not None
    own = encoded.spans[:, 1] > encoded.spans[:, 0]
    return encoded.input_ids[own].tolist()


class AnswerJudge:
    """Judges what a student wrote.

    Some tokenizers do not give back what they were given: WordPiece makes ``# # 3. 5`` of ``##3.5``, others
    fold letters. Then the marker and the answer are compared token by token with those of the example's own
    text.

    Args:
        tokenizer: the student's. template: of the student's texts. altered: a text that the tokenizer alters,
        and what it makes of it: tokens are compared; None: texts are.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        altered: tuple[str, str] | None = None,
    ) -> None:
        self.tokenizer, self.template, self.altered = tokenizer, template, altered

    @classmethod
    def of_examples(
        cls, tokenizer: PreTrainedTokenizerBase, template: Template, examples: Sequence[Example]
    ) -> AnswerJudge:
        """Return a judge that compares tokens if the tokenizer alters one of the first texts."""
        return cls(tokenizer, template, first_altered_text(tokenizer, examples, template))

    def judge(self, tokens: Sequence[int], example: Example) -> tuple[str, bool]:
        """Return the text of written tokens, and whether it holds the example's answer.

        Args:
            tokens: what was written behind the prompt, up to the end, which is left out.
            example: what was asked.
        """
        text = decode_tokens(self.tokenizer, tokens)
        if self.altered is not None:
            return text, self._has_right_tokens(tokens, example)
        return text, is_correct(text, example, self.template)

    def _has_right_tokens(self, tokens: Sequence[int], example: Example) -> bool:
        marker, right = self._marker_and_answer(example)
        start = _find_run(tokens, marker)
        if start is None:
            return False
        given = list(tokens[start + len(marker) :])
        if given == right:
            return self.tokenizer.unk_token_id not in right
        number = parse_number(self._squeezed(given))
        return number is not None and number == parse_number(self._squeezed(right))

    def _marker_and_answer(self, example: Example) -> tuple[list[int], list[int]]:
        """Return the tokens of the marker in the example's own text, and those behind it.

        A token that the marker shares with the answer belongs to the marker.
        """
        text = render_example(example, self.template)
        marker, _ = answer_frame(self.template)
        start = text.answer_start - len(marker) + len(marker) - len(marker.lstrip())
        end = text.answer_start - len(marker) + len(marker.rstrip())
        encoded = encode_text(text, self.tokenizer)
        assert encoded is not None
        spans = encoded.spans
        is_text = spans[:, 1] > spans[:, 0]
        in_marker = is_text & (spans[:, 1] > start) & (spans[:, 0] < end)
        behind = is_text & (spans[:, 0] >= end)
        return encoded.input_ids[in_marker].tolist(), encoded.input_ids[behind].tolist()

    def _squeezed(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens without white space, which WordPiece adds inside of a number."""
        return "".join(decode_tokens(self.tokenizer, tokens).split())


def _find_run(tokens: Sequence[int], run: Sequence[int]) -> int | None:
    """Return where a run of tokens begins for the first time; None if it is nowhere."""
    for start in range(len(tokens) - len(run) + 1):
        if list(tokens[start : start + len(run)]) == list(run):
            return start
    return None
