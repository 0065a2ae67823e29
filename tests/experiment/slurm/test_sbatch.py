"""The sbatch script: its text, what sbatch reads in it, and what bash makes of hostile names."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kava_core.errors import SpecError
from kava_core.experiment.run_processes import train_command
from kava_core.experiment.slurm.mapping import ArrayElement, job_name, mapping_text
from kava_core.experiment.slurm.resources import Resources
from kava_core.experiment.slurm.sbatch import ArrayJob, script_text
from tests.experiment.slurm.fake_slurm import directives

GOLDEN = r"""#!/usr/bin/env bash
#SBATCH --job-name=kava-tiny-0a1b2c3d
#SBATCH --array=0-5%2
#SBATCH --output=%a.log
#SBATCH --open-mode=append
#SBATCH --signal=USR2@120
#SBATCH --requeue
#SBATCH --partition=gpu
#SBATCH --account=team
#SBATCH --time=4:00:00
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --mem=64G
#SBATCH --constraint=a100
#SBATCH --comment="two words"

# Written by kava launch. Sent from its own folder: sbatch array.sh

set -u
launch=/work/runs/tiny/slurm/20261122-010203
python=/venv/bin/python
overrides=(train.steps=10 'output=my runs')
rm -f -- "$launch/$SLURM_ARRAY_TASK_ID.exit"
cd -- /work || exit 1

# The run of this index.
line=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" -- "$launch/array.jsonl")
pattern="^\{\"index\": $SLURM_ARRAY_TASK_ID, \"variant\": \"([^\"]+)\", \"seed\": ([0-9]+), "
if ! [[ $line =~ $pattern ]]; then
    echo "array.jsonl: no run of index $SLURM_ARRAY_TASK_ID" >&2
    exit 1
fi
train=("$python" -P -m kava_core train --variant "${BASH_REMATCH[1]}" --seed "${BASH_REMATCH[2]}")
train+=(-- "$launch/spec.yaml" ${overrides[@]+"${overrides[@]}"})

# SIGTERM comes from SLURM when it ends the job itself: then it is not queued again here.
ended=
trap 'ended=1' TERM
trap : USR1 USR2

srun --cpus-per-task=8 "${train[@]}"
code=$?
echo "$code" > "$launch/$SLURM_ARRAY_TASK_ID.exit"

