"""The numbers of ``kava plan`` against really built models, real tensors and counts by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from kava_core.cli.app import app
from kava_core.costs.dry_run import dry_run, sized_config
from kava_core.costs.kept_activations import kept_by_losses, kept_by_student
from kava_core.costs.plan import Plan, default_time, make_plan
from kava_core.data.tokenizers import load_tokenizer
from kava_core.errors import SpecError
from kava_core.jobs.check import check
from kava_core.kv.align.stage_order import StageExtents, multiplications
from kava_core.kv.capture.capture import Capture
from kava_core.models.config import config_geometry
from kava_core.models.load import load_model
from kava_core.models.student import load_student
from kava_core.specfile.sections.models import TrainTokenizer
from kava_core.specfile.sections.pipeline import PipelineSpec
from tests.support import tiny
from tests.support.repository import ROOT

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
    order = dry.pipeline.teachers[0].order("keys", T_TIME, dry.time_maps["wide"])
    expected = multiplications(
        order, StageExtents(t_head=4, head=2, t_time=T_TIME, time=TIME, t_dim=16, dim=8)
    )
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
        config_geometry(sized_config(spec.student, where="student"), where="student")


@pytest.mark.parametrize(("format", "each"), [("int8", 1.0), ("nf4", 0.5)])
def test_quantised_teachers_hold_smaller_linear_layers(format: str, each: float) -> None:
    """Embeddings, norms and the head keep their dtype."""
    plain, quantised = (
        make_plan(with_teacher(quantize=wanted), time=8, t_time=8).models[1] for wanted in (None, format)
    )
    hidden, inner, layers, kv = 32, 64, 2, 2 * 8
    linear = layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner)
    assert plain.held_bytes - quantised.held_bytes == linear * (4 - each)


def with_teacher(**fields: Any) -> PipelineSpec:
    return tiny.spec(teachers=[{"name": "t", "config": tiny.llama(), "tokenizer": tiny.CHARS} | fields])


def really_kept(student: Any, run: Any, *, precision: str) -> int:
    """Bytes that autograd keeps of a real forward pass, weights left out."""
    own = {p.data_ptr() for p in (*student.parameters(), *student.buffers())}
    seen: dict[int, torch.UntypedStorage] = {}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in own:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), autocast:
        run()
    return sum(storage.nbytes() for storage in seen.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("config", [tiny.llama(), tiny.gpt2()], ids=["llama", "gpt2"])
def test_activations_are_what_autograd_keeps(
    config: dict[str, Any], batch: int, precision: str, words: str
) -> None:
    """Of several examples one is padded, so that attention keeps a mask."""
    spec = alone(config=config, tokenizer=words)
    spec = spec.model_copy(update={"train": spec.train.model_copy(update={"precision": precision})})
    student: Any = load_student(spec.student, load_tokenizer(words), seed=0).train()
    ids = torch.full((batch, 40), 3)
    mask = torch.ones_like(ids)
    mask[1:, 35:] = 0
    real = really_kept(
        student, lambda: student(input_ids=ids, attention_mask=mask, use_cache=False), precision=precision
    )
    planned = kept_by_student(spec, sized_config(spec.student, where="s"), batch=batch, time=40)
    assert planned.total == pytest.approx(real, rel=0.01)


def test_checkpointing_keeps_what_enters_the_layers() -> None:
    spec = alone(tokenizer=tiny.CHARS)
    kept = kept_by_student(spec, sized_config(spec.student, where="s"), batch=1, time=50)
    assert kept.layer_input == 50 * 32 * 4
    assert kept.checkpointed == kept.outside_layers + 2 * 50 * 32 * 4
    assert kept.total > 3 * kept.checkpointed


def test_losses_keep_what_autograd_keeps() -> None:
    """A squared difference keeps one tensor as large as the cache for each part."""
    spec = small(losses=[{"name": "mse", "parts": ["keys", "values"]}])
    dry = dry_run(spec, batch=BATCH, time=TIME, t_time=TIME)
    cache = BATCH * 2 * 2 * TIME * 8 * 4  # layers, heads, width, bytes
    assert 2 * cache <= kept_by_losses(dry) < 4 * cache
    assert kept_by_losses(dry_run(alone(), batch=BATCH, time=TIME, t_time=TIME)) == 0


def shared_out(placement: str, processes: int) -> Plan:
    spec = with_teacher(placement=placement)
    return make_plan(spec, time=8, t_time=8, processes=processes)


LAYER = 4 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32)
"""Bytes of the tiny llama's decoder layer."""
AROUND = 4 * (2 * 64 * 32 + 32)
"""Of its embedding, head and last norm."""


