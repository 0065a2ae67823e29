"""The specs of KaVa as published: their numbers against the paper's, and what it takes to train them.

Numbers: arXiv 2510.02312 (loss, weights, rate, epochs, λ of R-KV); sizes of the models as on
their cards.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kava_core.data.examples import split_steps
from kava_core.data.splits import load_splits
from kava_core.data.tokenizers import load_tokenizer
from kava_core.models.config import model_config
from kava_core.specfile.load import load_spec
from kava_core.specfile.sections.data import HubData
from kava_core.specfile.sections.models import TrainTokenizer
from kava_core.specfile.sections.pipeline import PipelineSpec
from kava_core.specfile.variants import resolve_variants
from kava_core.train.run import run as train
from tests.support import tiny
from tests.support.repository import ROOT

SPECS = ROOT / "specs"
ROWS, BATCH = 385_620, 128


class Published(NamedTuple):
    """One run of the paper."""

    codi: float
    loss: str
    kv: float
    rate: float
    epochs: int
    importance: float = 0.1


RUNS = {
    "llama-3.2-1b-equations": Published(10, "smooth_l1", 1, 8e-4, 10),
    "llama-3.2-1b-natural": Published(10, "mse", 1, 8e-4, 10),
    "qwen2.5-0.5b-equations": Published(10, "mse", 1, 5e-4, 10),
    "qwen2.5-0.5b-natural": Published(10, "mse", 1, 8e-4, 10),
    "llama-3.2-3b-equations": Published(20, "smooth_l1", 2, 2e-4, 5),
    "llama-3.2-3b-natural": Published(20, "smooth_l1", 2, 2e-4, 5, importance=0),
}
PARAMETERS = {
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "qwen2.5-0.5b": 494_032_768,
}
each_run = pytest.mark.parametrize("run", RUNS)


def spec_of(run: str, *overrides: str) -> PipelineSpec:
    return load_spec(SPECS / "kava" / f"{run}.yaml", overrides).spec


def test_there_is_a_spec_for_every_published_run() -> None:
    assert {file.stem for file in (SPECS / "kava").glob("*.yaml")} == set(RUNS)


@each_run
def test_the_numbers_are_the_papers(run: str) -> None:
    spec = spec_of(run)
    (loss,), (teacher,) = spec.losses, spec.teachers
    warper = teacher.align.time_warper
    assert spec.codi is not None
    found = (spec.codi.weight, loss.name, loss.weight, spec.train.learning_rate)
    assert (*found, warper.weight) == (*RUNS[run][:4], RUNS[run].importance)
    assert spec.train.steps == round(ROWS * RUNS[run].epochs / BATCH)
    assert (spec.train.clip, spec.train.schedule) == (2.0, "cosine")
    assert spec.train.batch_size * spec.train.accumulate == BATCH


@each_run
def test_one_model_with_lora_reads_all_but_the_last_step(run: str) -> None:
    spec = spec_of(run)
    (teacher,), lora = spec.teachers, spec.student.lora
    assert lora is not None
    assert (lora.rank, lora.alpha, lora.dropout) == (128, 32, 0.1)
    assert (spec.latent.count, spec.latent.passes, spec.latent.begin) == (24, 3, True)
    assert teacher.itself is not None
    assert (teacher.itself.cross_entropy, teacher.last_step) == (1.0, False)
    assert teacher.align.time_warper.name == "rkv"


@each_run
def test_the_traces(run: str) -> None:
    data = spec_of(run).data
    assert isinstance(data, HubData)
    name, separator = {"s": ("whynlp/gsm8k-aug", " "), "l": ("whynlp/gsm8k-aug-nl", "\n")}[run[-1]]
    assert (data.path, data.separator) == (name, separator)
    assert data.columns == {"prompt": "question", "reasoning": "steps"}


@each_run
def test_the_line_that_trains_it(run: str) -> None:
    """The overrides in the header: student and teacher are the model on the hub, in place of its extents."""
    text = (SPECS / "kava" / f"{run}.yaml").read_text(encoding="utf-8")
    (line,) = [line for line in text.splitlines() if line.startswith("#   kava train")]
    file, *overrides = line.split()[3:]
    assert file == f"specs/kava/{run}.yaml"
    spec = spec_of(run, *overrides)
    assert spec.student.path == spec.student.tokenizer == spec.teachers[0].path
    assert spec.student.config is spec.teachers[0].config is None


@pytest.mark.parametrize("model", PARAMETERS)
@pytest.mark.parametrize("kind", ["equations", "natural"])
def test_the_extents_are_the_models(model: str, kind: str) -> None:
    config = model_config(spec_of(f"{model}-{kind}").student, where="student")
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config)
    assert sum(weight.numel() for weight in made.parameters()) == PARAMETERS[model]


def test_the_small_spec_has_both_kinds_of_traces() -> None:
    specs = resolve_variants(load_spec(SPECS / "latent_gsm8k.yaml"))
    kinds = {name: (spec.data.format, spec.data.separator) for name, spec in specs.items()}
    assert kinds == {"equations": ("gsm8k_equations", " "), "natural": ("gsm8k", "\n")}


def rows(count: int) -> list[dict[str, object]]:
    """As whynlp/gsm8k-aug has them; every third example has one step."""
    made = []
    for a in range(count):
        steps = [f"<<{a}+3={a + 3}>>", f"<<{a + 3}*2={2 * a + 6}>>"][: 1 if a % 3 == 0 else 2]
        answer = steps[-1].removesuffix(">>").partition("=")[2]
        made.append({"question": f"Ann has {a}, Bob {a + 3}. All?", "steps": steps, "answer": answer})
    return made


@pytest.fixture
def hub(tmp_path: Path) -> list[str]:
    """Overrides that put folders in place of the hub's model and data, and make the run short."""
    pytest.importorskip("peft")
    datasets = pytest.importorskip("datasets")
    for split in ("train", "test"):
        datasets.Dataset.from_list(rows(12)).to_parquet(tmp_path / f"data/{split}-00000-of-00001.parquet")
    texts = [json.dumps(row) + "The answer is:\n" for row in rows(12)]
    tokenizer = load_tokenizer(TrainTokenizer(kind="chars", vocab_size=90), texts=texts, cache=tmp_path)
    tokenizer.save_pretrained(tmp_path / "model")
    config = tiny.llama(vocab_size=len(tokenizer), max_position_embeddings=256)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).save_pretrained(tmp_path / "model")
    model = [f"student.path={tmp_path}/model", "student.config=null", "student.tokenizer=null"]
    short = ["steps=2", "batch_size=4", "accumulate=2", "warmup_steps=0", "log_every=1", "precision=fp32"]
    seldom = ["evaluate.every=2", "evaluate.examples=4", f"output={tmp_path}/runs"]
    return [*model, f"data.path={tmp_path}/data", *(f"train.{field}" for field in short), *seldom]


def test_lists_of_steps_become_reasoning(hub: list[str]) -> None:
    data = spec_of("llama-3.2-1b-equations", *hub).data
    found = load_splits(data, root=Path()).train
    assert [split_steps(example.reasoning, data.separator) for example in found] == [
        row["steps"] for row in rows(12)
    ]


@pytest.mark.parametrize("name", ["llama-3.2-1b-equations", "llama-3.2-3b-natural"])
def test_it_trains_with_folders_in_place_of_the_hub(name: str, hub: list[str]) -> None:
    done = train(spec_of(name, *hub), variant="main", seed=0)
    lines = [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text().splitlines()]
    terms = {"ce", "codi", "reading_ce", RUNS[name].loss}
    trained = [line for line in lines if terms <= set(line)]
    assert [line["step"] for line in trained] == [1, 2]
    assert all(math.isfinite(line[term]) and line[term] > 0 for line in trained for term in terms)
    assert (done.folder / "student" / "latent.json").is_file()
