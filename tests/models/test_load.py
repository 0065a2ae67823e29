"""Models from folders and configs: what cannot be loaded honestly is refused in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kava_core.data.tokenizers import load_tokenizer, train_tokenizer, vocabulary_size
from kava_core.errors import Preempted, SpecError
from kava_core.jobs.export import export_student
from kava_core.models.config import model_config
from kava_core.models.load import load_model
from kava_core.models.student import load_student
from kava_core.runs import checkpoint
from kava_core.specfile.sections.models import Lora, ModelSpec, StudentSpec, TrainTokenizer
from kava_core.train.run import run
from kava_core.train.weights import ALIGNER_FILE
from tests.support import tiny
from tests.support.stops import stop


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    texts = ["7+3*2?", " 10 0 #0"]
    return train_tokenizer(
        TrainTokenizer(kind="chars", vocab_size=40), texts, tmp_path_factory.mktemp("tokenizer")
    )


@pytest.fixture
def folder(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A tiny Llama as transformers saves it."""
    fields = tiny.llama(vocab_size=len(tokenizer))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refused(spec: ModelSpec, tokenizer: PreTrainedTokenizerBase) -> str:
    """The message of the SpecError, which is one line and says where."""
    with pytest.raises(SpecError) as error:
        load_model(spec, tokenizer, seed=0, where="teacher 'wide'")
    said = str(error.value)
    assert said.startswith("teacher 'wide': ")
    assert "\n" not in said
    return said


def edit(folder: Path, **changes: Any) -> None:
    """Change the folder's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_folder_gives_exactly_its_weights(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = load_model(ModelSpec(path=str(folder)), tokenizer, seed=0, where="student")
    stored = load_file(folder / "model.safetensors")
    found = model.state_dict()
    assert [name for name in stored if not torch.equal(found[name], stored[name])] == []
    assert found.keys() == stored.keys()


def test_pickled_weights_are_refused(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    said = refused(ModelSpec(path=str(folder)), tokenizer)
    assert "cannot load the model" in said
    assert "safetensors" in said


def test_missing_weights_are_not_drawn_at_random(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    stored = load_file(folder / "model.safetensors")
    del stored["lm_head.weight"], stored["model.layers.1.mlp.up_proj.weight"]
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    said = refused(ModelSpec(path=str(folder)), tokenizer)
    assert said.endswith(f"{folder}: 2 weights are missing, such as lm_head.weight")


def test_weights_of_another_shape_are_refused(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    edit(folder, intermediate_size=48)
    assert "cannot load the model" in refused(ModelSpec(path=str(folder)), tokenizer)


def test_a_truncated_file_is_refused(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.truncate(5000)
    assert "cannot load the model" in refused(ModelSpec(path=str(folder)), tokenizer)


def test_no_such_folder(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    said = refused(ModelSpec(path=str(tmp_path / "absent")), tokenizer)
    assert "absent" in said


@pytest.mark.parametrize(("given", "hint"), [("lama", "; did you mean 'llama'?"), ("zzzzzz", "")])
def test_an_unknown_model_type(tokenizer: PreTrainedTokenizerBase, given: str, hint: str) -> None:
    spec = ModelSpec(config={"model_type": given}, tokenizer="x")
    said = refused(spec, tokenizer)
    assert said == f"teacher 'wide': config.model_type: transformers knows no {given!r}{hint}"


def test_an_unknown_model_type_in_a_folder(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    edit(folder, model_type="lama")
    assert "lama" in refused(ModelSpec(path=str(folder)), tokenizer)


def test_a_model_type_without_a_language_model(tokenizer: PreTrainedTokenizerBase) -> None:
    assert "cannot load the model" in refused(
        ModelSpec(config={"model_type": "vit"}, tokenizer="x"), tokenizer
    )


def test_a_tokenizer_larger_than_the_embedding(tokenizer: PreTrainedTokenizerBase) -> None:
    spec = ModelSpec(config=tiny.llama(vocab_size=5), tokenizer="x")
    highest = len(tokenizer) - 1
    expected = f"teacher 'wide': the tokenizer numbers its tokens up to {highest} but the model has only 5"
    assert refused(spec, tokenizer) == expected


CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM
class Own(LlamaConfig):
    model_type = "own_llama"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = Own
"""


@pytest.mark.parametrize("model_type", ["llama", "own_llama"])
def test_code_in_a_model_folder_never_runs(
    folder: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, model_type: str
) -> None:
    """transformers' own class is used where it has one; else the folder is refused."""
    (folder / "own.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    names = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    edit(folder, model_type=model_type, auto_map=names)
    spec = ModelSpec(path=str(folder))
    if model_type == "llama":
        assert type(load_model(spec, tokenizer, seed=0, where="student")).__name__ == "LlamaForCausalLM"
    else:
        refused(spec, tokenizer)
    assert not (tmp_path / "ran").exists()


def test_the_seed_alone_decides_random_weights(tokenizer: PreTrainedTokenizerBase) -> None:
    spec = ModelSpec(config=tiny.llama(), tokenizer="x")
    first, other = (load_model(spec, tokenizer, seed=seed, where="x").lm_head.weight for seed in (3, 4))
    torch.manual_seed(11)
    assert torch.equal(load_model(spec, tokenizer, seed=3, where="x").lm_head.weight, first)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (("q_prj",), "student.lora.targets: no module named 'q_prj'; did you mean 'q_proj'?"),
        (("q_proj", "Wqkv"), "student.lora.targets: no module named 'Wqkv'"),
        (("self_attn",), "student.lora: Target module LlamaAttention("),
    ],
)
def test_wrong_names_of_adapted_modules(
    tokenizer: PreTrainedTokenizerBase, targets: tuple[str, ...], said: str
) -> None:
    spec = StudentSpec(config=tiny.llama(), tokenizer="x", lora=Lora(targets=targets))
    with pytest.raises(SpecError) as error:
        load_student(spec, tokenizer, seed=0)
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


