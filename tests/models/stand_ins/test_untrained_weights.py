"""Controls with weights: the trained tensors' scale stays, everything that they knew goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kava_core.build.data import make_data
from kava_core.build.teachers import load_teachers
from kava_core.models.stand_ins.untrained_weights import forget_training
from kava_core.runs.metrics import read_metrics
from kava_core.train.run import run, with_pretrained_models
from tests.support import tiny

KINDS = ("random_weights", "shuffled_weights")


def trained_like() -> Any:
    """A model whose every tensor has a mean and a spread of its own, with tied embeddings."""
    torch.manual_seed(3)
    config = tiny.llama(vocab_size=64, tie_word_embeddings=True, attention_bias=True)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    with torch.no_grad():
        for place, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.randn_like(parameter) * (0.1 + 0.01 * place) + 0.3 * (place % 3))
    return model


def numbers(model: Any) -> dict[str, Any]:
    return {name: weights.detach().double().numpy().copy() for name, weights in model.named_parameters()}


def test_drawn_weights_have_every_tensors_mean_and_spread() -> None:
    model = trained_like()
    before = numbers(model)
    forget_training(model, "random_weights", seed=0)
    for name, after in numbers(model).items():
        error = 5 * before[name].std() / np.sqrt(after.size)
        assert abs(after.mean() - before[name].mean()) < error, name
        assert abs(after.std() - before[name].std()) < error, name
        assert abs(np.corrcoef(after.ravel(), before[name].ravel())[0, 1]) < 5 / np.sqrt(after.size), name


def test_shuffled_weights_are_the_same_numbers_elsewhere() -> None:
    model = trained_like()
    before = numbers(model)
    forget_training(model, "shuffled_weights", seed=0)
    for name, after in numbers(model).items():
        assert np.array_equal(np.sort(after, axis=None), np.sort(before[name], axis=None)), name
        assert not np.array_equal(after, before[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides_and_tied_weights_stay_tied(kind: Any) -> None:
    first, again, other = trained_like(), trained_like(), trained_like()
    forget_training(first, kind, seed=1)
    forget_training(again, kind, seed=1)
    forget_training(other, kind, seed=2)
    for name, weights in numbers(first).items():
        assert np.array_equal(weights, numbers(again)[name])
        assert not np.array_equal(weights, numbers(other)[name])
    assert first.lm_head.weight is first.model.embed_tokens.weight


def test_a_constant_tensor_stays_and_half_precision_is_kept() -> None:
    model = trained_like().to(torch.bfloat16)
    with torch.no_grad():
        model.model.norm.weight.fill_(1.0)
    forget_training(model, "random_weights", seed=0)
    assert (model.model.norm.weight == 1).all()
    assert all(weights.dtype == torch.bfloat16 for weights in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_from_a_folder_forgets_and_the_folder_does_not(tmp_path: Path, kind: str) -> None:
    trained_like().save_pretrained(tmp_path / "big")
    teacher = {"name": "big", "path": str(tmp_path / "big"), "tokenizer": tiny.CHARS}
    control = teacher | {"name": "control", "stand_in": {"kind": kind}}
    spec = tiny.spec(tmp_path, teachers=[teacher, control])
    models = load_teachers(spec, make_data(spec))
    kept, control_numbers = numbers(models["big"]), numbers(models["control"])
    assert all(np.allclose(kept[name], weights) for name, weights in numbers(trained_like()).items())
    assert not any(np.allclose(kept[name], weights) for name, weights in control_numbers.items())


def test_a_run_against_the_control_is_a_run_against_its_weights(tmp_path: Path) -> None:
    """Layer map, calibration and targets are those of a folder that holds the forgotten weights."""
    trained_like().save_pretrained(tmp_path / "big")
    forgotten = trained_like()
    forget_training(forgotten, "random_weights", seed=4)
    forgotten.save_pretrained(tmp_path / "forgotten")
    align = {"layer_mapper": "cka", "dim_projector": "calibrated", "time_warper": "segment"}
    teacher = {"name": "big", "tokenizer": tiny.CHARS, "align": align}
    stand_in = {"kind": "random_weights", "seed": 4}
    curves = []
    for fields in ({"path": "big", "stand_in": stand_in}, {"path": "forgotten"}, {"path": "big"}):
        fields = fields | {"path": str(tmp_path / str(fields["path"]))}
        spec = tiny.spec(tmp_path / str(len(curves)), teachers=[teacher | fields])
        lines = read_metrics(run(spec, variant="main", seed=0).folder / "metrics.jsonl")
        curves.append([line["loss"] for line in lines if "loss" in line])
    assert curves[0] == curves[1]
    assert curves[0] != curves[2]


def test_a_pretrained_teacher_forgets_what_it_was_taught(tmp_path: Path, capsys: Any) -> None:
    teacher = tiny.FIELDS["teachers"][1] | {"pretrain": {"steps": 3, "batch_size": 8}}
    control = teacher | {"stand_in": {"kind": "shuffled_weights"}}
    spec = with_pretrained_models(tiny.spec(tmp_path, teachers=[control]))
    trained = spec.teachers[0].model_copy(update={"stand_in": None, "name": "trained"})
    data_spec = spec.model_copy(update={"teachers": (*spec.teachers, trained)})
    models = load_teachers(data_spec, make_data(data_spec))
    trained_numbers = numbers(models["trained"])
    for name, after in numbers(models["gpt"]).items():
        assert np.array_equal(np.sort(after, axis=None), np.sort(trained_numbers[name], axis=None)), name
    result = run(tiny.spec(tmp_path, teachers=[control]), variant="main", seed=0)
    told = "teacher 'gpt': a control is in its place (stand_in: shuffled_weights)"
    assert capsys.readouterr().err.count(told) == 1
    assert np.isfinite(result.results["ce"])
