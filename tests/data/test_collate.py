"""Batches row by row, padding, prompts, the shuffled teacher, and the encoded dataset."""

import pickle

import pytest
import torch

from kava_core.data import tokenizer_training
from kava_core.data.chain import chain_examples
from kava_core.data.collate import Collator, EncodedExample
from kava_core.data.dataset import EncodedDataset
from kava_core.data.encoding.encode import encode_text
from kava_core.data.examples import Example, render_example
from kava_core.data.tokenizers import train_tokenizer
from kava_core.errors import SpecError
from kava_core.protocols.timeline import Timeline
from kava_core.specfile.sections.data import ChainData, Template
from kava_core.specfile.sections.models import TrainTokenizer

TEMPLATE = Template()
EXAMPLES = [
    Example("How many?", "Two and two.\nSo four.", "4"),
    Example("日本🙂", "", "1"),
    Example("7+3*2-5", " 0 0 5", "5"),
]


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    texts = [render_example(example, TEMPLATE).text for example in EXAMPLES]
    cache = tmp_path_factory.mktemp("cache")
    return {
        kind: train_tokenizer(TrainTokenizer(kind=kind), texts, cache) for kind in tokenizer_training.TRAINERS
    }


@pytest.fixture
def collator(sides):
    return Collator(sides["chars"], {"a": sides["bpe"], "b": sides["wordpiece"]}, TEMPLATE)


def check_row(side, row, expected, pad):
    """One padded row against the text encoded by itself."""
    length = len(expected)
    assert side["attention_mask"][row].tolist() == [1] * length + [0] * (side["input_ids"].shape[1] - length)
    assert torch.equal(side["input_ids"][row, :length], expected.input_ids)
    assert torch.equal(side["segments"][row, :length], expected.segments)
    assert torch.equal(side["spans"][row, :length], expected.spans)
    assert (side["input_ids"][row, length:] == pad).all()
    assert (side["segments"][row, length:] == -1).all()
    assert (side["spans"][row, length:] == 0).all()


def test_rows(collator, sides):
    batch = collator(EXAMPLES)
    assert set(batch) == {"student", "teachers", "labels"}
    assert set(batch["teachers"]) == {"a", "b"}
    assert all("labels" not in side for side in batch["teachers"].values())
    for row, example in enumerate(EXAMPLES):
        text = render_example(example, TEMPLATE)
        student = encode_text(text, sides["chars"])
        check_row(batch["student"], row, student, 0)
        check_row(batch["teachers"]["a"], row, encode_text(text, sides["bpe"]), 0)
        check_row(batch["teachers"]["b"], row, encode_text(text, sides["wordpiece"]), 0)
        labels = batch["student"]["labels"][row]
        assert torch.equal(labels[: len(student)], student.labels)
        assert (labels[len(student) :] == -100).all()
    assert batch["labels"] is batch["student"]["labels"]
    longest = max(len(encode_text(render_example(example, TEMPLATE), sides["chars"])) for example in EXAMPLES)
    assert batch["student"]["input_ids"].shape == (3, longest)
    assert batch["student"]["spans"].shape == (3, longest, 2)
    assert {tensor.dtype for tensor in batch["student"].values()} == {torch.long}


def test_the_first_label_is_the_first_token_of_the_completion(collator, sides):
    labels = collator(EXAMPLES)["student"]["labels"]
    for row, example in enumerate(EXAMPLES):
        text = render_example(example, TEMPLATE)
        kept = labels[row][labels[row] != -100].tolist()
        assert kept == [
            *sides["chars"](text.text[text.bounds[1] :])["input_ids"],
            sides["chars"].eos_token_id,
        ]


def test_items_and_examples_give_the_same_batch(collator):
    items = collator.encode(EXAMPLES)
    one, two = collator(EXAMPLES), collator([items[0], EXAMPLES[1], items[2]])
    for key in one["student"]:
        assert torch.equal(one["student"][key], two["student"][key])
        assert key == "labels" or torch.equal(one["teachers"]["b"][key], two["teachers"]["b"][key])


def test_a_timeline_reads_the_batch(collator):
    batch = collator(EXAMPLES)
    timeline = Timeline.from_batch(batch["teachers"]["a"])
    assert torch.equal(timeline.mask, timeline.segments >= 0)