def test_right_names_of_adapted_modules(tokenizer: PreTrainedTokenizerBase) -> None:
    spec = StudentSpec(
        config=tiny.llama(), tokenizer="x", lora=Lora(rank=2, targets=("q_proj", "self_attn.v_proj"))
    )
    student = load_student(spec, tokenizer, seed=0)
    adapted = {name for name, p in student.named_parameters() if p.requires_grad}
    assert len(adapted) == 2 * 2 * 2
    assert all(".q_proj." in name or ".v_proj." in name for name in adapted)


def test_the_config_of_a_spec_takes_tokens_from_the_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    config = model_config(ModelSpec(config=tiny.llama(), tokenizer="x"), tokenizer, where="student")
    assert config.vocab_size == len(tokenizer)
    assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)


@pytest.mark.parametrize("lora", [None, {"rank": 2, "dropout": 0.1}])
def test_tied_embeddings_survive_saving_resuming_and_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: dict[str, Any] | None
) -> None:
    """One step, stopped, gone on with: the same bits as in one go; the head is still the embedding."""
    student = {"config": tiny.llama(tie_word_embeddings=True, attention_dropout=0.2), "lora": lora}
    whole, cut = (
        tiny.spec(tmp_path / name, student=student, train={"steps": 3}) for name in ("whole", "cut")
    )
    reference = run(whole, variant="main", seed=1)
    with monkeypatch.context() as patched:
        stop(patched, 0)
        with pytest.raises(Preempted):
            run(cut, variant="main", seed=1)
    resumed = run(cut, variant="main", seed=1)
    name = "model.safetensors" if lora is None else "adapter_model.safetensors"
    folders = [checkpoint.newest_intact(result.folder / "checkpoints") for result in (reference, resumed)]
    for file in (f"student/{name}", ALIGNER_FILE):
        expected, found = (load_file(last / file) for last in folders if last is not None)
        assert found.keys() == expected.keys()
        assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
        assert "lm_head.weight" not in found
    export_student(resumed.folder, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_vocabulary_that_leaves_numbers_out_gets_a_row_for_the_highest(tmp_path: Path) -> None:
    """46 tokens, of which the digits are numbered from 100 on: training works, and no token shares a row."""
    letters = [*"abcdefghijklmnopqrstuvwxyz", *" #\n?+.-"]
    numbers = {name: number for number, name in enumerate(["<pad>", "<eos>", "<unk>", *letters])}
    numbers |= {str(digit): 100 + digit for digit in range(10)}
    made = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(tmp_path / "gap")
    assert (len(tokenizer), vocabulary_size(tokenizer)) == (46, 110)
    student = {"config": tiny.llama(), "tokenizer": str(tmp_path / "gap")}
    spec = tiny.spec(tmp_path, student=student, teachers=[], losses=[], train={"steps": 1})
    saved = AutoModelForCausalLM.from_pretrained(run(spec, variant="main", seed=1).folder / "student")
    assert saved.lm_head.weight.shape == (110, 32)


def test_unused_weights_of_a_checkpoint_are_told(
    folder: Path, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    save_file(weights | {"model.layers.9.mlp.up_proj.weight": torch.zeros(2)}, file, {"format": "pt"})
    load_model(ModelSpec(path=str(folder)), tokenizer, seed=0, where="student")
    told = "1 weights of the checkpoint are not used, such as model.layers.9.mlp.up_proj.weight"
    assert f"student: {folder}: {told}" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["/nowhere/model", "./model", "../model", "runs/a/student", "model/"])
def test_a_missing_folder_is_told_as_such(path: str) -> None:
    """Not as a name on the hub that is badly formed."""
    with pytest.raises(SpecError) as told:
        model_config(ModelSpec(path=path), where="student")
    assert str(told.value) == f"student: {path}: no such folder"
    with pytest.raises(SpecError) as told:
        load_tokenizer(path)
    assert str(told.value) == f"tokenizer: {path}: no such folder"


def test_a_tilde_and_a_file_are_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("x")
    for path, reason in (
        ("~/model", "~/model: no such folder; '~' is not expanded here"),
        (str(tmp_path / "model.safetensors"), "is a file; give the folder that holds it"),
    ):
        with pytest.raises(SpecError, match=re.escape(reason)):
            model_config(ModelSpec(path=path), where="student")


def test_what_may_be_a_name_on_the_hub_is_told_as_both() -> None:
    with pytest.raises(SpecError) as told:
        model_config(ModelSpec(path="nobody/nothing"), where="student")
    assert str(told.value).startswith(
        "student: no folder 'nobody/nothing' here, and cannot make a model config: We couldn't connect to"
    )
    expected = "tokenizer 'nobody/nothing': no such folder here, and cannot be loaded:"
    with pytest.raises(SpecError, match=expected):
        load_tokenizer("nobody/nothing")
