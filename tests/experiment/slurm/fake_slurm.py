"""A scheduler of one machine: ``sbatch``, ``squeue``, ``scontrol`` and ``srun`` as executables on PATH.

Its queue is a folder of JSON files, one for each array element. Nothing starts by itself: ``Slurm.start``
runs an element's script as SLURM would, and ``Slurm.signal_step`` signals its step as ``--signal`` without
``B:`` does: the processes that srun started, not the batch shell.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COMMON = f"""\
#!{sys.executable} -SE
import json, os, shlex, subprocess, sys
from pathlib import Path
home = Path(os.environ["FAKE_SLURM"])
with (home / "calls").open("a") as stream:
    stream.write(json.dumps([Path(sys.argv[0]).name, *sys.argv[1:]]) + "\\n")

def jobs():
    return [json.loads(file.read_text()) for file in sorted((home / "jobs").iterdir())]

def keep(job):
    (home / "jobs" / f"{{job['id']}}.json").write_text(json.dumps(job))
"""

SBATCH = """
words = [word for word in sys.argv[1:] if word not in ("--test-only", "--parsable")]
text = Path(words[0]).read_text() if words else sys.stdin.read()
assert text.startswith("#!"), "sbatch: error: This does not look like a batch script."
given = {}
for line in text.splitlines():
    if line.startswith("#SBATCH "):
        for word in shlex.split(line[8:], comments=True):
            name, _, value = word.removeprefix("--").partition("=")
            given[name] = value
if given.get("partition") == "nowhere":
    sys.exit("sbatch: error: Batch job submission failed: Invalid partition name specified")
if "--test-only" in sys.argv:
    sys.exit(0)
number = 100 + len(list(home.glob("job-*")))
(home / f"job-{number}").write_text(text)
first, last = given["array"].partition("%")[0].split("-")
for index in range(int(first), int(last) + 1):
    keep({"id": f"{number}_{index}", "job": number, "index": index, "state": "PENDING", "cwd": os.getcwd(),
          "name": given["job-name"], "log": given["output"].replace("%a", str(index)), "given": given,
          "restarts": 0, "code": None})
print(number)
"""

SQUEUE = """
if (home / "squeue-is-down").exists():
    sys.exit("slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
(names,) = [word.partition("=")[2].split(",") for word in sys.argv if word.startswith("--name=")]
assert "--format=%j|%K|%T|%i" in sys.argv
for job in jobs():
    if job["name"] in names and job["state"] in ("PENDING", "RUNNING"):
        print(job["name"], job["index"], job["state"], job["id"], sep="|")
"""

SCONTROL = """
if sys.argv[1:3] == ["show", "hostnames"]:
    print("localhost")
    sys.exit(0)
assert sys.argv[1] == "requeue"
(job,) = [job for job in jobs() if job["id"] == sys.argv[2]]
if job["given"].get("requeue") != "":
    sys.exit("Requested operation is presently disabled")
keep(job | {"state": "PENDING", "restarts": job["restarts"] + 1})
"""

SRUN = """
count, words = 1, sys.argv[1:]
while words[0].startswith("--"):
    name, _, value = words.pop(0).partition("=")
    count *= int(value) if name in ("--nodes", "--ntasks-per-node") else 1
task = {"SLURM_NTASKS": str(count)}
children = [
    subprocess.Popen(words, env=os.environ | task | {"SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)})
    for n in range(count)
]
element = os.environ["SLURM_ARRAY_JOB_ID"] + "_" + os.environ["SLURM_ARRAY_TASK_ID"]
step = home / "steps" / element
step.with_suffix(".part").write_text(" ".join(str(child.pid) for child in children))
step.with_suffix(".part").rename(step)
codes = [child.wait() for child in children]
step.unlink()
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""

PROGRAMS = {"sbatch": SBATCH, "squeue": SQUEUE, "scontrol": SCONTROL, "srun": SRUN}


@dataclass
class Slurm:
    """The scheduler; its commands work in processes that get ``environment``."""

    home: Path
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for folder in ("bin", "jobs", "steps"):
            (self.home / folder).mkdir(parents=True)
        for name, body in PROGRAMS.items():
            file = self.home / "bin" / name
            file.write_text(COMMON + body)
            file.chmod(0o755)

    @property
    def environment(self) -> dict[str, str]:
        """What makes a process see this scheduler."""
        return {"FAKE_SLURM": str(self.home), "PATH": f"{self.home / 'bin'}{os.pathsep}{os.environ['PATH']}"}

    def jobs(self) -> dict[str, dict[str, Any]]:
        """Every element by its id, such as ``100_0``."""
        files = sorted((self.home / "jobs").iterdir())
        return {file.stem: json.loads(file.read_text()) for file in files}

    def calls(self, program: str) -> list[list[str]]:
        """Arguments of every call of a command."""
        file = self.home / "calls"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [words[1:] for words in lines if words[0] == program]

    def start(self, element: str, **more: str) -> None:
        """Run a waiting element's script."""
        job = self.jobs()[element]
        assert job["state"] == "PENDING"
        script = self.home / f"job-{job['job']}"
        self._keep(job, state="RUNNING", code=None)
        with (Path(job["cwd"]) / job["log"]).open("ab") as log:
            self.running[element] = subprocess.Popen(
                ["bash", str(script)],
                cwd=job["cwd"],
                env=self._environment(job) | more,
                stdout=log,
                stderr=log,
            )

    def _environment(self, job: Mapping[str, Any]) -> dict[str, str]:
        number, index = str(job["job"]), str(job["index"])
        of_job = {
            "SLURM_ARRAY_JOB_ID": number,
            "SLURM_ARRAY_TASK_ID": index,
            "SLURM_JOB_NODELIST": "localhost",
        }
        return (
            os.environ | self.environment | of_job | {"SLURM_JOB_ID": str(20_000 + os.getpid() + int(index))}
        )

    def end(self, element: str) -> int:
        """Wait for an element; its exit code. One that asked to be queued again is."""
        code = self.running.pop(element).wait(timeout=240)
        job = self.jobs()[element]
        if job["state"] == "RUNNING":
            self._keep(job, state="COMPLETED" if code == 0 else "FAILED", code=code)
        return code

    def signal_step(self, element: str, number: signal.Signals) -> None:
        """As ``--signal`` and scancel do with steps: every process of the step."""
        step = self.home / "steps" / element
        wait_for(step.exists)
        for pid in step.read_text().split():
            os.kill(int(pid), number)

    def _keep(self, job: Mapping[str, Any], **changes: Any) -> None:
        (self.home / "jobs" / f"{job['id']}.json").write_text(json.dumps({**job, **changes}))


def wait_for(is_so: Any, seconds: float = 120) -> None:
    """Poll until a condition holds; AssertionError after too long."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def directives(text: str) -> list[str]:
    """The options of a script as sbatch's words."""
    lines = [line[8:] for line in text.splitlines() if line.startswith("#SBATCH ")]
    return [word for line in lines for word in shlex.split(line, comments=True)]
