"""Quantised teachers: the same cache interface, close values, honest refusals, training that stays finite."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from kava_core.build import teachers as assemble
from kava_core.data.tokenizers import train_tokenizer
from kava_core.errors import SpecError
from kava_core.kv.capture.attention_layers import attention_layers
from kava_core.kv.capture.capture import Capture
from kava_core.kv.capture.geometry import model_geometry
from kava_core.models.load import load_model
from kava_core.models.quantize import BYTES, LIBRARY, is_quantised
from kava_core.protocols.axes import Cache
from kava_core.runs.metrics import read_metrics
from kava_core.specfile.sections.models import StudentSpec, TeacherSpec, TrainTokenizer
from kava_core.train.run import run
from tests.support import tiny

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")
WHERE = "teacher 'wide'"
WIDE = tiny.llama(hidden_size=128, num_hidden_layers=3)
COSINE = {"int8": 0.999, "int4": 0.97, "nf4": 0.97}
IDS = torch.randint(1, 9, (2, 7), generator=torch.Generator().manual_seed(0))
formats = pytest.mark.parametrize("quantize", COSINE)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    return train_tokenizer(TrainTokenizer(kind="chars", vocab_size=40), ["7+3*2?", " 10 #0"], folder)


def need(quantize: str) -> None:
    pytest.importorskip(LIBRARY[quantize])


def spec(quantize: str | None, **more: Any) -> TeacherSpec:
    fields = {"config": WIDE, "tokenizer": "x"} | more
    return TeacherSpec(name="wide", quantize=quantize, **fields)


def made(quantize: str | None, tokenizer: PreTrainedTokenizerBase, **more: Any) -> nn.Module:
    return load_model(spec(quantize, **more), tokenizer, seed=0, where=WHERE).eval()


def cache(model: nn.Module) -> Cache:
    with torch.no_grad(), Capture(model, parts=("keys", "values", "queries")) as capture:
        model(IDS, use_cache=False)
    return capture.take()


def cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.cosine_similarity(one.double().flatten(), other.double().flatten(), dim=0))


@formats
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_quantised_teacher_s_cache_is_close_and_of_the_same_shape(
    quantize: str, dtype: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    need(quantize)
    plain, model = made(None, tokenizer), made(quantize, tokenizer, dtype=dtype)
    assert model_geometry(model) == model_geometry(plain)
    for (_, want), (_, got) in zip(cache(plain).items(), cache(model).items(), strict=True):
        assert got.shape == want.shape
        assert got.dtype == getattr(torch, dtype)
        assert not torch.equal(got.float(), want)
        assert cosine(got, want) > COSINE[quantize]


@formats
def test_linear_layers_are_quantised_and_nothing_else(
    quantize: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    need(quantize)
    model = made(quantize, tokenizer)
    quantised = {name for name, p in model.named_parameters() if is_quantised(p)}
    assert quantised == {f"{n}.weight" for n, m in model.model.layers.named_modules(prefix="model.layers")
                         if isinstance(m, nn.Linear)}  # fmt: skip
    assert len(quantised) == 3 * 7
    assert model.lm_head.weight.dtype == model.model.embed_tokens.weight.dtype == torch.float32


@formats
def test_a_stored_teacher_is_quantised_while_it_is_loaded(
    quantize: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    need(quantize)
    made(None, tokenizer).save_pretrained(tmp_path)
    stored = made(quantize, tokenizer, config=None, path=str(tmp_path))
    assert torch.equal(cache(stored).keys, cache(made(quantize, tokenizer)).keys)


def stored_bytes(parameter: nn.Parameter) -> int:
    """What one quantised weight takes without its scales."""
    data = getattr(parameter, "qdata", parameter.data)
    return data.numel() * data.element_size()


@formats
def test_bytes_of_a_weight_are_as_stated(quantize: str, tokenizer: PreTrainedTokenizerBase) -> None:
    need(quantize)
    plain, model = made(None, tokenizer), made(quantize, tokenizer)
    weights = [layer.k_proj.weight for layer in attention_layers(plain)]
    rounded = [layer.k_proj.weight for layer in attention_layers(model)]
    for one, other in zip(weights, rounded, strict=True):
        assert stored_bytes(other) == one.numel() * BYTES[quantize]


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_weights_are_rounded_to_the_nearest_of_their_levels(
    quantize: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Half a level at most, where a row (int8) or 32 weights of it (int4) share their levels; float64."""
    need(quantize)
    plain, model = made(None, tokenizer), made(quantize, tokenizer)
    exact = attention_layers(plain)[0].v_proj.weight.detach().double()
    rounded = attention_layers(model)[0].v_proj.weight.dequantize().double()
    groups = exact.unflatten(1, (-1, 32 if quantize == "int4" else exact.shape[1]))
    largest = groups.abs().amax(-1, keepdim=True)
    half = largest / (127 if quantize == "int8" else 7.5) / 2
    error = (rounded.view_as(groups) - groups).abs()
    assert (error <= half * 1.02).all()
    assert (error > 0.3 * half).any()


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_a_missing_library_is_named(
    quantize: str, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, LIBRARY[quantize], None)
    with pytest.raises(SpecError) as error:
        made(quantize, tokenizer)
    library = LIBRARY[quantize]
    assert str(error.value) == f"{WHERE}.quantize: {quantize} needs {library}: pip install 'kava[quantize]'"


