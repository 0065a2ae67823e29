"""Runs of models that are cut: which layers are kept, where that is recorded, and how a run goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kava_core.build import kept_layers
from kava_core.build.kept_layers import with_kept_layers
from kava_core.build.provenance import model_identity
from kava_core.console import tell_once
from kava_core.costs.dry_run import dry_run, layers_note
from kava_core.costs.plan import make_plan
from kava_core.data.tokenizers import load_tokenizer, train_tokenizer
from kava_core.errors import Preempted, SpecError
from kava_core.jobs.evaluate.answering_student import load_answering_student
from kava_core.jobs.export import export_student
from kava_core.runs.metrics import read_metrics
from kava_core.specfile.sections.models import ModelSpec, TrainTokenizer
from kava_core.specfile.sections.pipeline import PipelineSpec
from kava_core.train.run import run
from tests.support import tiny
from tests.support.stops import stop

TEXTS = ["0123456789+-*/()=?#. \n", "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ,:;"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of five layers as transformers saves it; its layer 2 changes nothing, its layer 1 little."""
    folder = tmp_path_factory.mktemp("pretrained")
    kind = TrainTokenizer(kind="chars", vocab_size=90)
    tokenizer = train_tokenizer(kind, TEXTS, tmp_path_factory.mktemp("tokenizer"))
    torch.manual_seed(0)
    fields = tiny.llama(vocab_size=len(tokenizer), num_hidden_layers=5)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    with torch.no_grad():
        for layer, scale in enumerate((30, 1, 0, 20, 30)):
            model.model.layers[layer].self_attn.o_proj.weight.mul_(scale)
            model.model.layers[layer].mlp.down_proj.weight.mul_(scale)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KAVA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def spec(tmp_path: Path, pretrained: Path, keep_layers: Any, **changes: Any) -> PipelineSpec:
    """The tiny spec with a student cut from a folder, and the whole model as its teacher."""
    student = {"path": str(pretrained), "keep_layers": keep_layers}
    teacher = {"name": "whole", "path": str(pretrained)}
    fields = tiny.fields(**changes) | {"student": student, "output": str(tmp_path / "runs")}
    fields["teachers"] = changes.get("teachers", [teacher])
    return type(tiny.spec()).model_validate(fields)


@pytest.mark.parametrize(
    ("asked", "kept"),
    [("even:3", [0, 2, 4]), ([1, 4], [1, 4]), ("influence:3", [0, 3, 4]), ("influence:4", [0, 1, 3, 4])],
)
def test_which_layers_are_kept(tmp_path: Path, pretrained: Path, asked: Any, kept: list[int]) -> None:
    """By construction layer 2 has no influence, and layer 1 less than the others."""
    resolved = with_kept_layers(spec(tmp_path, pretrained, asked))
    assert kept_layers.kept_layers_of(resolved) == {"student": kept}
    assert resolved.teachers[0].keep_layers is None