def test_memory_of_several_processes_by_hand() -> None:
    alone, plan = shared_out("sharded", 1), shared_out("sharded", 4)
    weights = 2 * LAYER + AROUND
    assert alone.divided == {}
    assert plan.memory == alone.memory
    assert plan.memory["teachers: weights"] == weights
    ddp, fsdp = plan.divided["DDP"], plan.divided["FSDP2"]
    assert ddp["teachers: weights"] == fsdp["teachers: weights"] == weights // 4
    assert ddp["teachers: layers gathered to run"] == AROUND + 2 * LAYER
    assert (ddp[ADAM], fsdp[ADAM]) == (4 * weights, weights)
    assert ddp["student: gradients on their way"] == weights
    assert fsdp["student: layers gathered to run"] == 2 * AROUND + 3 * LAYER
    assert fsdp["student: activations"] == plan.memory["student: activations"]


def test_replicated_teachers_are_whole_everywhere() -> None:
    plan = shared_out("replicated", 4)
    assert plan.divided["FSDP2"]["teachers: weights"] == plan.memory["teachers: weights"]
    assert "teachers: layers gathered to run" not in plan.divided["DDP"]


def test_a_teacher_on_a_device_of_its_own_stands_beside_the_table() -> None:
    plan = shared_out("cpu", 4)
    assert plan.elsewhere == {"cpu": 2 * LAYER + AROUND}
    assert plan.memory["teachers: weights"] == plan.divided["DDP"]["teachers: weights"] == 0


def test_teachers_that_share_weights_count_once() -> None:
    teacher = {"config": tiny.llama(), "tokenizer": tiny.CHARS}
    spec = tiny.spec(teachers=[{"name": "a"} | teacher, {"name": "b", "rationale": 1} | teacher])
    one = with_teacher()
    found, want = (make_plan(x, time=8, t_time=8).memory["teachers: weights"] for x in (spec, one))
    assert found == want


