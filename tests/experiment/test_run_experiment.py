"""``kava experiment`` as a user runs it: missing runs, failures, signals, declarations."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from kava_core.errors import CheckpointError, KavaError, Preempted, SpecError
from kava_core.experiment.compared_value import compared_value, evaluation_interval, spent_to_target
from kava_core.experiment.experiment_progress import ExperimentProgress, last_logged_step
from kava_core.experiment.load_experiment import LoadedRun, load_experiment
from kava_core.experiment.recorded_plan import read_plan, record_plan
from kava_core.experiment.run_processes import run_processes
from kava_core.runs.folder import Folder
from kava_core.runs.planned import planned_runs
from kava_core.specfile.sections.compare import CompareSpec
from tests.support import quick_python, tiny

RECORD = {
    "name": "x",
    "spec_digest": "0",
    "data": {},
    "versions": {},
    "world_size": 1,
    "results": {"steps": 1, "exact_match": 0.5},
}

FAKE = """\
import json, os, signal, sys, time
from pathlib import Path
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
name, seed = given["--variant"], int(given["--seed"])
folder = next(Path(os.environ["RUNS"]).glob(f"{name}-*-s{seed}"))
Path(os.environ["RUNS"], f"began-{name}-{seed}").write_text(os.environ.get("OMP_NUM_THREADS", ""))
print("some words")
if name == "bad":
    sys.exit("the last word")
if name == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if name == "preempted":
    sys.exit(75)
if name == "elsewhere":
    sys.exit(0)
def stop(*_):
    (folder / "stopped").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
if name == "slow" and not (folder / "stopped").exists():
    Path(os.environ["RUNS"], "ready").touch()
    time.sleep(60)
record = json.loads(os.environ["RECORD"]) | {"variant": name, "seed": seed, "status": "complete"}
(folder / "run.json").write_text(json.dumps(record))
"""


class Silent(ExperimentProgress):
    """Keeps what would be shown."""

    def __init__(self) -> None:
        super().__init__("x")
        self.lines: list[str] = []

    def _print_line(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Conduct runs whose trainer is a script of a few lines."""
    script = tmp_path / "fake.py"
    script.write_text(textwrap.dedent(FAKE))
    monkeypatch.setenv("RUNS", str(tmp_path / "runs" / "tiny"))
    monkeypatch.setenv("RECORD", json.dumps(RECORD))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def go(*variants: str, seeds: tuple[int, ...] = (0, 1), jobs: int = 2) -> tuple[list[Folder], Silent]:
        progress = Silent()
        spec = tiny.spec(tmp_path / "runs", seeds=seeds)
        runs = planned_runs(dict.fromkeys(variants, spec))
        return run_processes([sys.executable, str(script)], runs, progress, jobs=jobs), progress

    return go


def test_all_variants_of_a_seed_come_together() -> None:
    spec = tiny.spec(seeds=(4, 2))
    assert [run.label for run in planned_runs({"b": spec, "a": spec})] == [
        "b seed 4",
        "a seed 4",
        "b seed 2",
        "a seed 2",
    ]


def test_what_is_complete_is_not_run_again(fake: Any, tmp_path: Path) -> None:
    assert fake("a", "b")[0] == []
    began = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs/tiny").glob("began-*")}
    failed, progress = fake("a", "b", "c")
    assert (failed, progress.complete) == ([], 6)
    assert progress.lines[0] == "x: 4 of 6 runs are complete"
    assert len(began) == 4
    assert began == {file: file.stat().st_mtime_ns for file in began}


def test_threads_are_shared_among_jobs(fake: Any, tmp_path: Path) -> None:
    fake("a", seeds=(0,), jobs=1)
    assert (tmp_path / "runs/tiny/began-a-0").read_text() == str(os.cpu_count())


def test_a_failure_stops_nothing_and_is_written_down(fake: Any) -> None:
    failed, progress = fake("bad", "a", "killed", seeds=(0,))
    assert sorted(run.variant for run in failed) == ["bad", "killed"]
    by_name = {run.variant: run.failure() for run in failed}
    assert by_name["bad"]["exit_code"] == 1
    assert by_name["bad"]["error"] == "exit code 1; its last words: the last word"
    assert by_name["killed"]["error"].startswith("killed by SIGKILL")
    assert failed[0].log.read_text().startswith("some words")
    assert any("failed: exit code 1" in line for line in progress.lines)


def test_a_signal_is_passed_on_and_the_rest_can_go_on(fake: Any, tmp_path: Path) -> None:
    ready = tmp_path / "runs" / "tiny" / "ready"
    watcher = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os, signal, sys, time\n"
            "from pathlib import Path\n"
            "while not Path(sys.argv[1]).exists(): time.sleep(0.02)\n"
            "os.kill(int(sys.argv[2]), signal.SIGTERM)\n",
            str(ready),
            str(os.getpid()),
        ]
    )
    before = signal.getsignal(signal.SIGTERM)
    begin = time.monotonic()
    with pytest.raises(Preempted, match="stopped by SIGTERM; run the same command again"):
        fake("slow", seeds=(0, 1, 2), jobs=1)
    watcher.wait()
    assert time.monotonic() - begin < 30
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (tmp_path / "runs/tiny/began-slow-1").exists()
    for folder in (tmp_path / "runs/tiny").glob("slow-*"):
        (folder / "stopped").touch()
    assert fake("slow", seeds=(0,))[0] == []