# 75: stopped by a signal, state saved. Queued again, it goes on; any other code is passed on.
if [ "$code" -eq 75 ] && [ -z "$ended" ]; then
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
fi
exit "$code"
"""

EXTRA = "--constraint a100 '--comment=two words'"


def job(**changes: object) -> ArrayJob:
    fields = {
        "name": "kava-tiny-0a1b2c3d",
        "launch": Path("/work/runs/tiny/slurm/20261122-010203"),
        "root": Path("/work"),
        "python": "/venv/bin/python",
        "overrides": ["train.steps=10", "output=my runs"],
        "count": 6,
        "resources": Resources("gpu", "team", "4:00:00", 1, 1, 8, "64G", 2, EXTRA),
    }
    return ArrayJob(**fields | changes)  # type: ignore[arg-type]


def test_the_text() -> None:
    assert script_text(job()) == GOLDEN


def test_several_processes_are_tasks_of_srun_and_not_of_torchrun() -> None:
    text = script_text(job(resources=Resources(gpus=4, nodes=2)))
    assert {"--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4"} <= set(directives(text))
    assert "srun --nodes=2 --ntasks-per-node=4 --wait=120 bash -c '" in text
    assert "torch.distributed" not in text


def test_without_gpus_none_are_asked_for() -> None:
    text = script_text(job(resources=Resources(gpus=0)))
    assert "gpus" not in text
    assert "--ntasks-per-node=1" in directives(text)


@pytest.mark.parametrize(
    "name", ["array=0-9", "open-mode=truncate", "job-name=x", "signal=B:USR1", "chdir=/"]
)
def test_extra_cannot_undo_what_launch_sets(name: str) -> None:
    with pytest.raises(SpecError, match="sets this itself"):
        script_text(job(resources=Resources(extra=f"--{name}")))


@pytest.mark.parametrize("option", ["-a 0-9", "-J x", "-o /dev/null"])
def test_nor_in_their_short_form(option: str) -> None:
    with pytest.raises(SpecError, match="sets this itself"):
        script_text(job(resources=Resources(extra=option)))


@pytest.mark.parametrize("value", ["gpu\n#SBATCH --uid=0", 'gpu" --x', "gpu\\", "g'pu", "gpu\r"])
def test_no_option_can_become_two_lines_or_end_its_quotes(value: str) -> None:
    with pytest.raises(SpecError, match="control characters"):
        script_text(job(resources=Resources(partition=value)))


def test_a_hash_in_an_option_is_no_comment() -> None:
    assert "--comment=a #b" in directives(script_text(job(resources=Resources(extra="'--comment=a #b'"))))


def test_extra_needs_options() -> None:
    with pytest.raises(SpecError, match="no option"):
        script_text(job(resources=Resources(extra="a100")))
    with pytest.raises(SpecError, match="closing quotation"):
        script_text(job(resources=Resources(extra="--comment='a")))


def test_job_names_differ_by_folder() -> None:
    assert job_name("a", Path("/x/1")) != job_name("a", Path("/x/2"))
    assert job_name("a", Path("/x/1")).startswith("kava-a-")


# The script, run by bash with stand-ins for python, srun and scontrol.

HOSTILE = [
    "a b",
    "'q'",
    '"d"',
    "$(touch escaped)",
    "`touch escaped`",
    "new\nline",
    "-x",
    "*",
    "ä#;&|",
    "\\n",
    "",
]
TELL = """#!{python} -SE
import json, os, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
told = {{"words": sys.argv[1:], "cwd": os.getcwd()}} | {{n: os.environ.get(n) for n in names}}
open({file!r}, "a").write(json.dumps(told) + "\\n")
{more}
sys.exit({code})
"""
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
for rank in {ranks}; do SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NTASKS={count} "$@" || code=$?; done
exit "${{code:-0}}"
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo first; echo second; else echo "$@" >> {file}; fi
"""


def executable(file: Path, text: str) -> Path:
    file.write_text(text, encoding="utf-8")
    file.chmod(0o755)
    return file


def execute(folder: Path, made: ArrayJob, code: int = 0, more: str = "", index: str = "1") -> int:
    """Run a job's script; its exit code. Leaves ``told`` (a line for each process) and ``requeued``."""
    made.launch.mkdir(parents=True, exist_ok=True)
    made.root.mkdir(parents=True, exist_ok=True)
    rows = [ArrayElement(0, "first", 3, "a"), ArrayElement(1, "kv.2", 7, 'b"seed": 9')]
    (made.launch / "array.jsonl").write_text(mapping_text(rows))
    told = TELL.format(python=sys.executable, file=str(folder / "told"), code=code, more=more)
    executable(Path(made.python), told)
    count = made.resources.processes
    executable(folder / "srun", SRUN.format(ranks=" ".join(map(str, range(count))), count=count))
    executable(folder / "scontrol", SCONTROL.format(file=folder / "requeued"))
    (folder / "array.sh").write_text(script_text(made), encoding="utf-8")
    slurm = {"SLURM_ARRAY_TASK_ID": index, "SLURM_ARRAY_JOB_ID": "12", "SLURM_JOB_ID": "30013"}
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    ran = subprocess.run(
        ["bash", "array.sh"],
        cwd=folder,
        env=os.environ | slurm | {"PATH": path, "SLURM_JOB_NODELIST": "n[1-2]"},
        timeout=60,
    )
    return ran.returncode


def told(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "told").read_text().splitlines()]


@pytest.fixture
def placed(tmp_path: Path) -> ArrayJob:
    """A job whose every path has a hostile name."""
    wild = tmp_path / "a $(touch escaped) 'b\" \n-c"
    wild.mkdir()
    return job(launch=wild / "launch", root=wild / "root", python=str(wild / "py thon"), overrides=HOSTILE)