NARROW = tiny.llama(hidden_size=48)
REFUSALS = {
    "int8": (tiny.gpt2(), "GPT2LMHeadModel has no linear layer that could be quantised"),
    "int4": (NARROW, "int4 needs linear layers with a multiple of 32 inputs"),
    "nf4": (
        NARROW,
        "nf4 on CPU needs layers with a multiple of 64 inputs and of 32 outputs; model.layers.0.",
    ),
}


@formats
@pytest.mark.skipif(torch.cuda.is_available(), reason="nf4 has other limits on CUDA")
def test_what_cannot_be_rounded_is_refused(quantize: str, tokenizer: PreTrainedTokenizerBase) -> None:
    need(quantize)
    config, said = REFUSALS[quantize]
    with pytest.raises(SpecError) as error:
        made(quantize, tokenizer, config=config)
    assert str(error.value).startswith(f"{WHERE}.quantize: {said}")
    assert "\n" not in str(error.value)


def test_students_are_not_quantised() -> None:
    with pytest.raises(ValueError, match="quantize"):
        StudentSpec(config=WIDE, tokenizer="x", quantize="int8")


def loud_in(folder: Path, load: Callable[..., nn.Module], seen: list[nn.Module]) -> Callable[..., nn.Module]:
    """As ``load``, with loud quantised teachers, kept in ``folder`` on their way and in ``seen``."""

    def loaded(given: Any, *args: Any, **options: Any) -> nn.Module:
        model = load(given.model_copy(update={"quantize": None}), *args, **options)
        with torch.no_grad():
            for layer in attention_layers(model):
                layer.v_proj.weight[::8] *= 100
        model.save_pretrained(folder / "loud")
        stored = given.model_copy(update={"config": None, "path": str(folder / "loud")})
        seen.append(load(stored, *args, **options))
        return seen[-1]

    return loaded


RUNS = [("int8", "bf16", "mercator"), ("int4", "fp32", "smooth_l1"), ("nf4", "bf16", "smooth_l1")]


@pytest.mark.parametrize(("quantize", "precision", "loss"), RUNS)
def test_a_teacher_with_values_of_fifty_trains_without_blow_up(
    quantize: str, precision: str, loss: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need(quantize)
    seen: list[nn.Module] = []
    monkeypatch.setattr(assemble, "load_model", loud_in(tmp_path, assemble.load_model, seen))
    teacher = {"name": "wide", "config": WIDE, "tokenizer": tiny.CHARS, "quantize": quantize}
    changes = {"train": {"steps": 12, "precision": precision}, "evaluate": {"every": 12}}
    done = run(
        tiny.spec(tmp_path, teachers=[teacher], losses=[{"name": loss}], **changes), variant="main", seed=0
    )
    assert cache(seen[0]).values.abs().max() > 50
    lines = [line for line in read_metrics(done.folder / "metrics.jsonl") if "loss" in line]
    losses = torch.tensor([line["loss"] for line in lines])
    assert losses.isfinite().all()
    assert losses[-3:].mean() < losses[:3].mean()