def test_a_run_that_was_stopped_by_another_is_no_success(fake: Any) -> None:
    with pytest.raises(Preempted, match="preempted seed 0 was stopped; run the same command again"):
        fake("preempted", "a", seeds=(0,))


def test_a_run_that_ended_elsewhere_has_failed(fake: Any) -> None:
    """As when the spec was edited meanwhile: its folder has another name then."""
    (failed,), _ = fake("elsewhere", seeds=(0,))
    assert failed.failure()["error"].startswith("it ended well, but not this run")


def test_an_old_failure_is_not_told_again(fake: Any, tmp_path: Path) -> None:
    (failed,), _ = fake("bad", seeds=(0,))
    failed.note_failure(4, "an older reason")
    (failed,), _ = fake("bad", seeds=(0,))
    assert failed.failure()["exit_code"] == 1


def test_no_process_is_left_behind(fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: ExperimentProgress, active: Any) -> None:
        if (tmp_path / "runs" / "tiny" / "ready").exists():
            raise BrokenPipeError("nobody reads")

    monkeypatch.setattr(ExperimentProgress, "update_bars", broken)
    with pytest.raises(BrokenPipeError):
        fake("slow", seeds=(0,))
    (folder,) = (tmp_path / "runs" / "tiny").glob("slow-*")
    assert (folder / "stopped").exists()


def test_states_of_a_run(tmp_path: Path) -> None:
    folder = Folder.planned(tiny.spec(tmp_path), "main", 0)
    assert folder.state() == "missing"
    with folder.lock():
        assert folder.state() == "running"
    facts = {name: RECORD[name] for name in ("data", "versions", "world_size")}
    folder.write_record({**facts, "status": "running"})
    assert folder.state() == "interrupted"
    folder.stop()
    assert folder.state() == "stopped"
    folder.note_failure(4, "ce not finite\nand more")
    assert folder.state() == "failed"
    assert folder.failure()["error"] == "ce not finite"
    folder.finish(RECORD["results"], {})
    assert folder.state() == "complete"


def test_looking_does_not_keep_a_run_from_starting(tmp_path: Path) -> None:
    """One that looks holds the lock for a moment; a run tries again."""
    folder = Folder.planned(tiny.spec(tmp_path), "main", 0)
    folder.path.mkdir(parents=True)
    code = (
        "import fcntl, sys, time\n"
        "s = open(sys.argv[1], 'w'); fcntl.flock(s, fcntl.LOCK_EX)\n"
        "print('held', flush=True); time.sleep(float(sys.argv[2]))\n"
    )
    for seconds, gets_it in ((0.06, True), (5.0, False)):
        other = subprocess.Popen(
            [sys.executable, "-c", code, str(folder.lock_file), str(seconds)], stdout=subprocess.PIPE
        )
        assert other.stdout is not None
        other.stdout.readline()
        if gets_it:
            with folder.lock():
                pass
        else:
            with pytest.raises(KavaError, match="another process is training here"), folder.lock():
                pass
        other.kill()
        other.wait()


def runs_of(folder: Path, *variants: str) -> list[Folder]:
    return planned_runs(dict.fromkeys(variants, tiny.spec(folder, seeds=(0, 1))))


def complete(run: Folder, **results: float) -> None:
    run.path.mkdir(parents=True, exist_ok=True)
    record = RECORD | {"variant": run.variant, "seed": run.seed, "status": "complete"}
    record |= {"results": RECORD["results"] | results}
    run.record_file.write_text(json.dumps(record))


