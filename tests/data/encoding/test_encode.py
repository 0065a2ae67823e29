"""Segments, spans and labels of every kind of tokenizer, recomputed character by character."""

import json

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers, processors
from transformers import PreTrainedTokenizerFast

from kava_core.data import tokenizer_training
from kava_core.data.encoding.encode import count_prefix_mismatches, encode_text, encode_texts, prompt_ids
from kava_core.data.examples import Example, render_example
from kava_core.data.tokenizers import load_tokenizer
from kava_core.errors import SpecError
from kava_core.specfile.sections.data import ChainData, Template
from kava_core.specfile.sections.models import TrainTokenizer
from tests.support.repository import SHARED_DATA

CHAIN = ChainData().template
GSM = Template()
EXAMPLES = [
    Example("Natalia sold 48 clips. How many?", "She sold 48/2 = 24.\nThen 48+24 = 72.", "72"),
    Example("日本 🙂 e\u0301?", "👩\u200d👩\u200d👧 → 7", "-1,000.5"),
    Example("a", "", "b"),
    Example("7+3*2-5", " 0 0 5", "5"),
]
TEXTS = [render_example(example, template).text for example in EXAMPLES for template in (GSM, CHAIN)]


def fast(kind: str = "bpe", around: tuple[str, str] = ("", ""), **tokens: str) -> PreTrainedTokenizerFast:
    """A trained tokenizer that puts tokens ``around`` the text."""
    model = tokenizer_training.train_on_texts(TrainTokenizer(kind=kind, vocab_size=600), TEXTS)
    added = [token for token in around if token]
    model.add_special_tokens(added)
    if added:
        pattern = f"{around[0]} $A {around[1]}".strip()
        model.post_processor = processors.TemplateProcessing(
            single=pattern, special_tokens=[(token, model.token_to_id(token)) for token in added]
        )
    if kind != "bpe":
        tokens["unk_token"] = "<unk>"
    return PreTrainedTokenizerFast(tokenizer_object=model, **tokens)


TOKENIZERS = {
    **{kind: fast(kind, pad_token="<pad>", eos_token="<eos>") for kind in tokenizer_training.TRAINERS},
    "bos": fast(around=("<bos>", ""), bos_token="<bos>", eos_token="<eos>"),
    "bos_eos": fast("wordpiece", around=("<bos>", "<eos>"), bos_token="<bos>", eos_token="<eos>"),
    "cls_sep": fast("wordpiece", around=("<cls>", "<sep>")),
    "nothing": fast("chars"),
}


def brute_segment(text, span) -> int:
    """Segment of the last character, by painting the text."""
    _, prompt, reasoning, end = text.bounds
    painted = [0] * prompt + [1] * (reasoning - prompt) + [2] * (end - reasoning)
    return painted[max(span[1], 1) - 1]


def added(tokenizer, name) -> tuple[list[int], list[int]]:
    """Special tokens before and after the text."""
    front, back = {
        "bos": ("<bos>", "<eos>"),
        "bos_eos": ("<bos>", "<eos>"),
        "cls_sep": ("<cls>", "<sep>"),
    }.get(name, ("", "" if name == "nothing" else "<eos>"))
    return tuple([tokenizer.convert_tokens_to_ids(token)] if token else [] for token in (front, back))