def test_the_table_has_a_column_for_each_way(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(json.dumps(tiny.fields()))
    done = CliRunner().invoke(app, ["plan", str(tmp_path / "spec.yaml"), "--processes", "4"])
    assert done.exit_code == 0, done.output
    assert "each of 4" in done.output
    assert CliRunner().invoke(app, ["plan", "spec.yaml", "--processes", "0"]).exit_code == 2


MEASURED: dict[str, tuple[dict[str, Any], int]] = {
    "fp32": ({"train": {"batch_size": 2}}, 512),
    "bf16": ({"train": {"batch_size": 2, "precision": "bf16"}}, 512),
    "checkpointed": (
        {"student": {"gradient_checkpointing": True}, "train": {"batch_size": 1, "precision": "bf16"}},
        1024,
    ),
}


def medium(changes: dict[str, Any]) -> dict[str, Any]:
    """Large enough for tensors to outweigh the rest of the process; some hundred MB."""
    ours = tiny.llama(hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=8)
    theirs = ours | {"hidden_size": 384, "num_hidden_layers": 8, "num_key_value_heads": 4}
    sizes = {"vocab_size": 4000, "max_position_embeddings": 4096}
    teacher = {"name": "t", "config": theirs | sizes, "tokenizer": tiny.CHARS}
    return tiny.fields(
        student={"config": ours | sizes, "tokenizer": tiny.CHARS} | changes.get("student", {}),
        teachers=[teacher | {"align": {"dim_projector": "linear", "time_warper": "identity"}}],
        losses=[{"name": "mse"}],
        train=changes["train"],
    )


def measured(fields: dict[str, Any], time: int) -> int:
    """Bytes at the peak of two real steps in a fresh process, whose freed blocks go back to the system."""
    more = {"MALLOC_MMAP_THRESHOLD_": "65536", "KAVA_SHAPE_CHECK": "0", "OMP_NUM_THREADS": "1"}
    root = ROOT
    done = subprocess.run(
        [sys.executable, str(root / "tests/support/peak_memory.py"), json.dumps(fields), str(time)],
        env=os.environ | more | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.split()[-1])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(
    "case",
    [
        pytest.param("checkpointed", marks=pytest.mark.slow),
        pytest.param("bf16", marks=pytest.mark.release),
        pytest.param("fp32", marks=pytest.mark.release),
    ],
)
def test_planned_memory_is_near_the_measured_peak(case: str) -> None:
    changes, time = MEASURED[case]
    fields = medium(changes)
    planned = sum(make_plan(tiny.spec(**fields), time=time, t_time=time).memory.values())
    assert measured(fields, time) / planned == pytest.approx(1, abs=0.15)


def test_a_stream_holds_one_layer_of_the_raw_cache() -> None:
    """Four layers are read, or two for each student layer, of equal size."""
    name = "teachers: captured cache (the largest)"

    def captured(**changes: Any) -> int:
        deep = tiny.FIELDS["teachers"][0] | {"align": {"layer_mapper": {"name": "ratio", **changes}}}
        student = {"config": tiny.llama(num_hidden_layers=4), "tokenizer": tiny.CHARS}
        fields: dict[str, Any] = {"student": student, "teachers": [deep]}
        sizes = [
            make_plan(tiny.spec(**fields, train={"stream": stream}), time=16, t_time=16).memory[name]
            for stream in (False, True)
        ]
        return sizes[0] // sizes[1]

    assert captured() == 4
    assert captured(sources=2) == 2


def test_cross_logits_and_hidden_states_are_planned() -> None:
    """A teacher of which one early layer is read runs on: to its head, or to its last layer."""
    wide = tiny.FIELDS["teachers"][0]
    fields: dict[str, Any] = {"teachers": [wide], "losses": [{"name": "relation", "layers": [0]}]}
    plans = {
        name: make_plan(tiny.spec(**fields, **more), time=8, t_time=10)
        for name, more in {
            "plain": {},
            "hidden": {"hidden": {"layers": [0]}},
            "cross": {"cross_logits": {}},
            "both": {"cross_logits": {}, "logits": {}, "hidden": {}},
        }.items()
    }
    batch, time, t_time = 8, 8, 10
    student, teacher = plans["plain"].models
    head = 2 * batch * t_time * teacher.vocabulary * 64
    assert plans["cross"].flops["wide"] - plans["plain"].flops["wide"] == head
    assert plans["hidden"].flops["wide"] == plans["plain"].flops["wide"]
    name = "teachers: logits, and the term's gradient"
    theirs, own = t_time * teacher.vocabulary, time * student.vocabulary
    assert plans["cross"].memory[name] == batch * 4 * (theirs + own)
    assert plans["both"].memory[name] == batch * 4 * (theirs + 2 * own)
    # Embedding and four layers 64 wide; one layer of the student, its target and their difference, 32 wide.
    states = batch * 4 * (5 * t_time * 64 + 3 * time * 32)
    (found,) = [size for part, size in plans["hidden"].memory.items() if part.startswith("hidden states")]
    assert found == states
    # Width 64 to 32, for the one layer that is read; layers and time are gathered.
    aligned = plans["hidden"].flops["alignment of hidden states"]
    assert 2 * batch * time * 64 * 32 <= aligned <= 2 * batch * t_time * 64 * 32 * 1.2
    rows = {(row.stage, row.shape) for row in plans["hidden"].dry.shapes if row.part == "hidden"}
    assert ("captured", (batch, 1, 1, t_time, 64)) in rows or ("captured", (batch, 2, 1, t_time, 64)) in rows


def test_logits_are_planned() -> None:
    """The teacher's weights, its whole forward pass and what the term keeps; with KV losses and alone."""
    gpt = tiny.FIELDS["teachers"][1]
    for losses in ([], [{"name": "relation"}]):
        plans = [
            make_plan(tiny.spec(teachers=[gpt], losses=losses, **more), time=8, t_time=10)
            for more in ({}, {"logits": {}})
        ]
        plain, heard = plans
        name = "teachers: logits, and the term's gradient"
        vocabulary = heard.models[1].vocabulary
        assert name not in plain.memory
        batch = 8
        assert heard.memory[name] == batch * 4 * (10 * vocabulary + 8 * heard.models[0].vocabulary)
        assert heard.memory["teachers: weights"] > 0
        if losses:
            head = 2 * batch * 10 * vocabulary * 48
            assert heard.flops["gpt"] - plain.flops["gpt"] == head
        else:
            assert "gpt" not in plain.flops