def test_comparisons_changed_on_the_way_are_kept(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, "a", "b")
    folder = runs[0].path.parent
    first, second = CompareSpec(pairs=[("a", "b")]), CompareSpec(pairs=[("a", "b")], metric="ce")
    record_plan(folder, first, "a", runs)
    complete(runs[0])
    record_plan(folder, first, "a", runs)
    assert read_plan(folder)["earlier"] == []
    record_plan(folder, second, "a", runs)
    (earlier,) = read_plan(folder)["earlier"]
    assert (earlier["complete"], earlier["compare"]["metric"]) == (1, "exact_match")
    assert load_experiment(folder).compare == second
    record_plan(folder, second, "a", runs[:3])
    later = read_plan(folder)["earlier"][1]
    assert (later["complete"], len(later["runs"])) == (1, 4)
    (folder / "experiment.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"experiment\.json: unreadable"):
        load_experiment(folder)


def test_planned_runs_are_gathered_though_they_are_missing(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, "a", "b")
    folder = runs[0].path.parent
    record_plan(folder, CompareSpec(), "a", runs)
    complete(runs[0])
    found = load_experiment(folder)
    assert [run.state for run in found.runs] == ["complete", "missing", "missing", "missing"]
    assert (found.variants, found.seeds, found.count_runs("missing")) == (["a", "b"], [0, 1], 3)


def test_a_folder_without_a_declaration_is_read_too(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, "a", "b")
    folder = runs[0].path.parent
    with pytest.raises(SpecError, match="no such folder"):
        load_experiment(folder)
    folder.mkdir()
    with pytest.raises(SpecError, match="holds no runs"):
        load_experiment(folder)
    for run in runs:
        complete(run)
    assert len(load_experiment(folder).runs) == 4
    record = json.loads(runs[0].record_file.read_text()) | {"spec_digest": "1"}
    runs[0].record_file.write_text(json.dumps(record))
    with pytest.raises(SpecError, match="variant 'a' has runs of two specs"):
        load_experiment(folder)


@pytest.mark.parametrize(
    ("curve", "expected"),
    [([0.1, 0.95, 0.9], 200), ([0.1, 0.2, 0.3], 400), ([0.96, 0.2, 0.3], 100), ([0.95], 100), ([0.1], 200)],
)
def test_steps_to_a_target(tmp_path: Path, curve: list[float], expected: int) -> None:
    """A run that never gets there counts as one interval more than it had."""
    lines = [{"step": 100 * n, "eval_ce": 1.0, "eval_exact_match": x} for n, x in enumerate(curve, 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = LoadedRun("a", 0, Folder(tmp_path), "complete", {"results": {"steps": 300}})
    compare = CompareSpec(metric="steps_to_target", target=0.95)
    found = spent_to_target(run, compare)
    assert found == compared_value(run, compare)
    assert found.value == expected
    assert found.censored_at == (None if max(curve) >= 0.95 else 100.0 * len(curve))
    assert evaluation_interval(run, compare) == 100


def test_operations_to_a_target(tmp_path: Path) -> None:
    """A store for 40, then 3 a step: 340 at step 100, 640 at the last; 300 more where it was not reached."""
    lines = [{"step": 100 * n, "eval_ce": 1.0, "eval_exact_match": x} for n, x in enumerate([0.1, 0.9], 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    compute = {"flops": 640.0, "flops_of": {"student": 600.0, "store": 40.0}}
    record = {"results": {"steps": 200}, "compute": compute, "store": "stores/0"}
    run = LoadedRun("a", 0, Folder(tmp_path), "complete", record)

    def spent(target: float, horizon: float = math.inf) -> float:
        compare = CompareSpec(metric="flops_to_target", target=target)
        assert evaluation_interval(run, compare) == 300
        return compared_value(run, compare, horizon).value

    assert (spent(0.1), spent(0.9), spent(1.0)) == (340, 640, 940)
    assert spent(0.9, horizon=500.0) == 800
    untold = LoadedRun("a", 0, Folder(tmp_path), "complete", {"results": {"steps": 200}})
    with pytest.raises(KavaError, match="does not say how many operations"):
        compared_value(untold, CompareSpec(metric="flops_to_target", target=0.9))


def test_the_newest_step_of_a_run_at_work(tmp_path: Path) -> None:
    (run,) = planned_runs({"a": tiny.spec(tmp_path)})
    assert last_logged_step(run) == 0
    run.path.mkdir(parents=True)
    run.metrics.write_text('{"step": 3}\n{"step": 6, "x": "' + "y" * 70_000 + '"}\n{"st')
    assert last_logged_step(run) == 0  # a line longer than what is looked at
    run.metrics.write_text('{"step": 3}\n{"step": 6}\n{"st')
    assert last_logged_step(run) == 6


def test_from_a_spec_to_a_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real processes: three variants, of which one diverges; then once more, when only that one is left."""
    fields = tiny.fields(
        name="small",
        seeds=[0],
        train={"steps": 2, "batch_size": 4},
        variants={"kv": {}, "wild": {"train.learning_rate": 1e30, "train.clip": 1e30}},
        compare={"metric": "ce", "controls": ["no_kv"], "pairs": [["kv", "wild"]]},
    )
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(fields))))
    command = [quick_python.executable(), "-m", "kava_core", "experiment", "s.yaml", "--jobs", "2"]
    for _ in range(2):
        ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
        assert ended.returncode == 1, ended.stderr
        said = " ".join(ended.stdout.split())
        assert "kv − no_kv:" in said
        assert "1 shared seed; budgets student tokens ×1, teacher tokens of one alone" in said
        assert "wild seed 0 failed: step" in ended.stderr
        assert "stopped before the update" in ended.stderr
    assert "2 of 3 runs are complete" in ended.stderr
    (failed,) = (tmp_path / "runs" / "small").glob("wild-*")
    assert json.loads(Folder(failed).failure_file.read_text())["exit_code"] == 4