@pytest.mark.parametrize("template", [GSM, CHAIN], ids=["gsm", "chain"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_token_by_brute_force(name, template):
    tokenizer = TOKENIZERS[name]
    for example in EXAMPLES:
        text = render_example(example, template)
        found = encode_text(text, tokenizer)
        plain = tokenizer(text.text, add_special_tokens=False, return_offsets_mapping=True)
        front, back = added(tokenizer, name)
        spans = [list(span) for span in plain["offset_mapping"]]
        end = [len(text.text)] * 2
        assert found.input_ids.tolist() == [*front, *plain["input_ids"], *back]
        assert found.spans.tolist() == [[0, 0]] * len(front) + spans + [end] * len(back)
        inner = [brute_segment(text, span) for span in spans]
        assert found.segments.tolist() == [0] * len(front) + inner + [2] * len(back)
        assert found.segments.tolist() == sorted(found.segments.tolist())
        assert found.labels.tolist() == [
            token if segment else -100
            for token, segment in zip(found.input_ids.tolist(), found.segments.tolist(), strict=True)
        ]
        assert {len(found), *map(len, (found.spans, found.segments, found.labels))} == {len(found)}


@pytest.mark.parametrize("name", ["chars", "bpe"])
def test_spans_are_slices_of_the_text(name):
    tokenizer = TOKENIZERS[name]
    for text in (
        render_example(Example("He sold 48 tea", " pots, é", "72"), GSM),
        render_example(EXAMPLES[0], GSM),
    ):
        found = encode_text(text, tokenizer)
        for token, (start, end) in zip(found.input_ids.tolist()[:-1], found.spans.tolist()[:-1], strict=True):
            decoded = tokenizer.decode([token])
            assert decoded in (text.text[start:end], "<unk>") or (
                "é" in text.text[start:end] and decoded == "�"
            )


def test_a_leading_space_goes_with_its_word():
    tokenizer = TOKENIZERS["bpe"]
    text = render_example(EXAMPLES[3], CHAIN)
    found = encode_text(text, tokenizer)
    start = int((found.segments == 1).nonzero()[0])
    assert text.text[slice(*found.spans[start].tolist())].startswith(" 0")
    assert found.spans[start, 0] == text.bounds[1]


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    fields=st.tuples(*[st.text(st.characters(exclude_categories=["Cs"]), max_size=12)] * 3),
    name=st.sampled_from(["bpe", "bos", "chars", "unigram", "wordpiece", "cls_sep"]),
)
def test_any_unicode(fields, name):
    text = render_example(Example(*fields), GSM)
    assume("<" not in text.text)
    found = encode_text(text, TOKENIZERS[name])
    segments = found.segments.tolist()
    assert segments == sorted(segments)
    inner = [
        (span, segment)
        for span, segment in zip(found.spans.tolist(), segments, strict=True)
        if span[0] < span[1]
    ]
    assert all(brute_segment(text, span) == segment for span, segment in inner)
    if name in ("bpe", "bos", "chars"):
        covered = {place for start, end in found.spans.tolist() for place in range(start, end)}
        assert covered == set(range(len(text.text)))
        assert set(segments) == {0, 1, 2}


def test_added_tokens_have_their_segment_without_text_beside_them():
    template = Template(prompt="{prompt}", reasoning="{reasoning}", answer="{answer}")
    found = encode_text(render_example(Example("", "why", ""), template), TOKENIZERS["bos"])
    assert found.segments.tolist() == [0] + [1] * (len(found) - 2) + [2]


def test_one_character_in_several_tokens_has_one_span():
    found = encode_text(render_example(Example("\U0010fffd", "r", "a"), GSM), TOKENIZERS["bpe"])
    assert found.spans[:4].tolist() == [[0, 1]] * 4


def test_a_special_token_of_the_template_is_one() -> None:
    """EOS at its end is not followed by another."""
    template = Template(answer="#### {answer}<eos>")
    text = render_example(Example("q", "r", "end"), template)
    found = encode_text(text, TOKENIZERS["bpe"])
    eos, end = TOKENIZERS["bpe"].eos_token_id, len(text.text)
    assert found.input_ids.tolist().count(eos) == 1
    assert found.input_ids[-1] == eos
    assert found.spans[-1].tolist() == [end - 5, end]


def without_added_tokens(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """The same vocabulary and rules, but no token is special."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    return Tokenizer.from_str(json.dumps(state | {"added_tokens": [], "post_processor": None}))


@pytest.mark.parametrize("name", ["bpe", "chars", "bos"])
def test_special_tokens_in_the_data_are_text(name: str) -> None:
    """The template's stay; what is between them has the tokens of a tokenizer that knows no special ones."""
    tokenizer, mark = TOKENIZERS[name], {"bos": "<bos>", "bpe": "<pad>", "chars": "<unk>"}[name]
    template = Template(prompt="{prompt}\n", reasoning="{reasoning}" + mark, answer="#### {answer}")
    text = render_example(Example(f"q{mark}?", f"a {mark} b", f"7{mark}"), template)
    found = encode_text(text, tokenizer)
    plain = without_added_tokens(tokenizer)
    expected = [
        *([tokenizer.bos_token_id] if name == "bos" else []),
        *plain.encode(f"q{mark}?\na {mark} b").ids,
        tokenizer.convert_tokens_to_ids(mark),
        *plain.encode(f"#### 7{mark}").ids,
        *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]),
    ]
    assert found.input_ids.tolist() == expected
    covered = {place for start, end in found.spans.tolist() for place in range(start, end)}
    assert covered == set(range(len(text.text)))


