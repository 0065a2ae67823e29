"""Trained tokenizers: lossless, exact, the same every time; loaded ones: fast or refused."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from kava_core.data import tokenizer_training
from kava_core.data.chain import chain_examples
from kava_core.data.examples import render_example
from kava_core.data.tokenizers import load_tokenizer, train_tokenizer
from kava_core.errors import KavaError, SpecError
from kava_core.specfile.sections.data import ChainData
from kava_core.specfile.sections.models import ModelSpec, TrainTokenizer
from tests.support.repository import SHARED_DATA

CHAIN = ChainData(train=200, validation=1)
TEXTS = [render_example(example, CHAIN.template).text for example in chain_examples(CHAIN)[0]] + [
    "He bought  two Tea-pots,\nthen\tdrank a CUP of tea… 日本 🙂!",
    " The cat sat on the mat; the cats sat on the mats.\r\n",
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def trained(cache):
    return {
        kind: train_tokenizer(TrainTokenizer(kind=kind, vocab_size=320), TEXTS, cache)
        for kind in tokenizer_training.TRAINERS
    }


@pytest.mark.parametrize("kind", tokenizer_training.TRAINERS)
def test_special_tokens_and_size(trained, kind):
    tokenizer = trained[kind]
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) == ("<pad>", "<eos>", None)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.unk_token == (None if kind == "bpe" else "<unk>")
    assert tokenizer.is_fast
    assert max(tokenizer.get_vocab().values()) + 1 == len(tokenizer) <= 320
    assert tokenizer.decode(tokenizer("a b<eos>")["input_ids"], skip_special_tokens=True).endswith("b")


@pytest.mark.parametrize("kind", ["chars", "bpe", "unigram"])
def test_decoding_gives_the_text_back(trained, kind):
    tokenizer = trained[kind]
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_wordpiece_gives_the_words_back(trained):
    tokenizer = trained["wordpiece"]
    for text in TEXTS:
        decoded = tokenizer.decode(tokenizer(text)["input_ids"])
        assert decoded.replace(" ", "") == "".join(text.split())


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_bpe_knows_every_text(trained, text):
    tokenizer = trained["bpe"]
    if not any(special in text for special in ("<pad>", "<eos>")):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_chars_are_characters(trained):
    tokenizer = trained["chars"]
    text = "7+3? \r\nzé日e\u0301🙂"
    found = tokenizer(text, return_offsets_mapping=True)
    assert found["offset_mapping"] == [(place, place + 1) for place in range(len(text))]
    known = set("".join(TEXTS))
    tokens = tokenizer.convert_ids_to_tokens(found["input_ids"])
    assert tokens == [character if character in known else "<unk>" for character in text]


def test_chars_keeps_the_most_frequent(tmp_path):
    tokenizer = train_tokenizer(
        TrainTokenizer(kind="chars", vocab_size=5), ["ccc", "bb", "aa", "d"], tmp_path
    )
    assert tokenizer.get_vocab() == {"<pad>": 0, "<eos>": 1, "<unk>": 2, "a": 3, "c": 4}


@pytest.mark.parametrize("kind", tokenizer_training.TRAINERS)
def test_the_same_in_another_process(trained, kind):
    code = (
        "import sys\n"
        "from kava_core.data.tokenizer_training import train_on_texts\n"
        "from kava_core.specfile.sections.models import TrainTokenizer\n"
        "texts = sys.stdin.buffer.read().decode().split('\\0')\n"
        f"trained = train_on_texts(TrainTokenizer(kind={kind!r}, vocab_size=320), texts)\n"
        "sys.stdout.buffer.write(trained.to_str().encode())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    there = subprocess.run(
        command, input="\0".join(TEXTS).encode(), capture_output=True, env=environment, check=True
    )
    here = tokenizer_training.train_on_texts(TrainTokenizer(kind=kind, vocab_size=320), TEXTS)
    assert there.stdout.decode() == here.to_str()


@pytest.mark.parametrize("kind", tokenizer_training.TRAINERS)
def test_rare_characters_do_not_change_the_order(kind):
    common = ["the cat sat on the mat and the cats sat on the mats again"] * 30
    texts = [*common, "the «é» §± ½", "the ¿ñ? ¡ü!", "QZXJ"]
    spec = TrainTokenizer(kind=kind, vocab_size=300)
    assert len({tokenizer_training.train_on_texts(spec, texts).to_str() for _ in range(12)}) == 1


def test_the_cache_is_used_and_keyed(trained, cache, monkeypatch):
    monkeypatch.setattr(tokenizer_training, "train_on_texts", None)
    spec = TrainTokenizer(kind="bpe", vocab_size=320)
    again = train_tokenizer(spec, iter(TEXTS), cache)
    assert again.get_vocab() == trained["bpe"].get_vocab()
    for other, texts in ((spec, TEXTS[::-1]), (TrainTokenizer(kind="bpe", vocab_size=321), TEXTS)):
        with pytest.raises(TypeError):
            train_tokenizer(other, texts, cache)
    assert len(list(cache.iterdir())) == len(tokenizer_training.TRAINERS)


def test_many_at_once_leave_one_folder(tmp_path):
    spec = TrainTokenizer(kind="chars")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: train_tokenizer(spec, TEXTS, tmp_path).get_vocab(), range(8)))
    assert found == found[:1] * 8
    assert len(list(tmp_path.iterdir())) == 1


def test_nothing_stays_behind_when_saving_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(KavaError, match="cannot be kept here: disk full"):
        train_tokenizer(TrainTokenizer(kind="chars"), TEXTS, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("kind", "size"), [("bpe", 257), ("wordpiece", 20), ("unigram", 5), ("chars", 2)])
def test_a_vocabulary_that_is_too_small(tmp_path, kind, size):
    with pytest.raises(SpecError, match=rf"^tokenizer: cannot train '{kind}' with vocab_size={size}: "):
        train_tokenizer(TrainTokenizer(kind=kind, vocab_size=size), TEXTS, tmp_path)


def test_no_texts(tmp_path):
    with pytest.raises(SpecError, match="tokenizer: no texts to train 'bpe' on"):
        train_tokenizer(TrainTokenizer(), [], tmp_path)


def test_loading_what_a_model_names(trained, tmp_path):
    trained["chars"].save_pretrained(tmp_path / "model")
    vocabulary = trained["chars"].get_vocab()
    path, config = str(tmp_path / "model"), {"model_type": "llama"}
    assert load_tokenizer(path).get_vocab() == vocabulary
    assert load_tokenizer(ModelSpec(path=path)).get_vocab() == vocabulary
    assert load_tokenizer(ModelSpec(config=config, tokenizer=path)).get_vocab() == vocabulary
    spec = ModelSpec(config=config, tokenizer=TrainTokenizer(kind="chars", vocab_size=320))
    assert load_tokenizer(spec, texts=TEXTS, cache=tmp_path).get_vocab() == vocabulary


def test_slow_and_missing_tokenizers_are_refused(tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(SpecError) as caught:
        load_tokenizer(str(tmp_path))
    assert str(caught.value) == (
        f"tokenizer {str(tmp_path)!r}: ByT5Tokenizer is a slow tokenizer, which knows no character offsets; "
        "kava needs a fast one (a folder with tokenizer.json)"
    )
    with pytest.raises(SpecError, match=r"^tokenizer: .*/none: no such folder$"):
        load_tokenizer(str(tmp_path / "none"))
    with pytest.raises(SpecError, match="needs a cache folder"):
        load_tokenizer(TrainTokenizer())


def test_mistral_is_fast():
    pytest.importorskip("sentencepiece")
    folder = SHARED_DATA / "tokenizers" / "mistral"
    if not folder.is_dir():
        pytest.skip("the shared Mistral tokenizer is not here")
    tokenizer = load_tokenizer(str(folder))
    text = "The cat sat, 12 times.\n#### 12 日本🙂"
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert {place for start, end in spans for place in range(start, end)} == set(range(len(text)))
    assert [end for _, end in spans] == sorted(end for _, end in spans)


def test_a_tokenizer_never_runs_its_folders_code(tmp_path: Path) -> None:
    """A folder may name a class of its own (``auto_map``): refused without a question, not run."""
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(SpecError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["chars", "bpe", "unigram", "wordpiece"])
@pytest.mark.parametrize("letter", ["a", " "])
def test_a_prompt_of_a_million_letters_is_trained_on_in_seconds(tmp_path, kind, letter):
    """The trainers' time grows with the square of a word's length."""
    begin = monotonic()
    texts = ["some text 1 2", letter * 1_000_000]
    train_tokenizer(TrainTokenizer(kind=kind, vocab_size=400), texts, tmp_path)
    assert monotonic() - begin < 20


def test_texts_of_ordinary_words_are_trained_on_as_they_are():
    texts = ["a b\n" * 1000, "x" * 999 + " " + "y" * 999, ""]
    assert tokenizer_training._without_endless_words(texts) == texts[:2]
    assert "".join(tokenizer_training._without_endless_words(["z" * 2500 + "a"])) == "z" * 2500 + "a"
    pieces = tokenizer_training._without_endless_words(["z" * 2500])
    assert [len(piece) for piece in pieces] == [1000, 1000, 500]
