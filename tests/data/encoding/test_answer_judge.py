"""Answers of tokenizers that give texts back, and of those that do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kava_core.data.encoding.answer_judge import AnswerJudge, first_altered_text
from kava_core.data.encoding.encode import encode_text
from kava_core.data.examples import Example, render_example
from kava_core.data.tokenizers import load_tokenizer
from kava_core.specfile.sections.data import Template
from kava_core.specfile.sections.models import TrainTokenizer

GSM = Template()
EXAMPLES = [
    Example("1.5 minus 83.2?", "1.5 and 83.2", "-81.7"),
    Example("2 plus 3.50?", "2 and 3.50", "5.50"),
]


def trained(kind: str, folder: Path) -> Any:
    texts = [render_example(example, GSM).text for example in EXAMPLES] * 3
    return load_tokenizer(TrainTokenizer(kind=kind, vocab_size=300), texts=texts, cache=folder)


def completion(tokenizer: Any, example: Example, template: Template = GSM) -> list[int]:
    """What a perfect student writes behind the prompt, without the end."""
    text = render_example(example, template)
    encoded = encode_text(text, tokenizer)
    assert encoded is not None
    keep = (encoded.segments > 0) & (encoded.input_ids != tokenizer.eos_token_id)
    return encoded.input_ids[keep].tolist()


@pytest.mark.parametrize("kind", ["chars", "bpe", "unigram", "wordpiece"])
def test_a_perfect_answer_is_right_with_every_tokenizer(kind: str, tmp_path: Path) -> None:
    tokenizer = trained(kind, tmp_path)
    judge = AnswerJudge.of_examples(tokenizer, GSM, EXAMPLES)
    assert (judge.altered is not None) == (kind == "wordpiece")
    for example, other in (EXAMPLES, EXAMPLES[::-1]):
        assert judge.judge(completion(tokenizer, example), example)[1]
        assert not judge.judge(completion(tokenizer, other), example)[1]
        assert not judge.judge(completion(tokenizer, example)[:-2], example)[1]
        assert not judge.judge([], example)[1]


def test_by_tokens_a_number_may_be_written_otherwise(tmp_path: Path) -> None:
    tokenizer = trained("wordpiece", tmp_path)
    judge = AnswerJudge.of_examples(tokenizer, GSM, EXAMPLES)
    written = completion(tokenizer, Example("2 plus 3.50?", "2 and 3.50", "5.5"))
    assert judge.judge(written, EXAMPLES[1])[1]
    assert not judge.judge(written, EXAMPLES[0])[1]


def letters(normalizer: Any = None, special: tuple[str, ...] = (), clean_up: bool = False) -> Any:
    """One token for each letter."""
    names = ["<pad>", "<eos>", "<unk>", *special, *"abcdefghijklmnopqrstuvwxyz 0123456789#.\n?+<>"]
    made = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    if normalizer is not None:
        made.normalizer = normalizer
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=clean_up,
    )
    fast.add_tokens([AddedToken(name, special=True) for name in special])
    return fast


def test_a_tokenizer_that_folds_letters_is_met_by_tokens() -> None:
    tokenizer, example = letters(normalizers.Lowercase()), Example("Which?", "A or B", "Rome")
    judge = AnswerJudge.of_examples(tokenizer, GSM, [example])
    assert judge.altered == ("Which?\nA or B\n#### Rome", "which?\na or b\n#### rome")
    text, right = judge.judge(completion(tokenizer, example), example)
    assert right
    assert text.endswith("#### rome")


def test_characters_that_are_unknown_are_never_right() -> None:
    tokenizer, example = letters(normalizers.Lowercase()), Example("Which?", "A", "Ω")
    judge = AnswerJudge(tokenizer, GSM, altered=("A", "a"))
    assert not judge.judge(completion(tokenizer, example), example)[1]


def test_spaces_that_a_tokenizer_would_clean_up_stay() -> None:
    tokenizer, example = letters(clean_up=True), Example("which ?", "so .", "a .5")
    assert first_altered_text(tokenizer, [example], GSM) is None
    assert AnswerJudge(tokenizer, GSM).judge(completion(tokenizer, example), example)[1]


def test_a_marker_that_is_a_special_token_is_found() -> None:
    tokenizer, template = letters(special=("<ans>",)), Template(answer="<ans>{answer}")
    example = Example("1+1?", "so", "2")
    judge = AnswerJudge.of_examples(tokenizer, template, [example])
    assert judge.altered is None
    assert judge.judge(completion(tokenizer, example, template), example) == ("so\n<ans>2", True)