def test_influence_is_measured_once(
    tmp_path: Path, pretrained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another number of layers, and a teacher of the same model, take the kept measurement."""
    cut_teacher = {"name": "half", "path": str(pretrained), "keep_layers": "influence:2"}
    first = spec(tmp_path, pretrained, "influence:3")
    tell_once.cache_clear()
    with_kept_layers(first)
    assert "student: keeps layers 0, 3, 4 of 5 (influence:3)" in capsys.readouterr().err
    monkeypatch.setattr(kept_layers, "load_model", lambda *_, **__: pytest.fail("measured again"))
    again = with_kept_layers(spec(tmp_path, pretrained, "influence:4", teachers=[cut_teacher]))
    assert again.student.keep_layers == (0, 1, 3, 4)
    assert len(again.teachers[0].keep_layers) == 2


def test_influence_is_measured_again_where_it_may_be_another(
    tmp_path: Path, pretrained: Path, cache: Path
) -> None:
    """Other weights under the same name, other examples; a damaged file counts as none."""
    folder = tmp_path / "copy"
    shutil.copytree(pretrained, folder)
    with_kept_layers(spec(tmp_path, folder, "influence:3"))
    (known,) = (cache / "influence").glob("*.json")
    known.write_text("{")
    assert with_kept_layers(spec(tmp_path, folder, "influence:3")).student.keep_layers == (0, 3, 4)
    weights = load_file(folder / "model.safetensors")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        weights[f"model.layers.4.{name}.weight"] *= 0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    changed = with_kept_layers(spec(tmp_path, folder, "influence:3"))
    assert changed.student.keep_layers == (0, 1, 3)
    with_kept_layers(spec(tmp_path, folder, "influence:3", train={"calibration_examples": 5}))
    assert len(list((cache / "influence").glob("*.json"))) == 3


def test_measuring_leaves_random_numbers_alone(tmp_path: Path, pretrained: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with_kept_layers(spec(tmp_path, pretrained, "influence:3"))
    assert torch.equal(torch.rand(3), expected)


def test_check_and_plan_need_no_weights(tmp_path: Path, pretrained: Path) -> None:
    """A folder with the config alone is enough, also for a number of layers that is to be measured."""
    folder = tmp_path / "bare"
    folder.mkdir()
    shutil.copy(pretrained / "config.json", folder)
    whole = make_plan(spec(tmp_path, folder, [0, 1, 2, 3, 4]), time=16, t_time=16).models[0].parameters
    one_layer = sum(
        tensor.numel()
        for name, tensor in load_file(pretrained / "model.safetensors").items()
        if "layers.0." in name
    )
    for asked in ("even:2", "influence:2", [1, 4]):
        made = spec(tmp_path, folder, asked)
        assert dry_run(made, batch=2, time=24, t_time=30).student.layer == 2
        assert make_plan(made, time=16, t_time=16).models[0].parameters == whole - 3 * one_layer
    assert layers_note(spec(tmp_path, folder, "even:2").student, where="student") == "(2 of 5 layers: 0, 4)"
    by_influence = layers_note(spec(tmp_path, folder, "influence:2").student, where="student")
    assert by_influence == "(2 of 5 layers: by influence)"


def test_a_run_records_saves_and_exports_the_cut_student(tmp_path: Path, pretrained: Path) -> None:
    """The exported folder alone, in transformers, has the cut depth and the loss that kava reports."""
    made = spec(tmp_path, pretrained, "influence:3", train={"steps": 3})
    result = run(made, variant="main", seed=0)
    record = json.loads((result.folder / "run.json").read_text())
    assert record["kept_layers"] == {"student": [0, 3, 4]}
    export_student(result.folder, tmp_path / "exported")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert model.config.num_hidden_layers == 3
    assert mean_loss(model, tokenizer, made) == pytest.approx(result.results["ce"], rel=1e-5)
    answering = load_answering_student(result.folder)
    assert answering.distiller.student.config.num_hidden_layers == 3


@torch.no_grad()
def mean_loss(model: Any, tokenizer: Any, made: PipelineSpec) -> float:
    """Return the cross-entropy of reasoning and answers, token by token, in plain transformers."""
    from kava_core.data.examples import render_example
    from kava_core.data.splits import load_splits

    examples = load_splits(made.data, root=Path.cwd()).validation[: made.evaluate.examples]
    losses = []
    for example in examples:
        text = render_example(example, made.data.template)
        begin = len(tokenizer(text.prompt_part.text)["input_ids"])
        ids = torch.tensor([[*tokenizer(text.text)["input_ids"], tokenizer.eos_token_id]])
        log_probabilities = model(ids).logits[0].log_softmax(-1)
        losses += [-log_probabilities[t - 1, ids[0, t]].item() for t in range(begin, ids.shape[1])]
    return sum(losses) / len(losses)


def test_going_on_is_the_same_run(tmp_path: Path, pretrained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(spec(tmp_path, pretrained, "influence:3"), variant="main", seed=0)
    stopped = spec(tmp_path / "other", pretrained, "influence:3")
    with monkeypatch.context() as patch:
        stop(patch, at=3)
        with pytest.raises(Preempted):
            run(stopped, variant="main", seed=0)
    resumed = run(stopped, variant="main", seed=0)
    for name, weight in load_file(whole.folder / "student" / "model.safetensors").items():
        assert torch.equal(load_file(resumed.folder / "student" / "model.safetensors")[name], weight), name
    curves = [read_metrics(result.folder / "metrics.jsonl") for result in (whole, resumed)]
    last = [{key: value for key, value in lines[-1].items() if key != "seconds"} for lines in curves]
    assert last[0] == last[1]


def test_going_on_with_other_layers_is_refused(
    tmp_path: Path, pretrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the cache is gone, and another machine finds another order of layers."""
    made = spec(tmp_path, pretrained, "influence:3")
    with monkeypatch.context() as patch:
        stop(patch, at=3)
        with pytest.raises(Preempted):
            run(made, variant="main", seed=0)
    monkeypatch.setattr(kept_layers, "_influence", lambda *_: [0.1, 0.9, 0.8, 0.7, 0.2])
    with pytest.raises(SpecError, match="other layers of a model are kept than when this run began"):
        run(made, variant="main", seed=0)


def test_a_model_that_is_trained_first_is_trained_whole(tmp_path: Path) -> None:
    student = {"config": tiny.llama(num_hidden_layers=4), "tokenizer": tiny.CHARS}
    cut = student | {"pretrain": {"steps": 2, "batch_size": 8}, "keep_layers": "even:2"}
    made = tiny.spec(tmp_path / "runs", teachers=[], losses=[], train={"steps": 1})
    fields = made.model_dump() | {"student": cut, "output": str(tmp_path / "runs")}
    result = run(type(made).model_validate(fields), variant="main", seed=0)
    record = json.loads((result.folder / "run.json").read_text())
    assert record["kept_layers"] == {"student": [0, 3]}
    pretrained = Path(record["models"]["student"]["origin"])
    assert AutoConfig.from_pretrained(pretrained).num_hidden_layers == 4
    assert AutoConfig.from_pretrained(result.folder / "student").num_hidden_layers == 2


def test_other_layers_are_another_model(pretrained: Path) -> None:
    """Stores and layer maps are named by it; a rule and the numbers it comes to are the same."""
    tokenizer = load_tokenizer(str(pretrained))
    identities = [
        model_identity(ModelSpec(path=str(pretrained), keep_layers=kept), tokenizer)
        for kept in (None, (0, 2, 4), (0, 3, 4))
    ]
    assert identities[0] != identities[1] != identities[2] != identities[0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("evn:3", "'evn:3' is none of even:n (n from 2), influence:n (n from 1) and a list such as [0, 3]"),
        ("even:1", "'even:1' is none of even:n (n from 2), influence:n (n from 1) and a list such as [0, 3]"),
        ([3, 1], "layers are counted from 0, in ascending order, each once, at least one"),
        ([1, 1], "layers are counted from 0, in ascending order, each once, at least one"),
        ([], "layers are counted from 0, in ascending order, each once, at least one"),
        ([-1, 2], "layers are counted from 0, in ascending order, each once, at least one"),
    ],
)
def test_what_is_no_choice_of_layers(given: Any, said: str) -> None:
    with pytest.raises(ValueError, match="keep_layers") as error:
        ModelSpec(path="x", keep_layers=given)
    assert said in str(error.value)


def test_random_weights_are_not_cut() -> None:
    with pytest.raises(ValueError, match="'keep_layers' is for trained weights"):
        ModelSpec(config=tiny.llama(), tokenizer="x", keep_layers="even:2")
