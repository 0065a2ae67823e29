"""Models from GGUF files: the weights, the tokenizer, the cache, and what is refused in one line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from kava_core.build.provenance import model_facts
from kava_core.data.tokenizers import load_tokenizer, train_tokenizer
from kava_core.errors import SpecError
from kava_core.files import file_hash
from kava_core.models.config import model_config
from kava_core.models.load import load_model
from kava_core.specfile.sections.models import ModelSpec, TrainTokenizer
from tests.support.files.gguf_file import TEXTS, rounded_to_q8, tiny_llama, write_gguf

pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    kind = TrainTokenizer(kind="bpe", vocab_size=280)
    return train_tokenizer(kind, TEXTS, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KAVA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def model(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerBase) -> Any:
    return tiny_llama(tokenizer, tie_word_embeddings=request.param)


@pytest.fixture
def file(model: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    write_gguf(model, tokenizer, path)
    return path


def load(file: Path, **fields: Any) -> Any:
    spec = ModelSpec(path=str(file), **fields)
    return load_model(spec, load_tokenizer(spec), seed=0, where="student")


def refused(path: Path | str) -> str:
    """Return the error of a path, which is the same for config and weights, and one line."""
    spec = ModelSpec(path=str(path))
    with pytest.raises(SpecError) as of_config:
        model_config(spec, where="student")
    with pytest.raises(SpecError) as of_tokenizer:
        load_tokenizer(spec)
    said = str(of_config.value)
    assert "\n" not in said
    assert str(of_tokenizer.value) == said.replace("student: ", "tokenizer: ", 1)
    return said


def test_weights_are_those_of_the_file(model: Any, file: Path) -> None:
    """Linear layers lose what Q8_0 loses and no more; everything else is exact."""
    loaded = load(file).state_dict()
    for name, weight in model.state_dict().items():
        if "proj" in name:
            torch.testing.assert_close(loaded[name], rounded_to_q8(weight), rtol=1e-6, atol=1e-8)
            assert not torch.equal(loaded[name], weight)
        else:
            assert torch.equal(loaded[name], weight), name


def test_it_computes_what_the_written_model_computes(model: Any, file: Path) -> None:
    """Rotated pairs are in another order in the file, so a wrong order would show here alone."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.copy_(rounded_to_q8(parameter))
        ids = torch.arange(3, 20)[None]
        torch.testing.assert_close(load(file)(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_embeddings_stay_tied_where_they_were(model: Any, file: Path) -> None:
    loaded = load(file)
    tied = loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert tied == model.config.tie_word_embeddings


def test_the_tokenizer_is_the_files(file: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    loaded = load_tokenizer(ModelSpec(path=str(file)))
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.eos_token_id == tokenizer.eos_token_id
    for text in TEXTS:
        assert loaded(text, add_special_tokens=False)["input_ids"] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_have_the_dtype_of_the_spec_and_save_as_plain(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, dtype: str
) -> None:
    from transformers import AutoModelForCausalLM

    write_gguf(tiny_llama(tokenizer), tokenizer, tmp_path / "tiny.gguf")
    loaded = load(tmp_path / "tiny.gguf", dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {getattr(torch, dtype)}
    loaded.save_pretrained(tmp_path / "saved")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert not hasattr(plain.config, "quantization_config")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, loaded(ids).logits)


def test_the_config_takes_no_weights(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, cache: Path) -> None:
    write_gguf(tiny_llama(tokenizer), tokenizer, tmp_path / "tiny.gguf")
    config = model_config(ModelSpec(path=str(tmp_path / "tiny.gguf")), where="student")
    assert (config.num_hidden_layers, config.hidden_size, config.num_key_value_heads) == (3, 64, 2)
    assert list(cache.rglob("*.safetensors")) == []


def test_a_changed_file_is_another_model(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Under the same name, of the same size: neither the cached weights nor the recorded hash may stay."""
    file = tmp_path / "tiny.gguf"
    write_gguf(tiny_llama(tokenizer, seed=0), tokenizer, file)
    spec = ModelSpec(path=str(file))
    first, first_facts = load(file).state_dict(), model_facts(spec)
    assert first_facts == {"origin": str(file), "sha256": {"tiny.gguf": file_hash(file)}}
    write_gguf(tiny_llama(tokenizer, seed=1), tokenizer, file)
    second, second_facts = load(file).state_dict(), model_facts(spec)
    assert second_facts["sha256"] == {"tiny.gguf": file_hash(file)}
    assert second_facts != first_facts
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(first[name], second[name])


def test_a_missing_file(tmp_path: Path) -> None:
    assert refused(tmp_path / "no.gguf") == f"student: {tmp_path}/no.gguf: no such file"
    assert refused("models/no.gguf") == "student: models/no.gguf: no such file"


def test_one_part_of_a_split_file(tmp_path: Path) -> None:
    part = tmp_path / "big-00001-of-00003.gguf"
    part.touch()
    assert refused(part).endswith(
        "is one part of a split file; put them together with llama-gguf-split --merge"
    )


def test_no_gguf_file_by_content(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "wrong.gguf"
    file.write_bytes(b"this is no model" * 100)
    assert refused(file).startswith(f"student: {file}: cannot be read as GGUF: ")
    assert [folder for folder in cache.rglob("*") if folder.name == "description"] == []


def test_a_truncated_file(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(tiny_llama(tokenizer), tokenizer, file)
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 20_000)
    spec = ModelSpec(path=str(file))
    with pytest.raises(SpecError, match="cannot be read as GGUF") as error:
        load_model(spec, tokenizer, seed=0, where="student")
    assert "\n" not in str(error.value)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.gguf").touch()
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert refused(tmp_path / "tiny.gguf").endswith("needs the package gguf: pip install 'kava[gguf]'")
