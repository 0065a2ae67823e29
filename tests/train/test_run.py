"""Training as a user runs it: accumulation, resume, signals, NaN, run directories."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import stat
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from kava_core import shapecheck
from kava_core.build.data import make_data
from kava_core.build.distiller import make_distiller
from kava_core.build.provenance import model_facts
from kava_core.errors import KavaError, NonFiniteError, Preempted, SpecError
from kava_core.jobs.export import export_student
from kava_core.models.teacher import Teacher
from kava_core.runs import checkpoint
from kava_core.runs.folder import Folder
from kava_core.runs.metrics import read_metrics
from kava_core.specfile.sections.models import ModelSpec
from kava_core.train import run as run_module
from kava_core.train.optimizer_groups import parameter_learning_rates, split_parameter_group
from kava_core.train.run import RunResult, run
from kava_core.train.weights import ALIGNER_FILE
from tests.support import tiny
from tests.support.stops import stop


def weights(result: RunResult | Path) -> dict[str, Tensor]:
    """Student and aligners of the last checkpoint."""
    folder = result if isinstance(result, Path) else result.folder
    last = checkpoint.newest_intact(folder / "checkpoints")
    assert last is not None
    return load_file(last / "student" / "model.safetensors") | load_file(last / ALIGNER_FILE)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """The uninterrupted run that others are compared with: dropout, a second epoch, a trained aligner."""
    return run(bumpy(tmp_path_factory.mktemp("whole")), variant="main", seed=1)


def bumpy(output: Path, **changes: object) -> object:
    """A run that a careless resume would get wrong: dropout, two epochs, trained projector and head mix."""
    wide = dict(tiny.FIELDS["teachers"][0])
    wide["align"] = {"dim_projector": "linear", "head_adapter": {"name": "structured", "trainable": True}}
    return tiny.spec(
        output,
        student={"config": tiny.llama(attention_dropout=0.2)},
        teachers=[wide, tiny.FIELDS["teachers"][1]],
        train={"steps": 7, "batch_size": 12, "accumulate": 2} | changes,
    )


SIGNALS = [
    (1, signal.SIGTERM),
    pytest.param(4, signal.SIGUSR1, marks=pytest.mark.release),
    pytest.param(5, signal.SIGUSR2, marks=pytest.mark.release),
    (2, signal.SIGINT),
    (3, signal.SIGHUP),
]


@pytest.mark.parametrize(("at", "number"), SIGNALS)
def test_a_signal_saves_once_and_resuming_is_bit_exact(
    whole: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, number: signal.Signals
) -> None:
    spec = bumpy(tmp_path)
    stop(monkeypatch, at, number)
    with pytest.raises(Preempted, match=rf"stopped by {number.name} at step {at + 1}, saved") as stopped:
        run(spec, variant="main", seed=1)
    assert stopped.value.exit_code == 75
    monkeypatch.undo()
    folder = Folder.planned(spec, "main", 1)
    assert checkpoint.step_of(checkpoint.newest_intact(folder.checkpoints)) == at + 1
    result = run(spec, variant="main", seed=1)
    assert_same(weights(result), weights(whole))
    evaluations = [
        [line for line in read_metrics(r.folder / "metrics.jsonl") if "eval_ce" in line]
        for r in (result, whole)
    ]
    strip = [[{k: v for k, v in line.items() if k != "seconds"} for line in lines] for lines in evaluations]
    assert strip[0] == strip[1]


def test_a_second_interrupt_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ctrl-C twice within a step: nothing is saved, and nothing that was saved is lost."""

    class Twice(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):  # type: ignore[no-untyped-def]
            if state.global_step == 3:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)

    spec = tiny.spec(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(run_module, "ShowProgress", lambda title: Twice())
        with pytest.raises(KeyboardInterrupt):
            run(spec, variant="main", seed=0)
    folder = Folder.planned(spec, "main", 0)
    assert folder.state() == "interrupted"
    assert list(checkpoint.checkpoints_by_step(folder.checkpoints)) == [2]
    assert run(spec, variant="main", seed=0).results["steps"] == 6


def test_an_interrupt_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    stop(monkeypatch, 1, signal.SIGINT)
    with pytest.raises(Preempted):
        run(tiny.spec(tmp_path, losses=[], teachers=[]), variant="main", seed=0)
    expected = "Ctrl-C: saves and stops after this step; once more ends it at once\n"
    assert expected in capfd.readouterr().err


def test_a_hangup_that_is_ignored_stays_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under nohup."""
    stop(monkeypatch, 1, signal.SIGHUP)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        result = run(tiny.spec(tmp_path, losses=[], teachers=[]), variant="main", seed=0)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert result.results["steps"] == 6


def test_files_of_a_run_are_as_readable_as_the_umask_says(whole: RunResult, tmp_path: Path) -> None:
    """Those that safetensors writes for their owner alone among them."""
    before = os.umask(0o027)
    try:
        result = run(bumpy(tmp_path), variant="main", seed=1)
    finally:
        os.umask(before)
    files = [file for file in result.folder.rglob("*") if file.is_file()]
    assert {"attention.safetensors", "before_training.safetensors"} <= {file.name for file in files}
    assert {file.name for file in files if stat.S_IMODE(file.stat().st_mode) != 0o640} == set()


def test_random_teachers_are_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = tiny.FIELDS["teachers"][0] | {"name": "told_once"}
    pretrained = wide | {"name": "learnt", "pretrain": {"steps": 1}}
    spec = tiny.spec(tmp_path, teachers=[wide, pretrained], losses=["mse"], train={"steps": 1})
    for seed in (0, 1):
        run(spec, variant="main", seed=seed)
    lines = [line for line in capsys.readouterr().err.splitlines() if "random weights" in line]
    assert lines == ["teacher 'told_once': random weights ('config' without 'pretrain'): it knows nothing"]


def test_a_complete_run_is_skipped(whole: RunResult) -> None:
    before = {p: p.stat().st_mtime_ns for p in whole.folder.rglob("*") if p.name != "lock"}
    again = run(bumpy(whole.folder.parents[1]), variant="main", seed=1)
    assert again.results == whole.results
    assert before == {p: p.stat().st_mtime_ns for p in whole.folder.rglob("*") if p.name != "lock"}


def test_run_directory_says_what_happened(whole: RunResult) -> None:
    record = json.loads((whole.folder / "run.json").read_text())
    assert record["status"] == "complete"
    assert record["data"]["train"]["examples"] == 64
    assert len(record["data"]["train"]["sha256"]) == 64
    assert record["data"]["duplicates_across"] == 0
    assert record["versions"]["torch"] == torch.__version__
    plain = {name for name in record["results"] if "/" not in name}
    assert plain == {"ce", "perplexity", "exact_match", "passes", "mercator", "relation", "steps"}
    assert record["models"]["student"] == {"origin": "random weights"}
    assert record["plugins"]["layer_mapper ratio"] == f"kava {version('kava')}"
    lines = read_metrics(whole.folder / "metrics.jsonl")
    assert {"step", "seconds", "ce", "mercator", "relation", "grad_norm", "learning_rate"} <= set(lines[0])
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 8))
    samples = [json.loads(line) for line in (whole.folder / "samples.jsonl").read_text().splitlines()]
    assert {"prompt", "gold", "wrote", "correct"} == set(samples[0])


@pytest.mark.parametrize("terms", [{}, {"losses": [], "hidden": {}, "cross_logits": {}}])
def test_accumulation_does_not_change_the_result(tmp_path: Path, terms: dict[str, Any]) -> None:
    """Cross-entropy and all other terms are divided by the counts of the whole batch."""
    results = {}
    for size, accumulate in ((12, 1), (6, 2), (3, 4)):
        train = {"batch_size": size, "accumulate": accumulate, "steps": 3, "save_every": 3}
        results[size] = weights(run(tiny.spec(tmp_path, train=train, **terms), variant="main", seed=0))
    for name, expected in results[12].items():
        for size in (6, 3):
            torch.testing.assert_close(
                results[size][name], expected, rtol=1e-3, atol=2e-5, msg=f"{name} {size}"
            )


def test_same_seed_same_run_and_another_seed_another(tmp_path: Path) -> None:
    first, second = (weights(run(tiny.spec(tmp_path / side), variant="main", seed=4)) for side in "ab")
    other = weights(run(tiny.spec(tmp_path / "a"), variant="main", seed=5))
    assert_same(first, second)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_weight_zero_runs_no_teacher_and_equals_cross_entropy_alone(tmp_path: Path) -> None:
    off = tiny.spec(tmp_path / "off", losses=[{"name": "mercator", "weight": 0.0}])
    none = tiny.spec(tmp_path / "none", losses=[], teachers=[])
    a, b = (weights(run(spec, variant="main", seed=2)) for spec in (off, none))
    assert_same(a, b)


@pytest.fixture
def no_value_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Debug mode would stop one stage earlier, with the layer's number."""
    monkeypatch.setattr(shapecheck, "active", lambda: False)


class Poison(TrainerCallback):
    """Puts a NaN into a weight before step 4."""

    def on_step_begin(self, args, state, control, model, **_):  # type: ignore[no-untyped-def]
        if state.global_step == 3:
            model.student.lm_head.weight.data[5, 0] = torch.nan


@pytest.mark.usefixtures("no_value_checks")
def test_non_finite_loss_stops_before_the_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "ShowProgress", lambda title: Poison())
    spec = tiny.spec(tmp_path, train={"steps": 6, "save_every": 1})
    told = r"step 4: ce not finite; stopped before the update, nothing saved"
    with pytest.raises(NonFiniteError, match=told) as stopped:
        run(spec, variant="main", seed=0)
    assert stopped.value.exit_code == 4
    assert list(checkpoint.checkpoints_by_step(Folder.planned(spec, "main", 0).checkpoints)) == [2, 3]


