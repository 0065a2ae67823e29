"""Bad input and damaged folders: one line that says where and what, the right exit code, no traceback."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerBase,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from kava_core.console import print_whole
from kava_core.data.tokenizers import train_tokenizer
from kava_core.errors import CheckpointError, KavaError, SpecError
from kava_core.experiment.report.write_report import write_report
from kava_core.jobs.export import export_student
from kava_core.models.config import max_positions, model_config
from kava_core.models.load import load_model
from kava_core.models.student import load_student
from kava_core.runs.metrics import read_metrics
from kava_core.specfile.sections.models import ModelSpec, StudentSpec, TrainTokenizer
from kava_core.train.callbacks import MetricsFile
from kava_core.train.run import RunResult, run
from kava_core.train.summary import PANELS, panel_curves, plot_curves, results_table
from tests.support import tiny

TEXTS = ["7+3*2?", " 10 0 #0"]
CHARS = TrainTokenizer(kind="chars", vocab_size=40)
SHORT: dict[str, Any] = {"teachers": [], "losses": [], "train": {"steps": 2}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return train_tokenizer(CHARS, TEXTS, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of outputs of a finished run."""
    output = tmp_path_factory.mktemp("pristine")
    run(tiny.spec(output, **SHORT), variant="main", seed=0)
    return output


@pytest.fixture
def finished(pristine: Path, tmp_path: Path) -> Path:
    """A copy of the finished run's directory, to be damaged."""
    shutil.copytree(pristine, tmp_path / "runs")
    (folder,) = (tmp_path / "runs").glob("tiny/main-*")
    return folder


def again(folder: Path) -> RunResult:
    """Train what is complete already."""
    return run(tiny.spec(folder.parents[1], **SHORT), variant="main", seed=0)