def test_an_answer_that_no_token_covers_is_refused() -> None:
    """WordPiece's cleaning drops control characters: an answer of them has no tokens."""
    cleaning = fast("wordpiece", pad_token="<pad>", eos_token="<eos>")
    cleaning.backend_tokenizer.normalizer = normalizers.BertNormalizer(clean_text=True)
    text = render_example(Example("q", "r", "\x02\x03"), GSM)
    with pytest.raises(SpecError, match=r"no token covers the answer of the text"):
        encode_text(text, cleaning)


def test_loss_on_all_labels_everything():
    found = encode_text(render_example(EXAMPLES[0], GSM), TOKENIZERS["bos"], loss_on="all")
    assert torch.equal(found.labels, found.input_ids)


def test_max_length_counts_special_tokens():
    text, tokenizer = render_example(EXAMPLES[0], GSM), TOKENIZERS["bos_eos"]
    length = len(tokenizer(text.text)["input_ids"])
    assert len(encode_text(text, tokenizer, max_length=length)) == length
    assert encode_text(text, tokenizer, max_length=length - 1) is None
    short = render_example(EXAMPLES[2], GSM)
    assert [found is None for found in encode_texts([text, short], tokenizer, max_length=length - 1)] == [
        True,
        False,
    ]
    assert encode_texts([], tokenizer) == []


def test_padding_and_truncation_left_in_a_tokenizer_do_not_matter():
    tokenizer = fast(pad_token="<pad>", eos_token="<eos>")
    before = [
        found.input_ids.tolist()
        for found in encode_texts([render_example(each, GSM) for each in EXAMPLES], tokenizer)
    ]
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    after = [
        found.input_ids.tolist()
        for found in encode_texts([render_example(each, GSM) for each in EXAMPLES], tokenizer)
    ]
    assert before == after


def test_offsets_that_run_backwards_are_refused():
    class Backwards(PreTrainedTokenizerFast):
        def __call__(self, texts, **_):
            return {
                "input_ids": [[5, 6]] * len(texts),
                "offset_mapping": [[(4, 5), (0, 1)]] * len(texts),
                "special_tokens_mask": [[0, 0]] * len(texts),
            }

    odd = Backwards(tokenizer_object=TOKENIZERS["chars"].backend_tokenizer, name_or_path="odd")
    with pytest.raises(SpecError, match=r"^tokenizer 'odd': its character offsets run backwards$"):
        encode_text(render_example(Example("q", "r", "a"), GSM), odd)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_prompts_begin_the_whole_text(name):
    tokenizer = TOKENIZERS[name]
    for example in EXAMPLES:
        text = render_example(example, GSM)
        (ids,) = prompt_ids([text.prompt_part], tokenizer)
        found = encode_text(text, tokenizer)
        assert len(ids) > 0
        assert ids.tolist() == found.input_ids[: len(ids)].tolist()
        assert found.segments[: len(ids)].tolist() == [0] * len(ids)
        assert found.segments[len(ids)] > 0


def test_a_merge_across_the_border_is_counted():
    template = Template(prompt="{prompt}", reasoning="{reasoning}", answer="#{answer}")
    clean, merged = Example("tea ", "so", "1"), Example("te", "a", "1")
    tokenizer = fast("wordpiece")
    word = tokenizer.tokenize("She")
    assert word == ["She"]
    examples = [clean, Example("Sh", "e sold", "1"), Example("She ", "sold", "1"), merged]
    expected = 0
    for example in examples:
        alone = tokenizer(example.prompt)["input_ids"]
        expected += tokenizer(render_example(example, template).text)["input_ids"][: len(alone)] != alone
    assert expected > 0
    assert count_prefix_mismatches(examples, tokenizer, template) == expected
    assert count_prefix_mismatches(examples, TOKENIZERS["chars"], template) == 0
    assert count_prefix_mismatches([], tokenizer, template) == 0


def test_mistral():
    pytest.importorskip("sentencepiece")
    folder = SHARED_DATA / "tokenizers" / "mistral"
    if not folder.is_dir():
        pytest.skip("the shared Mistral tokenizer is not here")
    tokenizer = load_tokenizer(str(folder))
    for example in EXAMPLES:
        text = render_example(example, GSM)
        found = encode_text(text, tokenizer)
        spans, segments = found.spans.tolist(), found.segments.tolist()
        assert found.input_ids[-1] == tokenizer.eos_token_id
        assert all(
            brute_segment(text, span) == segment for span, segment in zip(spans, segments, strict=True)
        )
        assert set(segments) == {0, 1, 2}
    assert count_prefix_mismatches(EXAMPLES, tokenizer, GSM) == 0
