"""Checkpoints are complete or absent: damage, killed saves, a full disk, foreign files."""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback

from kava_core.build.data import make_data
from kava_core.errors import CheckpointError, KavaError, Preempted
from kava_core.runs import checkpoint
from kava_core.runs.checkpoint import MANIFEST, STAGING
from kava_core.runs.folder import Folder
from kava_core.runs.metrics import read_metrics
from kava_core.train import run as run_module
from kava_core.train.run import RunResult, run
from kava_core.train.weights import ALIGNER_FILE
from tests.support import tiny


def sealed(folder: Path, step: int) -> Path:
    """A checkpoint with three files, one in a subfolder."""
    staged = folder / STAGING / f"checkpoint-{step}"
    (staged / "student").mkdir(parents=True)
    (staged / "student" / "model.safetensors").write_bytes(random.Random(step).randbytes(3000))
    (staged / "optimizer.pt").write_bytes(b"optimizer" * step)
    (staged / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
    checkpoint.seal(staged, folder / staged.name)
    return folder / staged.name


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def add_pickle(folder: Path) -> None:
    (folder / "rng_state_7.pth").write_bytes(pickle.dumps({}))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (
        lambda c: os.truncate(c / "student/model.safetensors", 2999),
        r"model.safetensors: altered since",
    ),
    "a bit flipped": (lambda c: flip(c / "student/model.safetensors"), r"model.safetensors: altered since"),
    "longer": (lambda c: os.truncate(c / "optimizer.pt", 5000), r"optimizer.pt: altered since"),
    "a file missing": (lambda c: (c / "optimizer.pt").unlink(), r"optimizer.pt: missing, though"),
    "no manifest": (lambda c: (c / MANIFEST).unlink(), r"not a complete checkpoint: no manifest.json"),
    "half a manifest": (
        lambda c: os.truncate(c / MANIFEST, 100),
        r"manifest.json: unreadable: JSONDecodeError",
    ),
    "manifest of NUL": (lambda c: (c / MANIFEST).write_bytes(bytes(40)), r"manifest.json: unreadable"),
    "manifest not UTF-8": (
        lambda c: (c / MANIFEST).write_bytes(b'{"\xff": 1}'),
        r"manifest.json: unreadable",
    ),
    "manifest a list": (
        lambda c: (c / MANIFEST).write_text("[1]"),
        r"manifest.json: unreadable: AttributeError",
    ),
    "entries of text": (
        lambda c: (c / MANIFEST).write_text('{"a": "b"}'),
        r"manifest.json: unreadable: TypeError",
    ),
    "entries empty": (
        lambda c: (c / MANIFEST).write_text('{"a": {}}'),
        r"manifest.json: unreadable: KeyError",
    ),
    "manifest empty": (lambda c: (c / MANIFEST).write_text("{}"), r"manifest.json: lists no files"),
    "a pickle added": (
        add_pickle,
        r"rng_state_7.pth: not in the manifest, so not saved by kava; it is never loaded",
    ),
    "a folder only": (lambda c: (shutil.rmtree(c), c.mkdir()), r"not a complete checkpoint"),
    "a file": (lambda c: (shutil.rmtree(c), c.write_bytes(pickle.dumps({}))), r"not a complete checkpoint"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_is_named_and_the_newest_intact_one_wins(tmp_path: Path, how: str) -> None:
    damage, told = DAMAGE[how]
    paths = [sealed(tmp_path, step) for step in (2, 10, 9)]
    assert checkpoint.newest_intact(tmp_path) == paths[1]
    damage(paths[1])
    with pytest.raises(CheckpointError, match=told) as error:
        checkpoint.verify(paths[1])
    assert error.value.exit_code == 5
    assert "\n" not in str(error.value)
    assert checkpoint.newest_intact(tmp_path) == paths[2]
    chosen, found = checkpoint.recover_newest(tmp_path)
    assert chosen == paths[2]
    assert len(found) == 1
    assert found[0].endswith("; set aside as checkpoint-10.damaged-1")
    assert list(checkpoint.checkpoints_by_step(tmp_path)) == [2, 9]
    assert (tmp_path / "checkpoint-10.damaged-1").exists()


def test_the_manifest_lists_every_file_with_its_hash(tmp_path: Path) -> None:
    path = sealed(tmp_path, 3)
    files = ["optimizer.pt", "student/model.safetensors", "trainer_state.json"]
    hashes = subprocess.run(
        ["sha256sum", *files], cwd=path, capture_output=True, text=True, check=True
    ).stdout
    expected = {line.split()[1]: line.split()[0] for line in hashes.splitlines()}
    listed = json.loads((path / MANIFEST).read_text())
    assert {name: entry["sha256"] for name, entry in listed.items()} == expected
    assert listed["optimizer.pt"]["size"] == 27


def test_two_damaged_ones_of_one_step_are_both_kept(tmp_path: Path) -> None:
    for number in (1, 2):
        flip(sealed(tmp_path, 5) / "optimizer.pt")
        assert checkpoint.recover_newest(tmp_path)[0] is None
        assert (tmp_path / f"checkpoint-5.damaged-{number}").is_dir()


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    foreign = [
        "checkpoint-best",
        "checkpoint-3.txt",
        "xcheckpoint-9",
        "checkpoint-4/README.md",
        "notes/manifest.json",
    ]
    sealed(tmp_path, 4)
    for name in foreign:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    assert checkpoint.recover_newest(tmp_path) == (tmp_path / "checkpoint-4", [])
    checkpoint.keep_newest(tmp_path, 1)
    assert [name for name in foreign if not (tmp_path / name).exists()] == []


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    for step in (100, 20, 3):
        sealed(tmp_path, step)
    checkpoint.keep_newest(tmp_path, 2)
    assert list(checkpoint.checkpoints_by_step(tmp_path)) == [20, 100]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint-100", "checkpoint-20", STAGING]


def test_sealing_a_step_again_replaces_it(tmp_path: Path) -> None:
    (sealed(tmp_path, 3) / "extra.pt").write_bytes(b"old")
    checkpoint.verify(sealed(tmp_path, 3))
    assert not (tmp_path / "checkpoint-3.deleted").exists()


def test_files_are_as_readable_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = sealed(tmp_path, 1)
        os.chmod(path / "optimizer.pt", 0o600)
        checkpoint.flush(path)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in path.rglob("*") if file.is_file()}
    assert modes == {0o640}


SEAL_FOREVER = """
import sys
from itertools import count
from pathlib import Path
from kava_core.runs import checkpoint

folder = Path(sys.argv[1])
chosen, _ = checkpoint.recover_newest(folder)
first = 1 if chosen is None else checkpoint.step_of(chosen) + 1
for step in count(first):
    staged = folder / checkpoint.STAGING / f"checkpoint-{step}"
    for number in range(6):
        (staged / f"part-{number}").mkdir(parents=True)
        (staged / f"part-{number}" / "weights.safetensors").write_bytes(bytes([step % 256]) * 300_000)
    checkpoint.seal(staged, folder / staged.name)
    print(step, flush=True)
    checkpoint.keep_newest(folder, 1)
"""


def test_kill_9_inside_a_save_leaves_only_complete_checkpoints(tmp_path: Path) -> None:
    """Keeping one checkpoint only: the hardest case. Killed at 20 random points of a loop that only saves."""
    draw, inside = random.Random(0), 0
    for _ in range(20):
        process = subprocess.Popen(
            [sys.executable, "-c", SEAL_FOREVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(draw.uniform(0, 0.1))
        process.kill()
        announced = [int(line) for line in process.stdout.read().split()]
        process.wait()
        inside += any((tmp_path / STAGING).glob("*/*")) or any(tmp_path.glob("*.deleted"))
        found = checkpoint.checkpoints_by_step(tmp_path)
        assert found
        assert max(found) >= max(announced, default=0)
        assert [checkpoint.find_fault(path) for path in found.values()] == [None] * len(found)
    assert inside >= 5, "the kills missed the saves: nothing was tested"
    checkpoint.recover_newest(tmp_path)
    assert all(checkpoint.PATTERN.fullmatch(entry.name) for entry in tmp_path.iterdir())


# in a run


def weights(result: RunResult) -> dict[str, Tensor]:
    last = checkpoint.newest_intact(result.folder / "checkpoints")
    assert last is not None
    return load_file(last / "student" / "model.safetensors") | load_file(last / ALIGNER_FILE)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


class At(TrainerCallback):
    """Does something before a step."""

    def __init__(self, step: int, act: Callable[[], object]) -> None:
        self.step, self.act = step, act

    def on_step_begin(self, args, state, control, **_):  # type: ignore[no-untyped-def]
        if state.global_step == self.step - 1:
            self.act()


class Stop(Exception):
    """Ends a run in the middle, as a crash would."""


def crash() -> None:
    raise Stop


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return run(tiny.spec(tmp_path_factory.mktemp("whole")), variant="main", seed=0)


@pytest.fixture
def crashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    """A run that crashed in step 6, with checkpoints at 2 and 4."""
    spec = tiny.spec(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(run_module, "ShowProgress", lambda title: At(6, crash))
        with pytest.raises(Stop):
            run(spec, variant="main", seed=0)
    folder = Folder.planned(spec, "main", 0)
    assert list(checkpoint.checkpoints_by_step(folder.checkpoints)) == [2, 4]
    return folder


def test_a_damaged_newest_checkpoint_costs_its_steps_and_nothing_else(
    whole: RunResult, crashed: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(crashed.checkpoints / "checkpoint-4" / "optimizer.pt")
    result = run(crashed.spec, variant="main", seed=0)
    assert_same(weights(result), weights(whole))
    assert "optimizer.pt: altered since it was saved" in capsys.readouterr().err
    names = sorted(entry.name for entry in crashed.checkpoints.iterdir())
    assert names == ["checkpoint-4", "checkpoint-4.damaged-1", "checkpoint-6"]


def test_only_damaged_checkpoints_begin_anew(whole: RunResult, crashed: Folder) -> None:
    for path in checkpoint.checkpoints_by_step(crashed.checkpoints).values():
        flip(path / "trainer_state.json")
    assert_same(weights(run(crashed.spec, variant="main", seed=0)), weights(whole))


def test_a_pickle_offered_as_checkpoint_is_not_opened(
    whole: RunResult, crashed: Folder, tmp_path: Path
) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "executed"),)

    offered = crashed.checkpoints / "checkpoint-5"
    shutil.copytree(crashed.checkpoints / "checkpoint-4", offered)
    for name in ("optimizer.pt", "rng_state.pth", "scheduler.pt"):
        (offered / name).write_bytes(pickle.dumps(Evil()))
    (offered / MANIFEST).unlink()
    (crashed.checkpoints / "checkpoint-4" / "scaler.pt").write_bytes(pickle.dumps(Evil()))
    assert_same(weights(run(crashed.spec, variant="main", seed=0)), weights(whole))
    assert not (tmp_path / "executed").exists()


def test_what_a_killed_save_left_in_staging_is_not_taken_over(whole: RunResult, crashed: Folder) -> None:
    left = crashed.checkpoints / STAGING / "checkpoint-6"
    left.mkdir(parents=True)
    (left / "rng_state_1.pth").write_bytes(b"half of an earlier save")
    assert_same(weights(run(crashed.spec, variant="main", seed=0)), weights(whole))
    assert not (crashed.checkpoints / STAGING).exists()
    assert not (crashed.checkpoints / "checkpoint-6" / "rng_state_1.pth").exists()


def test_a_metrics_line_cut_off_by_a_kill_is_written_again(whole: RunResult, crashed: Folder) -> None:
    with crashed.metrics.open("a") as stream:
        stream.write('{"step": 5, "lo')
    run(crashed.spec, variant="main", seed=0)
    found, expected = (read_metrics(path) for path in (crashed.metrics, whole.folder / "metrics.jsonl"))
    assert [line | {"seconds": 0} for line in found] == [line | {"seconds": 0} for line in expected]
    assert len(expected) == 8


def test_a_signal_while_the_data_are_made_saves_after_one_step(
    whole: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tiny.spec(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(
            run_module, "make_data", lambda *spec: (signal.raise_signal(signal.SIGUSR2), make_data(*spec))[1]
        )
        with pytest.raises(Preempted, match="stopped by SIGUSR2 at step 1, saved"):
            run(spec, variant="main", seed=0)
    assert Folder.planned(spec, "main", 0).record()["status"] == "stopped"
    assert_same(weights(run(spec, variant="main", seed=0)), weights(whole))


@contextmanager
def small_files() -> Iterator[Callable[[int], None]]:
    """A function that lowers the largest file this process may write; lifted afterwards."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("file", ["student/config.json", "student/model.safetensors", "optimizer.pt"])
def test_a_full_disk_is_explained_and_costs_nothing(
    whole: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """The size limit is just below the file that must not fit; smaller files before it do."""
    spec = tiny.spec(tmp_path, train={"log_every": 100})
    size = (whole.folder / "checkpoints" / "checkpoint-4" / file).stat().st_size
    with small_files() as limit, monkeypatch.context() as patched:
        patched.setattr(run_module, "ShowProgress", lambda title: At(4, lambda: limit(size - 1)))
        with pytest.raises(
            KavaError, match=r"checkpoint-4: cannot be written: .*Is the disk full\?"
        ) as error:
            run(spec, variant="main", seed=0)
    assert "\n" not in str(error.value)
    folder = Folder.planned(spec, "main", 0)
    assert sorted(entry.name for entry in folder.checkpoints.iterdir()) == ["checkpoint-2"]
    checkpoint.verify(folder.checkpoints / "checkpoint-2")
    assert_same(weights(run(spec, variant="main", seed=0)), weights(whole))


class AtEnd(TrainerCallback):
    """Does something after the last step, before the student is saved."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act = act

    def on_train_end(self, args, state, control, **_):  # type: ignore[no-untyped-def]
        self.act()


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_disk_that_is_full_at_the_final_student_is_explained(
    whole: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """And the same command saves it later, without training anything again."""
    spec = tiny.spec(tmp_path)
    size = (whole.folder / "student" / file).stat().st_size
    with small_files() as limit, monkeypatch.context() as patched:
        patched.setattr(run_module, "ShowProgress", lambda title: AtEnd(lambda: limit(size - 1)))
        with pytest.raises(KavaError, match=r"student: cannot be written: .*Is the disk full\?$") as error:
            run(spec, variant="main", seed=0)
    assert "\n" not in str(error.value)
    folder = Folder.planned(spec, "main", 0)
    assert not folder.student.exists()
    assert not folder.student.with_name("student.staging").exists()
    metrics = folder.metrics.read_bytes()
    assert_same(weights(run(spec, variant="main", seed=0)), weights(whole))
    assert folder.metrics.read_bytes() == metrics


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_pickle_with_a_valid_manifest_is_not_run(crashed: Folder, tmp_path: Path, name: str) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "executed"),)

    newest = crashed.checkpoints / "checkpoint-4"
    (newest / name).write_bytes(pickle.dumps(Evil()))
    (newest / MANIFEST).unlink()
    staged = crashed.checkpoints / "renamed"
    newest.rename(staged)
    checkpoint.seal(staged, newest)
    with pytest.raises(CheckpointError) as told:
        run(crashed.spec, variant="main", seed=0)
    assert str(told.value) == (
        f"{newest}: a state of the optimizer, its schedule or the random numbers cannot be read "
        "(UnpicklingError): the file is damaged or was not saved by kava; none of it was run"
    )
    assert not (tmp_path / "executed").exists()
