"""What a model writes: its own probabilities alone, whatever its generation settings are."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from kava_core.data.tokenizers import load_tokenizer
from kava_core.models.load import load_model
from kava_core.models.writing import (
    Sampling,
    TextWriter,
    end_tokens,
    generate_difference,
    rows_before_end,
    write_plainly,
    written_tokens,
)
from kava_core.specfile.sections.models import StudentSpec, TrainTokenizer
from tests.support import tiny

TEXTS = ["the cat sat on the mat 0123456789", "a dog ate 42 of them?"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    made: Any = load_tokenizer(
        TrainTokenizer(kind="chars", vocab_size=64), texts=TEXTS, cache=tmp_path_factory.mktemp("t")
    )
    return made


def model_of(tokenizer: Any, **config: Any) -> Any:
    spec = StudentSpec.model_validate({"config": tiny.llama() | config, "tokenizer": "unused"})
    return load_model(spec, tokenizer, seed=3, where="student").eval()


def prompts(tokenizer: Any) -> dict[str, torch.Tensor]:
    tokenizer.padding_side = "left"
    made: dict[str, torch.Tensor] = tokenizer(TEXTS, padding=True, return_tensors="pt")
    return {name: made[name] for name in ("input_ids", "attention_mask")}


def one_by_one(
    model: Any, prompts: dict[str, torch.Tensor], ends: tuple[int, ...], most: int
) -> list[list[int]]:
    """Argmax of plain passes, one text at a time, without cache or padding."""
    rows = []
    for ids, mask in zip(prompts["input_ids"], prompts["attention_mask"].bool(), strict=True):
        text = ids[mask].tolist()
        length = len(text)
        while len(text) < length + most:
            with torch.no_grad():
                token = int(model(torch.tensor([text])).logits[0, -1].argmax())
            if token in ends:
                break
            text.append(token)
        rows.append(text[length:])
    return rows


SETTINGS: dict[str, Any] = {
    "no_repeat_ngram_size": 2,
    "repetition_penalty": 3.0,
    "min_new_tokens": 9,
    "num_beams": 3,
    "forced_eos_token_id": 5,
    "suppress_tokens": [4, 5, 6, 7],
    "bad_words_ids": [[8], [9]],
    "encoder_repetition_penalty": 2.0,
    "exponential_decay_length_penalty": (1, 3.0),
    "do_sample": True,
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_greedy_is_argmax_whatever_the_model_s_settings_say(
    tokenizer: Any, tmp_path: Path, setting: str
) -> None:
    model = model_of(tokenizer)
    model.save_pretrained(tmp_path)
    file = tmp_path / "generation_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) | {setting: SETTINGS[setting]}
    file.write_text(json.dumps(settings), encoding="utf-8")
    spec = StudentSpec(path=str(tmp_path))
    loaded: Any = load_model(spec, tokenizer, seed=0, where="student").eval()
    given = prompts(tokenizer)
    written = TextWriter(tokenizer, "student").write(loaded, given, max_new_tokens=12)
    ends = end_tokens(tokenizer)
    assert rows_before_end(written, ends) == one_by_one(model, given, ends, 12)


def test_an_ordinary_token_named_as_end_is_none(tokenizer: Any) -> None:
    """Llama's default EOS is 2: with another tokenizer that is a letter."""
    model = model_of(tokenizer)
    letter = tokenizer.convert_tokens_to_ids("a")
    model.generation_config.eos_token_id = [letter, 1_000_000]
    assert end_tokens(tokenizer, model.generation_config) == (tokenizer.eos_token_id,)
    model.config.eos_token_id = letter
    write_plainly(model, tokenizer)
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_the_end_of_a_turn_is_an_end_where_the_model_says_so(tokenizer: Any) -> None:
    chat = copy.deepcopy(tokenizer)
    chat.add_tokens([AddedToken("<turn>", special=True), AddedToken("<think>", special=False)])
    turn, think = chat.convert_tokens_to_ids(["<turn>", "<think>"])
    model = model_of(chat)
    assert end_tokens(chat, model.generation_config) == (chat.eos_token_id,)
    model.generation_config.eos_token_id = [chat.eos_token_id, turn, think, chat.unk_token_id]
    assert end_tokens(chat, model.generation_config) == (chat.eos_token_id, turn)
    model.generation_config.eos_token_id = turn  # training ends texts with the tokenizer's
    assert end_tokens(chat, model.generation_config) == (chat.eos_token_id,)


ROBERTA = {
    "model_type": "roberta",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 80,
    "is_decoder": True,
}


def roberta(tokenizer: Any) -> Any:
    spec = StudentSpec.model_validate({"config": ROBERTA, "tokenizer": "unused"})
    return load_model(spec, tokenizer, seed=0, where="student").eval()


def test_generate_is_compared_with_plain_passes(tokenizer: Any) -> None:
    given = prompts(tokenizer)
    assert generate_difference(model_of(tokenizer), given, pad=0) < 1e-4
    assert generate_difference(roberta(tokenizer), given, pad=0) > 0.1


def test_a_model_that_generates_other_logits_writes_by_whole_passes(
    tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model, given = roberta(tokenizer), prompts(tokenizer)
    writer = TextWriter(tokenizer, "student")
    written = writer.write(model, given, max_new_tokens=8)
    ends = end_tokens(tokenizer)
    assert rows_before_end(written, ends) == one_by_one(model, given, ends, 8)
    assert "student: generate() of RobertaForCausalLM has other logits" in capsys.readouterr().err


def test_both_ways_write_the_same(tokenizer: Any) -> None:
    model, given = model_of(tokenizer), prompts(tokenizer)
    fast, slow = TextWriter(tokenizer, "fast"), TextWriter(tokenizer, "slow")
    slow._generates = False
    assert torch.equal(*(one.write(model, given, max_new_tokens=6) for one in (fast, slow)))


@pytest.mark.parametrize("generates", [True, False])
def test_tokens_are_drawn_from_the_model_s_own_probabilities(tokenizer: Any, generates: bool) -> None:
    model = model_of(tokenizer)
    prompt = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3).long()}
    writer = TextWriter(tokenizer, "student")
    writer._generates = generates
    state = torch.get_rng_state()
    drawn = writer.write(model, prompt, max_new_tokens=1, sampling=Sampling(2.0, 0, 20_000))[:, -1]
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        wanted = (model(**prompt).logits[0, -1] / 2).softmax(-1)
    found = torch.bincount(drawn, minlength=len(wanted)) / len(drawn)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.01)


def test_what_stands_behind_the_end_is_not_written() -> None:
    tokens = torch.tensor([[4, 9, 9, 4], [4, 8, 4, 4], [9, 4, 4, 4], [4, 4, 4, 4]])
    assert written_tokens(tokens, [9, 8]).sum(1).tolist() == [2, 2, 1, 4]
    assert rows_before_end(tokens, [9, 8]) == [[4], [4], [], [4, 4, 4, 4]]