def told(kind: type[KavaError], act: Callable[[], Any]) -> str:
    """The one line of exactly this error."""
    with pytest.raises(kind) as raised:
        act()
    assert type(raised.value) is kind
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("where", ["/dev/null/x", "file/x", "file"])
def test_an_output_that_cannot_be_written(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("")
    spec = tiny.spec(tmp_path / where, **SHORT)
    said = told(KavaError, lambda: run(spec, variant="main", seed=0))
    assert "cannot be written: Not a directory" in said


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = told(KavaError, lambda: train_tokenizer(CHARS, TEXTS, tmp_path / "file" / "tokenizers"))
    assert "Not a directory (KAVA_CACHE names the cache)" in said


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\x00", b"[1"])
def test_a_broken_tokenizer_in_the_cache_is_trained_anew(tmp_path: Path, content: bytes) -> None:
    expected = train_tokenizer(CHARS, TEXTS, tmp_path).get_vocab()
    (folder,) = tmp_path.iterdir()
    (folder / "tokenizer.json").write_bytes(content)
    assert train_tokenizer(CHARS, TEXTS, tmp_path).get_vocab() == expected
    assert list(tmp_path.iterdir()) == [folder]


def without(record: dict[str, Any], name: str) -> str:
    return json.dumps({key: value for key, value in record.items() if key != name})


RECORDS: dict[str, tuple[Callable[[dict[str, Any]], bytes | str], str]] = {
    "a list": (lambda r: "[]", "holds a list, not an object"),
    "nothing": (lambda r: "", "unreadable: "),
    "very deep": (lambda r: "[" * 100_000, "unreadable: maximum recursion depth exceeded"),
    "half": (lambda r: json.dumps(r)[:100], "unreadable: "),
    "garbled": (lambda r: b"\xff\xfe\x00", "unreadable: "),
    "no results": (lambda r: without(r, "results"), "results are missing"),
    "results a list": (lambda r: json.dumps(r | {"results": [1]}), "results are missing or no numbers"),
    "results in words": (lambda r: json.dumps(r | {"results": {"steps": 2, "ce": "x"}}), "no numbers"),
    "no digest": (lambda r: without(r, "spec_digest"), "says nothing of spec_digest"),
    "no data": (lambda r: without(r, "data"), "says nothing of data"),
    "an object": (lambda r: "{}", "says nothing of name, variant, seed, spec_digest"),
}


@pytest.mark.parametrize("case", RECORDS)
def test_a_damaged_record(finished: Path, tmp_path: Path, case: str) -> None:
    damage, expected = RECORDS[case]
    file = finished / "run.json"
    content = damage(json.loads(file.read_text()))
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    for act in (lambda: again(finished), lambda: export_student(finished, tmp_path / "out")):
        said = told(CheckpointError, act)
        assert said.startswith(f"{file}: ")
        assert expected in said
    assert not (tmp_path / "out").exists()


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


STUDENTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "gone": (lambda run: shutil.rmtree(run / "student"), "missing, though the run is complete"),
    "a bit flipped": (lambda run: flip(run / "student" / "model.safetensors"), "altered since it was saved"),
    "config edited": (lambda run: (run / "student" / "config.json").write_text("{}"), "altered since"),
    "no tokenizer": (lambda run: (run / "student" / "tokenizer.json").unlink(), "missing, though the man"),
    "no manifest": (lambda run: (run / "student" / "manifest.json").unlink(), "no manifest.json"),
    "no spec": (lambda run: (run / "spec.json").unlink(), "spec.json: unreadable"),
}


@pytest.mark.parametrize("case", STUDENTS)
def test_a_damaged_student_is_not_exported(finished: Path, tmp_path: Path, case: str) -> None:
    damage, expected = STUDENTS[case]
    damage(finished)
    assert expected in told(CheckpointError, lambda: export_student(finished, tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))


def test_the_student_loads_with_its_manifest_and_is_exported_without(finished: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(finished / "student")
    export_student(finished, tmp_path / "out")
    kept = {file.name for file in (finished / "student").iterdir()}
    assert {file.name for file in (tmp_path / "out").iterdir()} == kept - {"manifest.json"} | {"README.md"}


@pytest.mark.parametrize("inside", ["", "student", "student/copy", "exported/here"])
def test_nothing_is_exported_or_reported_into_a_run(finished: Path, inside: str) -> None:
    """A report in the student's folder would be part of the student; its manifest knows nothing of it."""
    target = finished / inside
    before = sorted(finished.rglob("*"))
    expected = f"{target}: is inside the run {finished}, which keeps its own files; give a folder outside"
    assert told(SpecError, lambda: export_student(finished, target)) == expected
    pytest.importorskip("matplotlib")
    assert told(SpecError, lambda: list(write_report([finished.parent], target))) == expected
    assert sorted(finished.rglob("*")) == before


def test_an_export_through_a_link_into_a_run(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(finished / "student", target_is_directory=True)
    assert "is inside the run" in told(SpecError, lambda: export_student(finished, tmp_path / "link" / "new"))


def test_an_export_under_a_file(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = told(KavaError, lambda: export_student(finished, tmp_path / "file" / "out"))
    assert said == f"{tmp_path}/file/out: cannot be written: Not a directory"


def test_metrics_of_a_complete_run_that_are_gone(finished: Path) -> None:
    pytest.importorskip("matplotlib")
    (finished / "metrics.jsonl").unlink()
    said = told(CheckpointError, lambda: plot_curves([again(finished)], finished.parent / "p.png"))
    assert said == f"{finished}/metrics.jsonl: cannot be read: No such file or directory"


GOOD = b'{"step": 1, "seconds": 2.5}\n'


@pytest.mark.parametrize("bad", [b"\xff\xfe\n", b"{\n", b"[]\n", b'{"seconds": 1}\n', b'{"step": "1"}\n'])
def test_a_damaged_line_of_metrics(tmp_path: Path, bad: bytes) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(GOOD + bad + GOOD)
    assert told(CheckpointError, lambda: read_metrics(file)).startswith(f"{file}:2: ")


@pytest.mark.parametrize("cut", [b"", b'{"st', b"\xff", b"\0\0", GOOD[:-1]])
def test_a_last_line_that_was_cut_off(tmp_path: Path, cut: bytes) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(GOOD + cut)
    assert len(read_metrics(file)) == (2 if cut == GOOD[:-1] else 1)


def test_seconds_go_on_after_resuming(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "seconds": 100.0}\n{"step": 2, "seconds": 200.0}\n')
    callback = MetricsFile(file)
    arguments, control = TrainingArguments(output_dir=str(tmp_path), report_to=[]), TrainerControl()
    callback.on_train_begin(arguments, TrainerState(global_step=1), control)
    callback.on_log(arguments, TrainerState(global_step=2), control, logs={"ce": 1.0})
    assert [line["step"] for line in read_metrics(file)] == [1, 2]
    assert 100 <= read_metrics(file)[1]["seconds"] < 160


def test_panels_without_data_are_left_out(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = [RunResult(name, seed, tmp_path, {}) for name in ("a", "b") for seed in (0, 1)]
    lines = [{"step": step, "eval_ce": 1.0 / step, "ce": 2.0} for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert list(panel_curves(results)) == ["eval_ce"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plot_curves(results, tmp_path / "p.png")
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
        assert plot_curves(results, tmp_path / "none.png")
    lines = [{**line, "eval_relation": 0.1, "eval_exact_match": 0.5} for line in lines]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert list(panel_curves(results)) == ["eval_exact_match", "eval_ce", "kv"]
    lines = [{**line, "eval_hidden": 0.3, "eval_cross_logits": 0.2} for line in lines]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert list(panel_curves(results)) == ["eval_exact_match", "eval_ce", "kv", "outputs"]
    routed = [{**line, "eval_weight/a": line["step"] / 3, "eval_weight/b@math": 0.2} for line in lines]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in routed))
    assert list(panel_curves(results)) == list(PANELS)


def test_the_table_is_never_cut() -> None:
    numbers = {"steps": 400, "exact_match": 0.5, "ce": 1.234, "perplexity": 3.4, "relation": 0.1234}
    results = [RunResult("cross-entropy-and-everything", seed, Path(), numbers) for seed in (0, 1)]
    out = StringIO()
    print_whole(results_table(results), Console(file=out, width=40))
    assert "…" not in out.getvalue()
    for word in ("cross-entropy-and-everything", "mean of 2", *numbers, "0.1234"):
        assert word in out.getvalue()


CONFIGS: list[tuple[dict[str, Any], str]] = [
    (
        {"num_attention_heads": 3},
        "The hidden size (32) is not a multiple of the number of attention heads (3)",
    ),
    ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
    ({"num_key_value_heads": 0}, "num_attention_heads=4 is not a multiple of num_key_value_heads=0"),
    ({"num_attention_heads": 0}, "ZeroDivisionError"),
    ({"hidden_size": 0}, "student: hidden_size=0 must be at least 1"),
    ({"hidden_size": "x"}, "Field 'hidden_size' expected int, got str"),
    ({"hidden_act": "foo"}, "KeyError: 'foo'"),
    ({"rope_parameters": {"rope_type": "zz"}}, "KeyError: 'zz'"),
    ({"hiden_size": 32}, "config.hiden_size: not a field of 'llama'; did you mean 'hidden_size'?"),
]


@pytest.mark.parametrize(("changes", "expected"), CONFIGS)
def test_a_config_that_does_not_fit(
    tokenizer: PreTrainedTokenizerBase, changes: dict[str, Any], expected: str
) -> None:
    spec = ModelSpec(config=tiny.llama(**changes), tokenizer="x")
    said = told(SpecError, lambda: load_model(spec, tokenizer, seed=0, where="student"))
    assert said.startswith("student: ")
    assert expected in said


@pytest.mark.parametrize(
    "fields",
    [
        tiny.llama(rope_theta=5e5, head_dim=8, sliding_window=4, tie_word_embeddings=True, num_labels=3),
        tiny.llama(rope_parameters={"rope_type": "default", "rope_theta": 1e4}, dtype="float32"),
        tiny.llama(bos_token_id=1, eos_token_id=2, pad_token_id=0, temperature=0.5, is_decoder=True),
        tiny.llama(attn_implementation="eager", torch_dtype="float32", layer_types=["full_attention"] * 2),
        tiny.gpt2(),
        {"model_type": "gpt2", "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4},
        {"model_type": "gpt_neox", "hidden_size": 512, "rotary_pct": 0.5, "rotary_emb_base": 1e4},
        {"model_type": "phi", "partial_rotary_factor": 0.5},
        {"model_type": "mixtral", "num_experts": 4},
        {"model_type": "smollm3", "no_rope_layers": [1, 0], "num_hidden_layers": 2},
    ],
)
def test_right_config_keys_are_taken(fields: dict[str, Any]) -> None:
    model_config(ModelSpec(config=fields, tokenizer="x"), where="student")


ENCODER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_a_student_that_looks_ahead_is_refused(tokenizer: PreTrainedTokenizerBase, model_type: str) -> None:
    fields = {"model_type": model_type, **ENCODER}
    spec = StudentSpec(config=fields, tokenizer="x")
    said = told(SpecError, lambda: load_student(spec, tokenizer, seed=0))
    assert said.startswith("student: ")
    assert "is not causal: its tokens attend to later ones" in said
    causal = load_student(StudentSpec(config=fields | {"is_decoder": True}, tokenizer="x"), tokenizer, seed=0)
    assert all(parameter.grad is None for parameter in causal.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_causal_students_are_taken(tokenizer: PreTrainedTokenizerBase, dtype: str) -> None:
    for fields in (tiny.llama(), tiny.gpt2(), {**tiny.llama(), "model_type": "mistral"}):
        student = load_student(StudentSpec(config=fields, tokenizer="x", dtype=dtype), tokenizer, seed=0)
        assert student.training


def test_the_longest_text_of_a_model() -> None:
    assert max_positions(AutoConfig.for_model(**tiny.llama())) == 128
    assert max_positions(AutoConfig.for_model(**tiny.gpt2(n_positions=64))) == 64
    assert max_positions(AutoConfig.for_model("bloom")) is None
