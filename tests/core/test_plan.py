"""The numbers of ``kava plan`` against really built models, real tensors and counts by hand."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from kava_core.cli import app
from kava_core.data.tokenizers import load_tokenizer
from kava_core.dry_run import dry_run, geometry
from kava_core.errors import SpecError
from kava_core.kv.capture import Capture
from kava_core.kv.order import Extents, cost
from kava_core.plan import Plan, default_time, make_plan
from kava_core.spec.check import check
from kava_core.spec.model import PipelineSpec, TrainTokenizer
from kava_core.train.models import load_model, load_student
from tests import tiny

VOCAB = 64
BATCH, TIME, T_TIME = 4, 20, 30
ADAM = "student: weights, gradients, optimizer"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tokenizer whose vocabulary is no config's default."""
    folder = tmp_path_factory.mktemp("words")
    texts = ["12+3*4? 2 5 #5", "7-1? 6 #6"]
    load_tokenizer(TrainTokenizer(kind="chars"), texts=texts, cache=folder).save_pretrained(folder / "kept")
    return str(folder / "kept")


def planned(spec: PipelineSpec) -> Plan:
    """A plan with the lengths that are counted by hand here."""
    return make_plan(spec, time=TIME, t_time=T_TIME)


def small(align: dict[str, Any] | None = None, student: dict[str, Any] | None = None, **changes: Any) -> Any:
    """A llama student, and a llama teacher with 4 heads of width 16 where the student has 2 of width 8."""
    config = tiny.llama(vocab_size=VOCAB)
    wide = config | {"num_hidden_layers": 4, "hidden_size": 64, "num_key_value_heads": 4}
    teacher = {"name": "wide", "config": wide, "tokenizer": tiny.CHARS, "align": align or {}}
    fields: dict[str, Any] = {
        "student": {"config": config, "tokenizer": tiny.CHARS} | (student or {}),
        "teachers": [teacher],
        "losses": [{"name": "mercator", "parts": ["keys", "values"]}],
        "train": {"batch_size": BATCH},
    }
    return tiny.spec(**(fields | changes))