def test_bash_passes_hostile_words_on_unchanged(tmp_path: Path, placed: ArrayJob) -> None:
    assert execute(tmp_path, placed) == 0
    (call,) = told(tmp_path)
    train = ["-P", "-m", "kava_core", "train", "--variant", "kv.2", "--seed", "7", "--"]
    assert call["words"] == [*train, f"{placed.launch}/spec.yaml", *HOSTILE]
    assert call["cwd"] == str(placed.root)
    assert not list(tmp_path.rglob("escaped"))


def test_no_overrides_are_no_words(tmp_path: Path) -> None:
    execute(tmp_path, job(launch=tmp_path / "l", root=tmp_path, python=str(tmp_path / "p"), overrides=[]))
    assert told(tmp_path)[0]["words"][-1] == f"{tmp_path}/l/spec.yaml"  # type: ignore[index]


@pytest.mark.parametrize("code", [0, 1, 4, 75])
def test_only_75_is_queued_again_and_every_code_is_passed_on(
    tmp_path: Path, placed: ArrayJob, code: int
) -> None:
    assert execute(tmp_path, placed, code) == code
    requeued = tmp_path / "requeued"
    assert (requeued.read_text() if requeued.exists() else "") == ("requeue 12_1\n" if code == 75 else "")
    assert (placed.launch / "1.exit").read_text() == f"{code}\n"


def test_what_slurm_ends_itself_is_not_queued_again(tmp_path: Path, placed: ArrayJob) -> None:
    """SIGTERM at the batch shell, while the step saves and exits with 75."""
    shell = "os.kill(int(open('/proc/%d/stat' % os.getppid()).read().rpartition(')')[2].split()[1]), 15)"
    assert execute(tmp_path, placed, 75, more=shell) == 75
    assert not (tmp_path / "requeued").exists()


def test_a_signal_at_the_shell_does_not_end_it_before_its_step(tmp_path: Path, placed: ArrayJob) -> None:
    shell = "os.kill(int(open('/proc/%d/stat' % os.getppid()).read().rpartition(')')[2].split()[1]), "
    assert execute(tmp_path, placed, 75, more=f"{shell}{int(signal.SIGUSR2)})") == 75
    assert (tmp_path / "requeued").read_text() == "requeue 12_1\n"


def test_an_index_without_a_run_fails(tmp_path: Path, placed: ArrayJob) -> None:
    """And an exit code of an earlier attempt does not stay."""
    placed.launch.mkdir()
    (placed.launch / "2.exit").write_text("0")
    assert execute(tmp_path, placed, index="2") == 1
    assert not (tmp_path / "told").exists()
    assert not (placed.launch / "2.exit").exists()


def test_processes_meet_at_the_first_host(tmp_path: Path, placed: ArrayJob) -> None:
    several = job(**vars(placed) | {"resources": Resources(gpus=2, nodes=2)})
    assert execute(tmp_path, several) == 0
    calls = told(tmp_path)
    assert [(c["RANK"], c["LOCAL_RANK"], c["WORLD_SIZE"]) for c in calls] == [
        (str(rank), str(rank), "4") for rank in range(4)
    ]
    assert {(c["MASTER_ADDR"], c["MASTER_PORT"], c["LOCAL_WORLD_SIZE"]) for c in calls} == {
        ("first", "30013", "2")
    }
    assert all(call["words"][-len(HOSTILE) :] == HOSTILE for call in calls)  # type: ignore[index]


def test_a_module_beside_the_spec_is_not_executed(tmp_path: Path) -> None:
    """As the script starts Python, and as ``kava experiment`` does."""
    (tmp_path / "random.py").write_text("open('executed', 'w')\nraise SystemExit(9)\n")
    start = train_command(Path("spec.yaml"), [])
    assert start[:4] == [sys.executable, "-P", "-m", "kava_core"]
    done = subprocess.run([*start[:4], "env"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "executed").exists()