@pytest.mark.usefixtures("no_value_checks")
def test_non_finite_weights_are_never_saved(tmp_path: Path) -> None:
    spec = tiny.spec(tmp_path, train={"learning_rate": 1e38, "steps": 6, "save_every": 1})
    with pytest.raises(
        NonFiniteError, match=r"step 1: .* holds NaN or infinity after the update; nothing saved"
    ):
        run(spec, variant="main", seed=0)
    folder = Folder.planned(spec, "main", 0)
    assert not checkpoint.checkpoints_by_step(folder.checkpoints)
    assert not folder.student.exists()


def test_two_processes_do_not_share_a_run_directory(tmp_path: Path) -> None:
    spec = tiny.spec(tmp_path)
    with (
        Folder.planned(spec, "main", 0).lock(),
        pytest.raises(KavaError, match="another process is training here"),
    ):
        run(spec, variant="main", seed=0)


def test_changed_data_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    lines = [
        json.dumps({"prompt": f"{i}+1", "reasoning": str(i + 1), "answer": str(i + 1)}) for i in range(40)
    ]
    file.write_text("\n".join(lines))
    data = {"name": "jsonl", "train": str(file), "validation": str(file)}
    spec = tiny.spec(tmp_path, losses=[], teachers=[], train={"steps": 2})
    spec = type(spec).model_validate(
        tiny.fields(losses=[], teachers=[]) | {"data": data, "output": str(tmp_path)}
    )
    folder = Folder.planned(spec, "main", 0)
    folder.path.mkdir(parents=True)
    folder.begin({"data": {"train": {"sha256": "other"}}})
    with pytest.raises(SpecError, match="the data changed since this run began"):
        run(spec, variant="main", seed=0)


