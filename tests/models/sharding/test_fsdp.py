"""``accelerate launch`` with the shipped config files, two gloo processes: the same training as one process.

FSDP2 runs through accelerate, the trainer and torch as on GPUs, except for accelerate's refusal to shard
without one (``shards_on_cpu.py``).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from kava_core.errors import NonFiniteError, SpecError
from kava_core.models import fsdp
from kava_core.runs import checkpoint
from kava_core.runs.metrics import read_metrics
from kava_core.train.run import run
from kava_core.train.weights import ALIGNER_FILE, assert_finite_weights
from tests.support import quick_python, tiny
from tests.support.repository import ROOT

slow = pytest.mark.slow
CONFIGS = ROOT / "specs" / "accelerate"
ON_CPU = (str(ROOT / "tests" / "support" / "shards_on_cpu.py"),)
PLAIN = ("-m", "kava_core")
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


def launch(
    folder: Path, config: Path, program: tuple[str, ...], fields: dict[str, Any]
) -> subprocess.CompletedProcess[str]:
    """Train ``fields`` in two processes, into ``folder``."""
    folder.mkdir(exist_ok=True)
    (folder / "spec.yaml").write_text(json.dumps(fields | {"output": str(folder / "runs")}))
    more = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CI": "1"}
    more |= {"KAVA_CACHE": str(folder.parent / "cache"), "HF_HUB_OFFLINE": "1"}
    begin = [quick_python.executable(), "-m", "accelerate.commands.accelerate_cli", "launch"]
    options = ["--config_file", str(config), "--num_processes", "2", "--main_process_port", "0"]
    return subprocess.run(
        [*begin, *options, *program, "train", str(folder / "spec.yaml")],
        env=os.environ | more,
        capture_output=True,
        text=True,
        timeout=300,
    )


def demanding(**changes: Any) -> dict[str, Any]:
    """Tied weights, checkpointing, accumulation, a clip that bites, trained aligners, a rate of its own."""
    wide, gpt = tiny.fields()["teachers"]
    wide["align"] = {"dim_projector": "linear"}
    fields: dict[str, Any] = {
        "student": {"config": tiny.llama(tie_word_embeddings=True), "gradient_checkpointing": True},
        "teachers": [wide | {"placement": "sharded"}, gpt | {"placement": "sharded"}],
        "fuser": {"name": "attention", "learning_rate": 0.05},
        "train": {"steps": 4, "batch_size": 4, "accumulate": 2, "clip": 0.5},
        "seeds": [1],
    }
    return tiny.fields(**(fields | changes))


def run_of(folder: Path) -> Path:
    (found,) = folder.glob("runs/tiny/main-*")
    return found


def weights(run_folder: Path) -> dict[str, Tensor]:
    last = checkpoint.newest_intact(run_folder / "checkpoints")
    assert last is not None
    return load_file(last / "student" / "model.safetensors") | load_file(last / ALIGNER_FILE)


def rewind(found: Path, kept: Path) -> None:
    """Bring a finished run back to its checkpoint before the last; ``kept`` gets a copy."""
    shutil.copytree(found, kept)
    shutil.rmtree(found / "student")
    shutil.rmtree(found / "checkpoints" / "checkpoint-4")
    record = json.loads((found / "run.json").read_text())
    (found / "run.json").write_text(json.dumps(record | {"status": "running"}))


def logged(run_folder: Path) -> list[dict[str, Any]]:
    """Without the share of gradients, which a sharded student does not measure."""
    lines = read_metrics(run_folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k != "seconds" and "share/" not in k} for line in lines]


def assert_same_training(found: Path, expected: Path) -> None:
    lines, wanted = logged(found), logged(expected)
    assert len(lines) == len(wanted) > 5
    for line, reference in zip(lines, wanted, strict=True):
        assert line == pytest.approx(reference, rel=1e-4, abs=1e-6)
    state, reference = weights(found), weights(expected)
    assert state.keys() == reference.keys()
    for name, tensor in reference.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-3, atol=2e-5, msg=name)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same steps in one process with twice the batch."""
    folder = tmp_path_factory.mktemp("scale") / "one"
    fields = demanding()
    fields["train"]["batch_size"] = 8
    patch = pytest.MonkeyPatch()
    patch.setenv("KAVA_CACHE", str(folder.parent / "cache"))
    result = run(tiny.spec(folder / "runs", **fields), variant="main", seed=1)
    patch.undo()
    return result.folder


