"""Write an sbatch script for an array of runs: plain bash that calls the command line."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kava_core.errors import Preempted
from kava_core.experiment.slurm.mapping import MAPPING
from kava_core.experiment.slurm.resources import Resources, directive_line

SCRIPT = "array.sh"
SPEC = "spec.yaml"
"""Copy of the spec beside the script: what is queued does not change under later edits."""
SIGNAL = "USR2@120"
"""Sent to the steps so many seconds before the time limit; without ``B:``, so not to the batch shell."""
GRACE = 120
"""Seconds that the other processes of a run may live once the first has ended."""


@dataclass(frozen=True)
class ArrayJob:
    """An array of runs."""

    name: str
    """Of the job, for squeue."""
    launch: Path
    """Folder of script, mapping, spec and logs; absolute."""
    root: Path
    """Where ``kava launch`` was called: relative paths of the spec begin there."""
    python: str
    """Interpreter with kava."""
    overrides: Sequence[str]
    count: int
    """Runs."""
    resources: Resources


def script_text(job: ArrayJob) -> str:
    """Return the script. It is submitted from its own folder, so that its logs are beside it.

    Raises:
        SpecError: an option that no ``#SBATCH`` line can hold.
    """
    return "\n".join([*_head_lines(job), "", *_body_lines(job)]) + "\n"


def _head_lines(job: ArrayJob) -> list[str]:
    limit = job.resources.array_limit
    array = f"0-{job.count - 1}" + (f"%{limit}" if limit else "")
    options = {
        "job-name": job.name,
        "array": array,
        "output": "%a.log",
        "open-mode": "append",
        "signal": SIGNAL,
    }
    own_lines = [directive_line(f"--{name}={value}") for name, value in options.items()]
    return ["#!/usr/bin/env bash", *own_lines, directive_line("--requeue"), *job.resources.directives()]


def _body_lines(job: ArrayJob) -> list[str]:
    return [
        "# Written by kava launch. Sent from its own folder: sbatch array.sh",
        "",
        "set -u",
        f"launch={shlex.quote(str(job.launch))}",
        f"python={shlex.quote(job.python)}",
        f"overrides=({shlex.join(job.overrides)})",
        'rm -f -- "$launch/$SLURM_ARRAY_TASK_ID.exit"',
        f"cd -- {shlex.quote(str(job.root))} || exit 1",
        "",
        *_lines_choosing_run(),
        "",
        "# SIGTERM comes from SLURM when it ends the job itself: then it is not queued again here.",
        "ended=",
        "trap 'ended=1' TERM",
        "trap : USR1 USR2",
        "",
        *_lines_training(job.resources),
        "code=$?",
        'echo "$code" > "$launch/$SLURM_ARRAY_TASK_ID.exit"',
        "",
        *_lines_requeuing(),
    ]


def _lines_choosing_run() -> list[str]:
    """Return the lines that look up variant and seed of the array's index."""
    return [
        "# The run of this index.",
        f'line=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" -- "$launch/{MAPPING}")',
        r'pattern="^\{\"index\": $SLURM_ARRAY_TASK_ID, \"variant\": \"([^\"]+)\", \"seed\": ([0-9]+), "',
        "if ! [[ $line =~ $pattern ]]; then",
        f'    echo "{MAPPING}: no run of index $SLURM_ARRAY_TASK_ID" >&2',
        "    exit 1",
        "fi",
        # -P: no file beside the spec is taken for a module, such as random.py.
        'train=("$python" -P -m kava_core train --variant "${BASH_REMATCH[1]}" --seed "${BASH_REMATCH[2]}")',
        f'train+=(-- "$launch/{SPEC}" ${{overrides[@]+"${{overrides[@]}}"}})',
    ]


def _lines_training(resources: Resources) -> list[str]:
    cpus = f" --cpus-per-task={resources.cpus}" if resources.cpus else ""
    if resources.processes == 1:
        return [f'srun{cpus} "${{train[@]}}"']
    return [
        "# A task for each process, without torchrun: it dies of SIGUSR2, and turns exit code 75 into 1.",
        'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))",
        "export MASTER_ADDR MASTER_PORT",
        f"srun --nodes={resources.nodes} --ntasks-per-node={resources.tasks}{cpus} --wait={GRACE} bash -c '",
        "    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS",
        f"    export LOCAL_WORLD_SIZE={resources.tasks}",
        '    exec "$@"',
        '\' bash "${train[@]}"',
    ]


def _lines_requeuing() -> list[str]:
    code = Preempted.exit_code
    return [
        f"# {code}: stopped by a signal, state saved. Queued again, it goes on; any other code is passed on.",
        f'if [ "$code" -eq {code} ] && [ -z "$ended" ]; then',
        '    scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"',
        "fi",
        'exit "$code"',
    ]
