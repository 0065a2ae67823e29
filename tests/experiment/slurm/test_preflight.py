"""What ``kava launch`` looks at before anything is queued, and what it refuses."""

from __future__ import annotations

import fcntl
import json
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from kava_core.cli.app import main
from kava_core.errors import KavaError, SpecError
from kava_core.experiment.slurm import disk, local_files
from kava_core.experiment.slurm.launch import launch_array
from kava_core.experiment.slurm.preflight import Check, Preflight, device_faults
from kava_core.experiment.slurm.resources import Resources
from kava_core.experiment.slurm.run_size import estimate_size
from kava_core.experiment.slurm.status import runs_of_spec
from kava_core.runs.planned import planned_runs
from kava_core.train.run import run
from tests.experiment.slurm.fake_slurm import Slurm
from tests.support import tiny

CPU = Resources(gpus=0)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    """A fake scheduler that this process sees, in an empty working folder."""
    made = Slurm(tmp_path / "slurm")
    for name, value in made.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return made


def write_spec(**changes: Any) -> Path:
    """A spec without teachers: planning it takes less."""
    plain = {"teachers": [], "losses": [], "variants": {"a": {}, "b": {"train.learning_rate": 0.1}}}
    Path("spec.yaml").write_text(json.dumps(tiny.fields(**plain | changes)))
    return Path("spec.yaml")


def sent(file: Path, resources: Resources = CPU, **more: Any) -> list[str]:
    """What launching says."""
    lines: list[str] = []
    launch_array(file, (), resources, lines.append, **more)
    return lines


def refused(file: Path, resources: Resources = CPU, **more: Any) -> list[str]:
    """The checks that fail; nothing may be queued."""
    lines: list[str] = []
    with pytest.raises(SpecError, match="nothing submitted"):
        launch_array(file, (), resources, lines.append, **more)
    return [line for line in lines if "FAILED" in line]


def checks_of(spec: Any, resources: Resources = CPU, **more: Any) -> dict[str, Check]:
    return {check.name: check for check in Preflight(planned_runs({"main": spec}), resources, "", **more)}


def test_every_check_is_a_line_and_the_job_is_sent(slurm: Slurm) -> None:
    *checks, last = sent(write_spec(seeds=[0, 1]), gpu_memory=1.0)
    assert [line.split()[:2] for line in checks] == [
        [name, "ok"] for name in ("write", "data", "models", "gpus", "disk", "memory", "sbatch")
    ]
    assert last.startswith("job 100: 4 of 4 runs; ")
    assert len(slurm.jobs()) == 4
    assert slurm.calls("sbatch") == [["--test-only"], ["--parsable", "array.sh"]]


def test_the_mapping_tells_every_run_and_seeds_stay_together(slurm: Slurm) -> None:
    sent(write_spec(seeds=[0, 1]))
    (mapping,) = Path("runs/tiny/slurm").glob("*/array.jsonl")
    rows = [json.loads(line) for line in mapping.read_text().splitlines()]
    assert [(row["index"], row["variant"], row["seed"]) for row in rows] == [
        (0, "a", 0),
        (1, "b", 0),
        (2, "a", 1),
        (3, "b", 1),
    ]
    assert all(row["folder"].startswith(f"runs/tiny/{row['variant']}-") for row in rows)
    assert (mapping.parent / "spec.yaml").read_text() == Path("spec.yaml").read_text()


def test_what_is_queued_is_not_sent_again(slurm: Slurm) -> None:
    file = write_spec()
    sent(file)
    with pytest.raises(SpecError, match=r"a seed 0 \(PENDING 100_0\), b seed 0 \(PENDING 100_1\)"):
        sent(file)
    assert len(slurm.jobs()) == 2
    for element in slurm.jobs():
        (slurm.home / "jobs" / f"{element}.json").unlink()
    assert sent(file)[-1].startswith("job 101")