@pytest.mark.parametrize("multiple", [1, 8, 64])
def test_pad_to_multiple(sides, multiple):
    batch = Collator(sides["chars"], {"a": sides["bpe"]}, TEMPLATE, pad_to_multiple=multiple)(EXAMPLES)
    plain = Collator(sides["chars"], {"a": sides["bpe"]}, TEMPLATE)(EXAMPLES)
    for side, before in (
        (batch["student"], plain["student"]),
        (batch["teachers"]["a"], plain["teachers"]["a"]),
    ):
        time = before["input_ids"].shape[1]
        for key, tensor in side.items():
            assert tensor.shape[1] == -(-time // multiple) * multiple
            assert torch.equal(tensor[:, :time], before[key])
        assert side["attention_mask"][:, time:].sum() == 0


def test_without_a_pad_token(sides):
    examples = [Example("a", "b<eos>c", "d"), *EXAMPLES]
    for change, pad in (({"pad_token": None}, 1), ({"pad_token": None, "eos_token": None}, 0)):
        tokenizer = pickle.loads(pickle.dumps(sides["bpe"]))
        for token, value in change.items():
            setattr(tokenizer, token, value)
        batch = Collator(tokenizer, {}, TEMPLATE)(examples)["student"]
        for row, example in enumerate(examples):
            check_row(batch, row, encode_text(render_example(example, TEMPLATE), tokenizer), pad)


def test_shuffled_teachers_are_rotated_by_one(sides):
    straight = Collator(sides["chars"], {"a": sides["bpe"]}, TEMPLATE)(EXAMPLES)
    shuffled = Collator(sides["chars"], {"a": sides["bpe"]}, TEMPLATE, shuffle_teacher=True)(EXAMPLES)
    for key, tensor in straight["teachers"]["a"].items():
        assert torch.equal(shuffled["teachers"]["a"][key], tensor[[1, 2, 0]])
    for key, tensor in straight["student"].items():
        assert torch.equal(shuffled["student"][key], tensor)


def test_one_example_cannot_be_shuffled(sides):
    collator = Collator(sides["chars"], {"a": sides["bpe"]}, TEMPLATE, shuffle_teacher=True)
    with pytest.raises(
        SpecError, match=r"^train\.shuffle_teacher: needs batches of at least 2 examples, not 1$"
    ):
        collator(EXAMPLES[:1])


def test_prompts_are_padded_left(collator, sides):
    prompts, answers = collator.prompts([EXAMPLES[0], collator.encode(EXAMPLES)[1], EXAMPLES[2]])
    assert answers == ["4", "1", "5"]
    for row, example in enumerate(EXAMPLES):
        ids = sides["chars"](example.prompt + "\n")["input_ids"]
        missing = prompts["input_ids"].shape[1] - len(ids)
        assert prompts["input_ids"][row].tolist() == [0] * missing + ids
        assert prompts["attention_mask"][row].tolist() == [0] * missing + [1] * len(ids)


def test_a_prompt_without_tokens(sides):
    collator = Collator(sides["wordpiece"], {}, TEMPLATE)
    with pytest.raises(SpecError, match=r"makes no tokens of the prompt ' \\n'$"):
        collator.prompts([Example(" ", "r", "a")])


def test_too_long_in_any_tokenizer_is_dropped_everywhere(sides):
    lengths = {
        kind: [len(encode_text(render_example(example, TEMPLATE), sides[kind])) for example in EXAMPLES]
        for kind in sides
    }
    limit = sorted(lengths["chars"])[1]
    fits = [max(lengths["chars"][i], lengths["bpe"][i]) <= limit for i in range(3)]
    assert 0 < sum(fits) < 3
    for student, teacher in (("chars", "bpe"), ("bpe", "chars")):
        collator = Collator(sides[student], {"a": sides[teacher]}, TEMPLATE, max_length=limit)
        dataset = EncodedDataset(EXAMPLES, collator)
        assert dataset.examples == [example for example, fit in zip(EXAMPLES, fits, strict=True) if fit]
        assert (len(dataset), dataset.dropped) == (sum(fits), 3 - sum(fits))
        with pytest.raises(SpecError, match=rf"^data: an example is longer than max_length={limit} tokens$"):
            collator(EXAMPLES)


def test_nothing_fits(sides):
    with pytest.raises(SpecError, match=r"^train\.max_length: none of the 3 examples fits in 2 tokens$"):
        EncodedDataset(EXAMPLES, Collator(sides["chars"], {}, TEMPLATE, max_length=2))


def test_a_dataset_longer_than_a_chunk_keeps_its_order(sides):
    data = ChainData(train=2100, validation=1)
    examples = chain_examples(data)[0]
    collator = Collator(sides["bpe"], {"a": sides["chars"]}, data.template)
    dataset = EncodedDataset(examples, collator)
    assert dataset.examples == examples
    last = collator.encode(examples[-1:])[0]
    assert isinstance(dataset[-1], EncodedExample)
    assert torch.equal(dataset[-1].teachers["a"].input_ids, last.teachers["a"].input_ids)


def test_workers_give_the_same_batches(collator):
    dataset = EncodedDataset(EXAMPLES * 2, collator)
    alone, workers = (
        list(torch.utils.data.DataLoader(dataset, batch_size=2, collate_fn=collator, num_workers=count))
        for count in (0, 2)
    )
    for one, two in zip(alone, workers, strict=True):
        for key, tensor in one["student"].items():
            assert torch.equal(tensor, two["student"][key])
