"""``kava train``, ``plan`` and ``export`` as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kava_core.train.run import RunResult
from kava_core.train.summary import plot_curves, results_table
from tests.support import quick_python, tiny

VARIANTS = {"cross-entropy": {"losses": []}, "kv": {}}


def kava(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    settings = {"COLUMNS": "160"} | environment
    command = [quick_python.executable(), "-m", "kava_core", *words]
    return subprocess.run(
        command, cwd=cwd, env=os.environ | settings, text=True, capture_output=True, timeout=300
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A folder with a spec of two variants and two seeds, trained."""
    folder = tmp_path_factory.mktemp("trained")
    fields = tiny.fields(variants=VARIANTS, seeds=[0, 1], train={"steps": 4})
    (folder / "spec.yaml").write_text(json.dumps(fields))
    return folder, kava("train", "spec.yaml", cwd=folder)


def test_train_ends_with_table_and_plot(trained: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = trained
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("│")]
    assert [row.split("│")[1].strip() for row in rows] == ["cross-entropy"] * 3 + ["kv"] * 3
    assert [row.split("│")[2].strip() for row in rows] == ["0", "1", "mean of 2"] * 2
    assert (folder / "runs/tiny/curves.png").stat().st_size > 10_000
    assert "Traceback" not in done.stderr
    assert "step 4/4" in done.stderr


def test_train_again_skips_everything(trained: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, first = trained
    again = kava("train", "spec.yaml", cwd=folder)
    assert again.returncode == 0
    assert again.stdout == first.stdout
    runs = {line.removesuffix(": already complete, nothing trained") for line in again.stderr.splitlines()}
    assert runs == {str(path.relative_to(folder)) for path in (folder / "runs/tiny").glob("*-s[01]")}
    assert "already complete" not in first.stderr


def test_export_loads_in_plain_transformers(trained: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    """In a process where importing kava fails."""
    folder, _ = trained
    run = next((folder / "runs/tiny").glob("kv-*-s0"))
    done = kava("export", str(run), "out", cwd=folder)
    assert done.returncode == 0, done.stderr
    script = (
        "import sys; sys.modules['kava_core'] = sys.modules['kava_plugins'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "m, t = AutoModelForCausalLM.from_pretrained('out'), AutoTokenizer.from_pretrained('out')\n"
        "i = t('7+3*2?', return_tensors='pt')\n"
        "print(m.generate(**i, max_new_tokens=3).shape[1] - i['input_ids'].shape[1])"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, text=True, capture_output=True, timeout=300
    )
    assert loaded.returncode == 0, loaded.stderr
    assert 1 <= int(loaded.stdout) <= 3


def test_plan_shows_every_stage_without_loading(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(json.dumps(tiny.fields()))
    done = kava(
        "plan", "spec.yaml", "train.batch_size=4", "--time", "20", "--teacher-time", "30", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "│" in line
    ]
    shapes = [row[1:] for row in rows if row[0] == "wide" and row[2:3] == ["keys"]]
    assert shapes[0] == ["captured", "keys", "4 2 4 30 16"]
    assert shapes[-1][2] == "4 2 2 20 8"
    assert ["train.batch_size", "4", "override"] in rows
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("train", "absent.yaml"), 2, "absent.yaml: no such file"),
        (("export", ".", "out"), 2, ".: not a run directory (no run.json)"),
        (
            ("train", "spec.yaml", "student.config.model_type=lama"),
            2,
            "student: config.model_type: transformers knows no 'lama'; did you mean 'llama'?",
        ),
        (("train", "spec.yaml", "train.precision=fp16"), 2, "train.precision: fp16 needs a CUDA device"),
    ],
)
def test_errors_are_one_line(tmp_path: Path, words: tuple[str, ...], code: int, told: str) -> None:
    (tmp_path / "spec.yaml").write_text(json.dumps(tiny.fields(losses=[], teachers=[])))
    done = kava(*words, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert done.stderr.count("\n") == 1
    assert told in done.stderr


def test_a_missing_metric_is_not_a_zero(tmp_path: Path) -> None:
    results = [RunResult("a", 0, tmp_path, {"ce": 1.0, "x": 2.0}), RunResult("a", 1, tmp_path, {"ce": 3.0})]
    columns = {column.header: list(column.cells) for column in results_table(results).columns}
    assert columns["ce"] == ["1", "3", "2"]
    assert columns["x"] == ["2", "–", "–"]


def test_plot_draws_every_seed(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = []
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        folder.mkdir()
        lines = [
            {"step": s, "eval_ce": 1 / (s + 1), "eval_exact_match": s / 4, "eval_relation": 0.1}
            for s in range(3)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        results.append(RunResult("kv", seed, folder, {}))
    assert plot_curves(results, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