def test_what_is_at_work_on_this_machine_is_not_sent(slurm: Slurm) -> None:
    file = write_spec()
    folder = runs_of_spec(file, ())[1].path
    folder.mkdir(parents=True)
    with (folder / "lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(SpecError, match=r"already: b seed 0 \(at work\)"):
            sent(file)
    assert slurm.jobs() == {}


def test_other_runs_of_the_same_name_may_be_queued(slurm: Slurm) -> None:
    sent(write_spec())
    sent(write_spec(train={"steps": 9}))
    assert len(slurm.jobs()) == 4


def test_without_an_answer_of_squeue_nothing_is_sent_twice(slurm: Slurm) -> None:
    file = write_spec()
    sent(file)
    (slurm.home / "squeue-is-down").touch()
    with pytest.raises(KavaError, match="squeue: slurm_load_jobs error"):
        sent(file)


def test_a_dry_run_prints_the_script_and_touches_nothing(slurm: Slurm) -> None:
    (text,) = sent(write_spec(), dry_run=True)
    assert text.startswith("#!/usr/bin/env bash\n#SBATCH --job-name=kava-tiny-")
    assert {path.name for path in Path().iterdir()} == {"slurm", "spec.yaml"}
    assert slurm.calls("sbatch") == []


def test_what_sbatch_refuses_is_not_sent(slurm: Slurm) -> None:
    (line,) = refused(write_spec(), Resources(gpus=0, partition="nowhere"))
    assert line.split(maxsplit=2)[0] == "sbatch"
    assert line.endswith("Invalid partition name specified")
    assert slurm.jobs() == {}
    assert not list(Path("runs").rglob("array.*"))


def test_the_command_exits_with_2(slurm: Slurm, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["launch", str(write_spec()), "--gpus", "0", "--partition", "nowhere"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "1 check failed; nothing submitted\n"


def test_without_slurm_that_is_what_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    (line,) = refused(write_spec())
    assert line == "sbatch     FAILED sbatch: not found; is SLURM on this machine?"


def test_all_that_is_wrong_is_said_at_once(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(1000))
    file = write_spec(train={"precision": "fp16"})
    fields = json.loads(file.read_text())
    fields["data"] = {"name": "jsonl", "train": "absent.jsonl", "validation": "b.jsonl"}
    file.write_text(json.dumps(fields))
    failed = {line.split()[0]: line for line in refused(file, gpu_memory=0.001)}
    assert set(failed) == {"data", "gpus", "disk", "memory"}
    assert "absent.jsonl" in failed["data"]
    assert failed["gpus"].endswith("train.precision: fp16 needs a GPU")
    assert "1000 B free, checkpoints of 2 runs need" in failed["disk"]
    assert "of 0.001 GiB" in failed["memory"]


def test_a_folder_that_cannot_be_written(slurm: Slurm) -> None:
    Path("runs").write_text("a file")
    failed = refused(write_spec())
    assert [line.split()[0] for line in failed] == ["write", "disk"]
    assert failed[0] == "write      FAILED runs/tiny: cannot be written: Not a directory"


def test_a_run_begun_by_other_processes_is_refused(tmp_path: Path) -> None:
    spec = tiny.spec(tmp_path, teachers=[], losses=[])
    (begun,) = planned_runs({"main": spec})
    begun.path.mkdir(parents=True)
    record = dict.fromkeys(("name", "variant", "seed", "spec_digest", "status", "data", "versions"), "x")
    begun.record_file.write_text(json.dumps(record | {"world_size": 2}))
    found = list(Preflight([begun], CPU, "")._check_devices().faults)
    assert found == ["main seed 0 was begun by 2 processes, not 1"]
    assert Preflight([begun], Resources(gpus=2), "")._check_devices().faults == []


def test_devices_that_the_job_would_not_have() -> None:
    wide, gpt = tiny.fields()["teachers"]
    spec = tiny.spec(teachers=[wide | {"placement": "cuda:1"}, gpt | {"attention": "flash_attention_2"}])
    one = list(device_faults(spec, Resources(gpus=1)))
    assert one == ["teacher wide: placement cuda:1 needs --gpus 2"]
    assert list(device_faults(spec, CPU)) == ["teacher gpt: flash_attention_2 needs a GPU", *one]
    assert list(device_faults(spec, Resources(gpus=2))) == []


def test_disk_is_what_a_run_leaves_there(tmp_path: Path) -> None:
    """Checkpoints and student on disk, plus room for one checkpoint more while it is written."""
    spec = tiny.spec(tmp_path, losses=[{"name": "relation"}])
    folder = run(spec, variant="main", seed=0).folder
    checkpoints = sorted((folder / "checkpoints").glob("checkpoint-*"))
    assert len(checkpoints) == spec.train.keep_checkpoints
    one = size(checkpoints[0])
    real = one * (spec.train.keep_checkpoints + 1) + size(folder / "student")
    assert estimate_size(spec, 1).disk == pytest.approx(real, rel=0.1)


def size(folder: Path) -> int:
    """Of the tensors: the tiny model's JSON files outweigh some of them."""
    kinds = {".safetensors", ".pt", ".bin"}
    return sum(file.stat().st_size for file in folder.rglob("*") if file.suffix in kinds)


QUOTA = """\
Disk quotas for user ada (uid 1000):
     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace
          /home 900000  1000000 2000000 0 10 0 0 0
 /home/ada/data 150*  100 0 1700000000 5 0 0 0
         /other 1 0 0 0 1 0 0 0
"""


@pytest.mark.parametrize(
    ("folder", "left"),
    [("/home/ada/x", 1_100_000 * 1024), ("/home/ada/data/y", 0), ("/other/z", None), ("/homely", None)],
)
def test_quota_of_the_file_system_that_holds_the_folder(folder: str, left: int | None) -> None:
    """The hard limit, else the soft one; none is no limit."""
    assert disk.quota_left(QUOTA, Path(folder)) == left


def test_a_small_quota_counts_more_than_free_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_quota_table", lambda: f"{tmp_path} 1 0 3 0 1 0 0 0")
    assert disk.free_space(tmp_path) == (2048, "left of the quota")


# Files for nodes without a network.


def model_folder(folder: Path, *files: str) -> str:
    folder.mkdir(parents=True)
    for file in files:
        (folder / file).write_text("{}")
    return str(folder)


WHOLE = ("config.json", "model.safetensors", "tokenizer.json")


def models(**student: Any) -> list[str]:
    """What is missing of a student."""
    fields = tiny.fields(teachers=[], losses=[]) | {"student": student}
    return local_files.missing_models([type(tiny.spec()).model_validate(fields)])


def test_whole_local_folders_are_present(tmp_path: Path) -> None:
    assert models(path=model_folder(tmp_path / "m", *WHOLE)) == []


@pytest.mark.parametrize(
    ("absent", "told"),
    [
        ("config.json", "no config.json"),
        ("model.safetensors", "no safetensors file"),
        ("tokenizer.json", "no tokenizer"),
    ],
)
def test_what_a_local_folder_lacks_is_named(tmp_path: Path, absent: str, told: str) -> None:
    path = model_folder(tmp_path / "m", *(file for file in WHOLE if file != absent))
    assert models(path=path) == [f"{path}: {told}"]


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    path = model_folder(tmp_path / "m", "config.json", "tokenizer.json", "a.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert models(path=path) == [f"{path}: no b.safetensors"]


def test_a_gguf_file_is_model_and_tokenizer(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    assert models(path=str(file)) == [f"{file}: no such file"]
    file.touch()
    assert models(path=str(file)) == []


def test_an_adapter_needs_its_base_too(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base", "config.json", "tokenizer.json")
    path = model_folder(tmp_path / "m", "adapter_config.json")
    (tmp_path / "m" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    lacking = [f"{path}: no adapter_model.safetensors", f"{base}: no safetensors file"]
    assert models(path=path) == lacking
    (tmp_path / "m" / "adapter_model.safetensors").touch()
    (tmp_path / "base" / "model.safetensors").touch()
    assert models(path=path) == []
    (tmp_path / "base" / "tokenizer.json").unlink()
    assert models(path=path) == [f"{base}: no tokenizer"]


def test_hub_names_must_be_cached_when_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    hub = {"path": "some/model", "tokenizer": "some/words"}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert models(**hub) == [
        "some/model: model not in the hub's cache, and HF_HUB_OFFLINE is set",
        "some/words: tokenizer not in the hub's cache, and HF_HUB_OFFLINE is set",
    ]
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    assert models(**hub) == []


def test_a_cached_model_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    repository = tmp_path / "models--some--model"
    model_folder(repository / "snapshots" / "abc", *WHOLE, "tokenizer_config.json")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    assert models(path="some/model") == []
    assert models(path="some/model", revision="v2") == [
        "some/model: model not in the hub's cache, and HF_HUB_OFFLINE is set",
        "some/model: tokenizer not in the hub's cache, and HF_HUB_OFFLINE is set",
    ]