@pytest.fixture(scope="module")
def sharded(one: Path) -> Path:
    """Student and teachers sharded over two processes, through the shipped config file."""
    folder = one.parents[3] / "fsdp"
    done = launch(folder, CONFIGS / "fsdp2.yaml", ON_CPU, demanding())
    assert done.returncode == 0, done.stderr[-3000:]
    return run_of(folder)


@pytest.mark.release
@slow
def test_ddp_through_the_shipped_config_equals_one_process(one: Path) -> None:
    """With sharded teachers, where one process has them whole."""
    folder = one.parents[3] / "ddp"
    done = launch(folder, CONFIGS / "ddp.yaml", PLAIN, demanding())
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((run_of(folder) / "run.json").read_text())["world_size"] == 2
    assert_same_training(run_of(folder), one)


@slow
def test_fsdp2_through_the_shipped_config_equals_one_process(one: Path, sharded: Path) -> None:
    assert_same_training(sharded, one)


@slow
def test_a_sharded_optimizer_is_saved_in_parts_and_the_student_whole(sharded: Path) -> None:
    last = checkpoint.newest_intact(sharded / "checkpoints")
    assert last is not None
    assert len(list((last / "optimizer_0").glob("*.distcp"))) == 2
    assert not list(last.glob("pytorch_model*"))
    manifest = json.loads((last / checkpoint.MANIFEST).read_text())
    assert {"student/model.safetensors", ALIGNER_FILE, "optimizer_0/.metadata"} <= manifest.keys()


@slow
def test_the_student_of_a_sharded_run_is_a_plain_folder(one: Path, sharded: Path) -> None:
    saved = AutoModelForCausalLM.from_pretrained(sharded / "student").state_dict()
    wanted = AutoModelForCausalLM.from_pretrained(one / "student").state_dict()
    assert saved.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-3, atol=2e-5, msg=name)


@slow
def test_a_sharded_run_resumes_to_the_same_bits(sharded: Path) -> None:
    """From the checkpoint of step 2 of 4."""
    folder = sharded.parents[2]
    kept = folder.parent / "kept"
    rewind(sharded, kept)
    done = launch(folder, CONFIGS / "fsdp2.yaml", ON_CPU, demanding())
    assert done.returncode == 0, done.stderr[-3000:]
    found, expected = weights(sharded), weights(kept)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert logged(sharded) == logged(kept)


FORMS: dict[str, dict[str, Any]] = {
    "lora": {"student": {"lora": {"rank": 4}}},
    "gpt2": {
        "student": {"config": tiny.gpt2(n_embd=32, n_head=4) | dict.fromkeys(DROPOUTS, 0.0)},
        "train": {"steps": 4, "batch_size": 4},
    },
    "whole optimizer": {"train": {"steps": 4, "batch_size": 4}},
    "stream": {"fuser": {"name": "fixed"}, "train": {"steps": 4, "batch_size": 4, "stream": True}},
    "logits": {
        "teachers": [{"name": "t", "config": tiny.llama(), "tokenizer": tiny.CHARS, "placement": "sharded"}],
        "logits": {"weight": 0.5},
        "train": {"steps": 4, "batch_size": 4},
    },
}


@pytest.mark.release
@pytest.mark.parametrize("form", FORMS)
def test_other_students_and_state_dicts(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if form == "lora":
        pytest.importorskip("peft")
    config = CONFIGS / "fsdp2.yaml"
    if form == "whole optimizer":
        config = tmp_path / "full.yaml"
        text = (CONFIGS / "fsdp2.yaml").read_text()
        config.write_text(text.replace("SHARDED_STATE_DICT", "FULL_STATE_DICT"))
    done = launch(tmp_path / "two", config, ON_CPU, demanding(**FORMS[form]))
    assert done.returncode == 0, done.stderr[-3000:]
    fields = demanding(**FORMS[form])
    fields["train"]["batch_size"] = 8
    expected = run(tiny.spec(tmp_path / "one", **fields), variant="main", seed=1).folder
    found = run_of(tmp_path / "two")
    for line, reference in zip(logged(found), logged(expected), strict=True):
        assert line == pytest.approx(reference, rel=1e-4, abs=1e-6)
    saved = load_file(found / "student" / "model.safetensors")
    for name, tensor in load_file(expected / "student" / "model.safetensors").items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-3, atol=2e-5, msg=name)
    rewind(found, tmp_path / "kept")
    done = launch(tmp_path / "two", config, ON_CPU, demanding(**FORMS[form]))
    assert done.returncode == 0, done.stderr[-3000:]
    assert logged(found) == logged(tmp_path / "kept")