def alone(**student: Any) -> PipelineSpec:
    """Only a student."""
    return small(student=student, teachers=[], losses=[])


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes."""
    return sum(x.numel() * x.element_size() for x in tensors)


@pytest.mark.parametrize("config", [tiny.llama(), tiny.gpt2()], ids=["llama", "gpt2"])
@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_and_optimizer_are_those_of_the_built_model(
    config: dict[str, Any], lora: Any, dtype: str, words: str
) -> None:
    if lora is not None:
        pytest.importorskip("peft")
    spec = alone(config=config, tokenizer=words, lora=lora, dtype=dtype)
    plan = planned(spec)
    student = load_student(spec.student, load_tokenizer(words), seed=0)
    trained = [p for p in student.parameters() if p.requires_grad]
    assert plan.models[0].parameters == sum(p.numel() for p in student.parameters())
    assert plan.models[0].trainable == sum(p.numel() for p in trained)
    assert plan.models[0].note == ""
    assert plan.memory[ADAM] == size(student.parameters()) + after_a_step(student, trained)


def after_a_step(student: nn.Module, trained: list[nn.Parameter]) -> int:
    """Bytes of gradients and moments once AdamW has made a step (its step counters left out)."""
    student(input_ids=torch.ones(1, 3, dtype=torch.long)).logits.float().sum().backward()
    adam = torch.optim.AdamW(trained)
    adam.step()
    moments = [s[key] for s in adam.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert len(moments) == 2 * len(trained)
    return size(moments) + size(p.grad for p in trained if p.grad is not None)


def llama_forward(time: int) -> int:
    """Multiply-adds × 2 of the tiny llama student, one example, with its language-model head."""
    projections = 32 * 32 * 2 + 32 * 16 * 2
    mlp = 3 * 32 * 64
    attention = 2 * 4 * 8 * time  # scores and weighted values of 4 heads of width 8, for each token
    return 2 * time * (2 * (projections + mlp + attention) + 32 * VOCAB)


@pytest.mark.parametrize(
    ("student", "passes"),
    [
        ({}, 3),
        ({"gradient_checkpointing": True}, 4),
        ({"lora": {"rank": 2}}, 2),
        ({"lora": {"rank": 2}, "gradient_checkpointing": True}, 3),
    ],
)
def test_student_flops_by_hand(student: dict[str, Any], passes: int) -> None:
    if "lora" in student:
        pytest.importorskip("peft")
    flops = planned(alone(**student)).flops["student"]
    assert flops == pytest.approx(passes * BATCH * llama_forward(TIME), rel=1e-3)  # rotary angles are extra


def test_accumulation_multiplies() -> None:
    once = planned(small()).flops
    twice = planned(small(train={"batch_size": BATCH, "accumulate": 2})).flops
    assert twice == {who: 2 * count for who, count in once.items()}


def test_alignment_flops_by_hand() -> None:
    # Cheapest: width at 30 positions is dearer than at 20; heads 4 → 2 come first, then time with two taps.
    heads = 4 * 2 * T_TIME * 16
    time = 2 * 2 * TIME * 16
    width = 2 * TIME * 16 * 8
    flops = planned(small({"head_adapter": "structured", "dim_projector": "calibrated"})).flops
    assert flops["alignment"] == 2 * (heads + time + width) * BATCH * 2 * 2  # layers and parts


@pytest.mark.parametrize("projector", ["calibrated", "linear"])
def test_alignment_flops_are_the_cost_the_order_was_chosen_by(projector: str) -> None:
    spec = small({"dim_projector": {"name": projector, "trainable": False}})
    dry = dry_run(spec, batch=BATCH, time=TIME, t_time=T_TIME)
    assert dry.pipeline is not None
    order = dry.pipeline.teachers[0].order("keys", T_TIME, dry.maps["wide"])
    expected = cost(order, Extents(t_head=4, head=2, t_time=T_TIME, time=TIME, t_dim=16, dim=8))
    assert planned(spec).flops["alignment"] == 2 * expected * BATCH * 2 * 2


def same_geometry(align: dict[str, Any]) -> float:
    """Alignment FLOPs of a teacher whose heads and width are the student's."""
    teacher = {"name": "twin", "config": tiny.llama(vocab_size=VOCAB), "tokenizer": tiny.CHARS}
    teacher["align"] = {"time_warper": "identity"} | align
    spec = small(teachers=[teacher])
    return make_plan(spec, time=TIME, t_time=TIME).flops["alignment"]


def test_equal_widths_count_where_something_is_multiplied() -> None:
    width = 2 * 2 * TIME * 8 * 8 * BATCH * 2 * 2
    assert same_geometry({"dim_projector": "identity"}) == 0
    assert same_geometry({"dim_projector": "calibrated"}) == width
    # Of a trained matrix the gradient is one product more; the teacher's cache needs none.
    assert same_geometry({"dim_projector": "linear"}) == 2 * width


@pytest.mark.parametrize(
    ("dtype", "precision"), [("float32", "fp32"), ("bfloat16", "fp32"), ("float32", "bf16")]
)
@pytest.mark.parametrize("config", [tiny.llama(), tiny.gpt2()], ids=["llama", "gpt2"])
def test_captured_cache_is_as_large_as_the_real_one(
    words: str, config: dict[str, Any], dtype: str, precision: str
) -> None:
    teacher = {"name": "wide", "config": config, "tokenizer": words, "dtype": dtype}
    spec = small(teachers=[teacher], train={"batch_size": BATCH, "precision": precision})
    plan = planned(spec)
    assert plan.dry.pipeline is not None
    model = load_model(spec.teachers[0], load_tokenizer(words), seed=0, where="teacher").eval()
    capture = Capture(model, layers=plan.dry.pipeline.teachers[0].sources)
    ids = torch.ones(BATCH, T_TIME, dtype=torch.long)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"), capture:
        model(input_ids=ids, use_cache=False)
    real = sum(x.nbytes for _, x in capture.take().items())
    assert plan.memory["teachers: captured cache (the largest)"] == real