@pytest.mark.parametrize("precision", ["bf16"])
def test_bf16_trains(tmp_path: Path, precision: str) -> None:
    result = run(tiny.spec(tmp_path, train={"precision": precision, "steps": 2}), variant="main", seed=0)
    assert all(torch.isfinite(t).all() for t in weights(result).values())


def test_fp16_without_cuda_is_refused(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here: fp16 works")
    with pytest.raises(SpecError, match="fp16 needs a CUDA device"):
        run(tiny.spec(tmp_path, train={"precision": "fp16"}), variant="main", seed=0)


def test_lora_run_exports_a_plain_model(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    result = run(
        tiny.spec(tmp_path, student={"lora": {"rank": 2}}, train={"steps": 2}), variant="main", seed=0
    )
    export_student(result.folder, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == model.config.vocab_size


def test_export_holds_the_trained_weights_and_the_spec(whole: RunResult, tmp_path: Path) -> None:
    export_student(whole.folder, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    trained = weights(whole)
    assert all(torch.equal(found[name], trained[name]) for name in found)
    card = (tmp_path / "out" / "README.md").read_text()
    assert '"name": "tiny"' in card
    assert "variant `main`, seed 1, 7 steps" in card
    with pytest.raises(KavaError, match="exists already"):
        export_student(whole.folder, tmp_path / "out")
    with pytest.raises(SpecError, match="not a run directory"):
        export_student(tmp_path, tmp_path / "elsewhere")


def test_teachers_are_moved_to_the_device_of_the_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They stand outside the module, so nothing else moves them."""
    moved = []
    monkeypatch.setattr(Teacher, "to", lambda self, device, _: moved.append((self.name, device)))
    run(tiny.spec(tmp_path, train={"steps": 1}), variant="main", seed=0)
    assert moved == [("wide", torch.device("cpu")), ("gpt", torch.device("cpu"))]


def test_moving_a_teacher_moves_its_model() -> None:
    spec = tiny.spec()
    teacher = make_distiller(spec, make_data(spec), seed=0).teachers[0]
    teacher.to(torch.device("meta"))
    assert {p.device.type for p in teacher.model.parameters()} == {"meta"}


def test_model_facts_hash_the_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "notes.txt").write_text("not hashed")
    expected = {"model.safetensors": hashlib.sha256(b"weights").hexdigest()}
    assert model_facts(ModelSpec(path=str(tmp_path)))["sha256"] == expected


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"student": {"config": tiny.llama(max_position_embeddings=8)}},
            "student: the longest example has 14 tokens but the model only 8 positions",
        ),
        (
            {"evaluate": {"max_new_tokens": 125}},
            "evaluate.max_new_tokens: the longest prompt and 125 new tokens are",
        ),
    ],
)
def test_texts_beyond_the_positions_are_refused(tmp_path: Path, changes: dict, told: str) -> None:
    """A rotary model would train on them without a word."""
    with pytest.raises(SpecError, match=told):
        run(tiny.spec(tmp_path, **changes), variant="main", seed=0)


def test_components_are_trained_at_their_own_rate() -> None:
    """What has a rate of its own does not decay; the rest is as before."""
    a, b, c = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = torch.optim.AdamW(
        [{"params": [a, b], "weight_decay": 0.1}, {"params": [c], "weight_decay": 0.0}], lr=1e-3
    )
    for group in list(optimizer.param_groups):
        split_parameter_group(optimizer, group, {b: 1e-5, c: 1e-4})
    found = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert found == {id(a): (1e-3, 0.1), id(b): (1e-5, 0.0), id(c): (1e-4, 0.0)}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 3


def test_own_rates_are_those_of_the_modules_that_name_one() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0].learning_rate, model[1].learning_rate = None, 1e-5
    common = dict.fromkeys(model[0].parameters(), 1e-3)
    assert parameter_learning_rates(model, 1e-3) == common | dict.fromkeys(model[1].parameters(), 1e-5)
