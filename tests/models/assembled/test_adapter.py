"""PEFT adapter folders: merged into their base, which is found; what is wrong is refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from kava_core.build.provenance import model_facts, model_identity
from kava_core.data.tokenizers import load_tokenizer, train_tokenizer
from kava_core.errors import SpecError
from kava_core.models.config import model_config
from kava_core.models.load import load_model
from kava_core.specfile.sections.models import ModelSpec, StudentSpec, TrainTokenizer
from tests.support import tiny

peft = pytest.importorskip("peft")

IDS = torch.arange(2, 12)[None]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    kind = TrainTokenizer(kind="chars", vocab_size=40)
    return train_tokenizer(kind, ["7+3*2?", " 10 0 #0"], tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def base(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A tiny Llama as transformers saves it."""
    torch.manual_seed(0)
    fields = tiny.llama(vocab_size=len(tokenizer), num_hidden_layers=3)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """LoRA whose updates are not zero, as peft saves it."""
    model = AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(adapter: Path, **changes: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def load(path: Path, **fields: Any) -> Any:
    spec = StudentSpec(path=str(path), **fields)
    return load_model(spec, load_tokenizer(spec), seed=0, where="student")


def refused(path: Path) -> str:
    with pytest.raises(SpecError) as error:
        load(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_updates_are_added_by_hand(adapter: Path, base: Path) -> None:
    """W + alpha / rank · B A, in float64; all other weights are the base's."""
    loaded = load(adapter).state_dict()
    updates = load_file(adapter / "adapter_model.safetensors")
    for name, weight in load_file(base / "model.safetensors").items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        down, up = updates.get(f"{stem}.lora_A.weight"), updates.get(f"{stem}.lora_B.weight")
        if down is None or up is None:
            assert torch.equal(loaded[name], weight)
            continue
        expected = weight.double() + 8 / 4 * up.double() @ down.double()
        torch.testing.assert_close(loaded[name].double(), expected, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(loaded[name], weight, atol=1e-3)


def test_the_merged_model_is_plain_again(adapter: Path, tmp_path: Path) -> None:
    loaded = load(adapter)
    loaded.save_pretrained(tmp_path / "merged")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.equal(plain(IDS).logits, loaded(IDS).logits)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert not loaded.training


def test_an_adapter_can_be_cut(adapter: Path) -> None:
    whole, cut = load(adapter), load(adapter, keep_layers=[0, 2])
    kept = cut.model.layers[1].self_attn.q_proj.weight
    assert torch.equal(kept, whole.model.layers[2].self_attn.q_proj.weight)


def test_the_config_is_the_bases(adapter: Path) -> None:
    config = model_config(ModelSpec(path=str(adapter)), where="student")
    assert (config.model_type, config.num_hidden_layers) == ("llama", 3)


def test_the_tokenizer_is_the_adapters_if_it_has_one(adapter: Path, base: Path) -> None:
    assert load_tokenizer(ModelSpec(path=str(adapter))).name_or_path == str(base)
    load_tokenizer(str(base)).save_pretrained(adapter)
    assert load_tokenizer(ModelSpec(path=str(adapter))).name_or_path == str(adapter)


def test_a_relative_base_is_found_beside_the_adapter(adapter: Path) -> None:
    expected = load(adapter).state_dict()
    edit(adapter, base_model_name_or_path="../base")
    found = load(adapter).state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_a_relative_base_that_can_be_two_is_refused(
    adapter: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(base, tmp_path / "work" / "base")
    shutil.copytree(base, adapter / "base")
    monkeypatch.chdir(tmp_path / "work")
    edit(adapter, base_model_name_or_path="base")
    said = refused(adapter)
    assert said.endswith(f"'base' can be base or {adapter}/base; write an absolute path there")


def test_a_base_that_is_not_there(adapter: Path) -> None:
    edit(adapter, base_model_name_or_path="/models/gone")
    said = refused(adapter)
    assert said.endswith(f"base model of {adapter}: /models/gone: no such folder")


def test_an_adapter_without_a_base(adapter: Path) -> None:
    edit(adapter, base_model_name_or_path=None)
    assert "base_model_name_or_path is missing" in refused(adapter)


def test_missing_updates_are_not_left_out(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    del weights["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"]
    save_file(weights, file)
    assert "1 weights of the adapter are missing, such as" in refused(adapter)


def test_updates_for_layers_that_the_base_lacks_are_refused(adapter: Path, base: Path) -> None:
    file = base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 2}))
    assert "weights of the adapter have no place in its base, such as" in refused(adapter)


def test_pickled_updates_are_refused(adapter: Path) -> None:
    torch.save({}, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    assert refused(adapter).endswith("no adapter_model.safetensors; save the adapter as safetensors")


def test_prompts_cannot_be_merged(base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    config = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "prompts")
    assert refused(tmp_path / "prompts").endswith("PROMPT_TUNING has no update of weights to merge")


def test_a_changed_base_is_another_model(adapter: Path, base: Path, tokenizer: Any) -> None:
    """A store or a measurement of the adapter must not outlive its base model."""
    spec = ModelSpec(path=str(adapter))
    facts, identity = model_facts(spec), model_identity(spec, tokenizer)
    assert facts["base"]["sha256"].keys() >= {"model.safetensors", "config.json"}
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    assert model_facts(spec)["sha256"] == facts["sha256"]
    assert model_identity(spec, tokenizer) != identity