def test_alignment_memory_is_that_of_its_tensors() -> None:
    row = "alignment: weights, gradients, optimizer"
    frozen = planned(small({"dim_projector": {"name": "linear", "trainable": False}})).memory[row]
    trained = planned(small({"dim_projector": "linear"})).memory[row]
    assert trained - frozen == 3 * 4 * 2 * (2 * 16 * 8)  # fp32; parts; layers × widths


def test_raw_caches_are_not_added_up() -> None:
    spec = tiny.spec()
    both = planned(spec).memory["teachers: captured cache (the largest)"]
    one = spec.model_copy(update={"teachers": spec.teachers[:1]})
    other = spec.model_copy(update={"teachers": spec.teachers[1:]})
    assert both == max(planned(s).memory["teachers: captured cache (the largest)"] for s in (one, other))


def test_vocabulary_comes_from_the_tokenizer(words: str) -> None:
    known = planned(alone(config=tiny.gpt2(), tokenizer=words)).models[0]
    trained = planned(alone(config=tiny.gpt2())).models[0]
    absent = planned(alone(config=tiny.gpt2(), tokenizer="no/such/folder")).models[0]
    assert known.vocabulary == len(load_tokenizer(words))
    assert (trained.vocabulary, trained.note) == (64, "(at most)")
    assert (absent.vocabulary, absent.note) == (50257, "(vocabulary unknown)")


def test_a_checkpoint_keeps_its_vocabulary(words: str, tmp_path: Path) -> None:
    made = alone(config=tiny.llama(), tokenizer=words).student
    tokenizer = load_tokenizer(words)
    load_model(made, tokenizer, seed=0, where="student").save_pretrained(tmp_path)
    cost = planned(alone(config=None, path=str(tmp_path), tokenizer=tiny.CHARS)).models[0]
    assert (cost.vocabulary, cost.note) == (len(tokenizer), "")


def test_default_length_is_what_all_models_take() -> None:
    assert default_time(small()) == 128
    assert default_time(small(train={"max_length": 50})) == 50
    short = small().student.model_copy(update={"config": tiny.gpt2(n_positions=40)})
    assert default_time(small().model_copy(update={"student": short})) == 40


@pytest.mark.parametrize("option", ["--time", "--teacher-time"])
@pytest.mark.parametrize("value", ["0", "-1"])
def test_lengths_are_at_least_one(option: str, value: str) -> None:
    done = CliRunner().invoke(app, ["plan", "spec.yaml", option, value])
    assert done.exit_code == 2
    assert f"Invalid value for '{option}'" in done.output


def test_identity_warper_passes_the_check(tmp_path: Path) -> None:
    fields = tiny.fields()
    for teacher in fields["teachers"]:
        teacher["align"] = {"time_warper": "identity"}
    (tmp_path / "spec.yaml").write_text(json.dumps(fields))
    assert [name for name, _ in check(tmp_path / "spec.yaml")][-1] == "shapes"


def test_models_that_decode_nothing_are_one_line() -> None:
    spec = alone(config={"model_type": "t5"})
    with pytest.raises(SpecError, match=r"^student: [^\n]+$"):
        geometry(spec.student, where="student")


@pytest.mark.parametrize(("format", "each"), [("int8", 1.0), ("nf4", 0.5)])
def test_quantised_teachers_hold_smaller_linear_layers(format: str, each: float) -> None:
    """Embeddings, norms and the head keep their dtype."""
    plain, quantised = (
        make_plan(with_teacher(quantize=wanted), time=8, t_time=8).models[1] for wanted in (None, format)
    )
    hidden, inner, layers, kv = 32, 64, 2, 2 * 8
    linear = layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner)
    assert plain.weights - quantised.weights == linear * (4 - each)


def with_teacher(**fields: Any) -> PipelineSpec:
    return tiny.spec(teachers=[{"name": "t", "config": tiny.llama(), "tokenizer": tiny.CHARS} | fields])
