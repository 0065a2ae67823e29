"""BERT and T5 as teachers of a GPT student, through a shared space."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForTextEncoding,
    BertConfig,
    BertForMaskedLM,
)

import kava_core.train.run as run_module
from kava_core.build.data import load_or_train_tokenizer, make_data
from kava_core.build.distiller import make_distiller
from kava_core.data.splits import load_splits
from kava_core.errors import Preempted, SpecError
from kava_core.jobs.evaluate.answering_student import load_answering_student
from kava_core.jobs.export import export_student
from kava_core.jobs.sample import SamplingOptions, sample_rationales
from kava_core.kv.capture.capture import Capture
from kava_core.models.config import max_positions
from kava_core.models.denoiser import Denoiser
from kava_core.models.load import load_model
from kava_core.protocols.kv_loss import ObservesCaches
from kava_core.specfile.sections.pipeline import PipelineSpec
from kava_core.train.before_training import calibrate_components
from kava_core.train.run import run
from tests.support import tiny
from tests.support.stops import stop

BERT: dict[str, Any] = {
    "model_type": "bert",
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 128,
}
T5: dict[str, Any] = {
    "model_type": "t5",
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
}
ALIGN = {"head_adapter": "flat", "dim_projector": "identity", "time_warper": "segment"}
SHARED = {"name": "shared_space", "parts": ["keys", "values"], "dim": 8}


def encoder(name: str, config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"name": name, "encoder": True, "config": config, "tokenizer": tiny.BPE, "align": ALIGN} | changes


def spec(output: Path, **changes: Any) -> PipelineSpec:
    teachers = [encoder("bert", BERT), encoder("t5", T5, tokenizer=tiny.CHARS)]
    fields = {"student": {"config": tiny.gpt2()}, "teachers": teachers, "losses": [SHARED]}
    return tiny.spec(output, **fields | changes)


def teacher_model(made: PipelineSpec, place: int = 0) -> Any:
    teacher = made.teachers[place]
    splits = load_splits(made.data, root=Path.cwd())
    tokenizer = load_or_train_tokenizer(teacher, splits, made.data.template, where="here")
    return load_model(teacher, tokenizer, seed=0, where="here")


@pytest.mark.parametrize("trainable", [False, True])
def test_a_gpt_student_learns_from_both(tmp_path: Path, trainable: bool) -> None:
    result = run(spec(tmp_path, losses=[SHARED | {"trainable": trainable}]), variant="main", seed=0)
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    found = [line["eval_shared_space"] for line in lines if "eval_shared_space" in line]
    assert found[-1] < found[0]
    assert any(name.endswith("frozen_cosine") for name in result.results) == trainable
    compute = json.loads((result.folder / "run.json").read_text())["compute"]
    assert compute["flops_of"].keys() == {"student", "bert", "t5", "alignment"}
    assert min(compute["flops_of"].values()) > 0


@pytest.mark.parametrize("place", [0, 1])
def test_an_encoder_s_cache_sees_later_tokens(tmp_path: Path, place: int) -> None:
    model = teacher_model(spec(tmp_path), place).eval()
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    caches = []
    for last in (9, 10):
        ids[0, -1] = last
        capture = Capture(model)
        with torch.no_grad(), capture:
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
        caches.append(capture.take().any[:, -1, :, 0])
    assert not torch.allclose(caches[0], caches[1])


def test_padding_does_not_reach_an_encoder_s_cache(tmp_path: Path) -> None:
    made = spec(tmp_path)
    distiller = make_distiller(made, data := make_data(made), seed=0)
    items = sorted((data.train_items[i] for i in range(16)), key=lambda item: len(item.teachers["bert"]))
    one, padded = data.collator([items[0]]), data.collator([items[0], items[-1]])
    for teacher in distiller.teachers:
        alone, beside = (teacher.cache(batch["teachers"][teacher.name]) for batch in (one, padded))
        length = alone.any.shape[3]
        torch.testing.assert_close(alone.any[0], beside.any[0, :, :, :length], rtol=1e-4, atol=1e-5)


def test_pretraining_restores_and_keeps_the_encoder_alone(tmp_path: Path) -> None:
    plan = {"steps": 40, "batch_size": 32, "learning_rate": 3e-3}
    made = spec(tmp_path, teachers=[encoder("bert", BERT, tokenizer=tiny.CHARS, pretrain=plan)])
    result = run(made, variant="main", seed=0)
    trained = run_module.with_pretrained_models(made).teachers[0]
    again = AutoModelForTextEncoding.from_pretrained(str(trained.path))
    assert type(again).__name__ == "BertModel"
    record = json.loads((Path(str(trained.path)).parent / "run.json").read_text())
    assert record["results"]["ce"] < 2.2  # log 16 = 2.77 for a guess among the 16 characters
    assert "exact_match" not in record["results"]
    assert result.results["shared_space"] > 0


@pytest.mark.parametrize("config", [BERT, T5], ids=["bert", "t5"])
def test_a_stopped_pretraining_goes_on_to_the_same_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]
) -> None:
    student = {"config": config, "tokenizer": tiny.CHARS, "encoder": True}
    changes: dict[str, Any] = {
        "student": student,
        "teachers": [],
        "losses": [],
        "evaluate": {"generate": False},
    }
    straight, stopped = (tiny.spec(tmp_path / name, **changes) for name in ("straight", "stopped"))
    first = run(straight, variant="main", seed=1)
    stop(monkeypatch, 2)
    with pytest.raises(Preempted):
        run(stopped, variant="main", seed=1)
    monkeypatch.undo()
    second = run(stopped, variant="main", seed=1)
    assert first.results == second.results
    models = [AutoModelForTextEncoding.from_pretrained(r.folder / "student") for r in (first, second)]
    for name, weight in models[0].state_dict().items():
        assert torch.equal(weight, models[1].state_dict()[name]), name


def test_logits_of_a_denoiser_stand_one_place_early() -> None:
    class Echo(torch.nn.Module):
        config = BertConfig(hidden_size=7)

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            hidden = torch.nn.functional.one_hot(input_ids, 7).float()
            return type("Out", (), {"last_hidden_state": hidden})

    denoiser = Denoiser(Echo(), 7, mask=0)
    with torch.no_grad():
        denoiser.head.weight.copy_(torch.eye(7))
        denoiser.head.bias.zero_()
    ids = torch.arange(1, 7).repeat(500, 1)
    named = denoiser(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :-1].argmax(-1)
    assert set(named.unique().tolist()) == {0, 2, 3, 4, 5, 6}
    assert torch.equal(named[named > 0], ids[:, 1:][named > 0])
    assert 0.25 < float((named == 0).float().mean()) < 0.35


def test_a_masked_language_model_s_folder_is_read_without_its_head(tmp_path: Path) -> None:
    made = spec(tmp_path)
    splits = load_splits(made.data, root=Path.cwd())
    tokenizer = load_or_train_tokenizer(made.teachers[0], splits, made.data.template, where="here")
    fields = {k: v for k, v in BERT.items() if k != "model_type"}
    whole = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **fields))
    whole.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    read = made.teachers[0].model_copy(update={"path": str(tmp_path / "bert"), "config": None})
    model = load_model(read, tokenizer, seed=0, where="here")
    expected = AutoModelForMaskedLM.from_pretrained(tmp_path / "bert").bert.state_dict()
    found = {name: x for name, x in model.state_dict().items() if "pooler" not in name}
    assert found.keys() == {name for name in expected if "pooler" not in name}
    assert all(torch.equal(x, expected[name]) for name, x in found.items())


def observing_losses(pipeline: Any) -> list[Any]:
    """The losses that see data before training, of all teachers."""
    return [loss for of_teacher in pipeline.losses for loss in of_teacher if isinstance(loss, ObservesCaches)]


def test_the_space_is_fitted_before_the_first_step_and_saved(tmp_path: Path) -> None:
    made = spec(tmp_path)
    distiller = make_distiller(made, data := make_data(made), seed=0)
    assert distiller.pipeline is not None
    losses: Any = observing_losses(distiller.pipeline)
    assert len(losses) == 2  # one space for each teacher
    assert not any(loss.ready for loss in losses)
    calibrate_components(distiller, data, made, torch.device("cpu"))
    assert all(loss.ready for loss in losses)
    assert all((loss.values_correlation > 0).any() for loss in losses)
    assert any("correlation" in name for name in distiller.pipeline.state_dict())


def test_fused_teachers_share_one_space(tmp_path: Path) -> None:
    align = {"head_adapter": "structured", "dim_projector": "calibrated", "time_warper": "segment"}
    teachers = [encoder("bert", BERT, align=align), encoder("t5", T5, align=align)]
    result = run(spec(tmp_path, teachers=teachers, target="fused"), variant="main", seed=0)
    assert 0 < result.results["shared_space"] < 10


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"student": {"encoder": True}}, "an encoder writes nothing; not with teachers, evaluate.generate"),
        ({"logits": {}, "student": {"config": tiny.gpt2()}}, "name teachers that are no encoders"),
        ({"logits": {"teachers": ["bert"]}}, "teacher 'bert' is an encoder: it has caches alone"),
    ],
)
def test_what_an_encoder_cannot_do_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        spec(Path("runs"), **changes)


def test_an_encoder_writes_no_rationales(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="teacher 'bert' is an encoder: it writes nothing"):
        sample_rationales(spec(tmp_path), "bert", tmp_path / "out.jsonl", SamplingOptions())


def test_unrotated_keys_are_not_compared_with_rotated_ones(tmp_path: Path) -> None:
    align = {"head_adapter": "structured", "dim_projector": "calibrated", "time_warper": "segment"}
    made = spec(
        tmp_path,
        student={"config": tiny.llama()},
        teachers=[encoder("bert", BERT, align=align)],
        rotary="match",
    )
    with pytest.raises(SpecError, match="with rotary: match it can compare values alone"):
        make_distiller(made, make_data(made), seed=0)


def test_a_denoiser_s_pooler_waits_for_no_gradient(tmp_path: Path) -> None:
    """Data parallel training waits for every weight that asks for one."""
    denoiser = Denoiser(teacher_model(spec(tmp_path)).requires_grad_(True), 30, mask=None)
    ids = torch.randint(0, 30, (2, 5))
    denoiser(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.sum().backward()
    assert [name for name, p in denoiser.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize(("kind", "most"), [("roberta", 32), ("xlm-roberta", 32), ("bert", 34)])
def test_positions_are_those_a_model_can_read(kind: str, most: int) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(kind, max_position_embeddings=34, vocab_size=50, pad_token_id=1, **sizes)
    model = AutoModelForTextEncoding.from_config(config)
    assert max_positions(config) == most
    model(input_ids=torch.full((1, most), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, most + 1), 5))


def test_t5_reads_any_length() -> None:
    assert max_positions(AutoConfig.for_model("t5")) is None


def test_an_encoder_s_run_is_not_judged_and_its_card_names_its_loader(tmp_path: Path) -> None:
    student = {"config": BERT, "tokenizer": tiny.CHARS, "encoder": True}
    made = tiny.spec(tmp_path, student=student, teachers=[], losses=[], evaluate={"generate": False})
    folder = run(made, variant="main", seed=0).folder
    with pytest.raises(SpecError, match="its student is an encoder, which writes no answers"):
        load_answering_student(folder)
    export_student(folder, tmp_path / "out")
    assert (
        "`transformers.AutoModelForTextEncoding.from_pretrained`"
        in (tmp_path / "out" / "README.md").read_text()
    )


def test_fused_spaces_look_at_the_teachers_that_run(tmp_path: Path) -> None:
    align = {"head_adapter": "structured", "dim_projector": "calibrated", "time_warper": "segment"}
    teachers = [encoder("bert", BERT, align=align), encoder("t5", T5, align=align)]
    found = []
    for weights in ({"bert": 1, "t5": 0}, {"bert": 0, "t5": 1}):
        fuser = {"name": "fixed", "weights": weights}
        made = spec(tmp_path, teachers=teachers, target="fused", fuser=fuser)
        distiller = make_distiller(made, data := make_data(made), seed=0)
        assert distiller.pipeline is not None
        calibrate_components(distiller, data, made, torch.device("cpu"))
        losses: Any = observing_losses(distiller.pipeline)
        found.append(losses[0].values_correlation)
    assert not torch.allclose(found[0], found[1])