@pytest.mark.release
def test_bfloat16_sharded_is_near_bfloat16_in_one_process(tmp_path: Path) -> None:
    """Layers are gathered in bfloat16, so norms and embeddings are rounded as well."""
    fields = demanding(train={"steps": 4, "batch_size": 4, "precision": "bf16"})
    done = launch(tmp_path / "two", CONFIGS / "fsdp2.yaml", ON_CPU, fields)
    assert done.returncode == 0, done.stderr[-3000:]
    fields["train"]["batch_size"] = 8
    expected = run(tiny.spec(tmp_path / "one", **fields), variant="main", seed=1).folder
    for line, reference in zip(logged(run_of(tmp_path / "two")), logged(expected), strict=True):
        for name in line.keys() & {"loss", "ce", "mercator", "eval_ce", "eval_mercator"}:
            assert line[name] == pytest.approx(reference[name], rel=2e-3)


@pytest.mark.release
def test_fsdp_without_a_gpu_is_refused_not_ignored(tmp_path: Path) -> None:
    done = launch(tmp_path / "run", CONFIGS / "fsdp2.yaml", PLAIN, tiny.fields(train={"steps": 1}))
    assert "accelerate ignores FSDP without a GPU" in done.stderr
    assert "exitcode  : 2" in done.stderr


def plugin(**changes: Any) -> Any:
    return SimpleNamespace(**({"fsdp_version": 2, "cpu_ram_efficient_loading": False} | changes))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (None, "accelerate ignores FSDP without a GPU"),
        (plugin(fsdp_version=1), "fsdp_version: 2 is needed"),
        (plugin(cpu_ram_efficient_loading=True), "leaves the teachers empty"),
    ],
)
def test_what_a_config_file_must_not_ask_for(given: Any, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fsdp.WANTED, "true")
    fsdp.check_launch(plugin())
    with pytest.raises(SpecError, match=told):
        fsdp.check_launch(given)
    monkeypatch.setenv(fsdp.WANTED, "false")
    fsdp.check_launch(given)


@pytest.mark.parametrize("launched", [None, "", "no", "bf16"])
def test_the_launchers_precision_may_agree(launched: str | None) -> None:
    fsdp.check_precision(launched, "bf16")


@pytest.mark.parametrize(("launched", "precision"), [("bf16", "fp32"), ("fp16", "bf16"), ("fp8", "fp32")])
def test_the_launchers_precision_may_not_differ(launched: str, precision: str) -> None:
    with pytest.raises(
        SpecError, match=f"mixed_precision is {launched}, the spec's train.precision {precision}"
    ):
        fsdp.check_precision(launched, precision)


def test_a_skeleton_is_filled_with_what_it_was_made_from() -> None:
    """Weights that two modules share, and buffers that changed since."""
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "norm": nn.BatchNorm1d(3)})
    model["b"].weight = model["a"].weight
    model["a"].bias.requires_grad_(False)
    bones = fsdp.copy_without_weights(model)
    assert {p.device.type for p in bones.parameters()} == {"meta"}
    model["norm"].running_mean += 1
    made = fsdp.fill_with_weights(
        bones, {name: x.clone() for name, x in model.state_dict().items() if name != "b.weight"}
    )
    assert made["b"].weight is made["a"].weight
    assert not made["a"].bias.requires_grad
    for name, tensor in model.state_dict().items():
        assert torch.equal(made.state_dict()[name], tensor)


def test_saved_weights_must_be_finite() -> None:
    model = nn.Linear(2, 2)
    assert_finite_weights(model, "step 3")
    with torch.no_grad():
        model.bias[1] = torch.nan
    with pytest.raises(NonFiniteError, match="step 3: bias holds NaN"):
        assert_finite_weights(model, "step 3")
