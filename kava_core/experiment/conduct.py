"""Runs what is missing of an experiment, each run in a process of its own, several at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kava_core.errors import Preempted
from kava_core.experiment.progress import Watch
from kava_core.runs.folder import Folder

POLL = 0.2
IMPATIENT = 3
"""Signals after which nothing is waited for."""
STOPPED = Preempted.exit_code
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@dataclass
class Job:
    """A run at work."""

    run: Folder
    process: subprocess.Popen[bytes]
    slot: int
    told: bool = False
    """Whether a signal was passed on to it."""


def conduct(
    command: Sequence[str], runs: Sequence[Folder], watch: Watch, *, jobs: int, devices: int = 0
) -> list[Folder]:
    """Start every run that is not complete, ``jobs`` at a time; what fails does not stop the others.

    Args:
        command: ``kava train SPEC KEY=VALUE …``, as a list; variant and seed are added.
        runs: what is planned.
        watch: told of every beginning and end.
        jobs: processes at a time.
        devices: GPUs, given to the processes in turn; 0: none.

    Returns:
        The runs that failed, whose folders hold ``failure.json`` and ``log.txt``.

    Raises:
        Preempted: a signal was passed on to all processes, which have saved; or one of them got its own.
    """
    waiting = [run for run in runs if run.state() != "complete"]
    watch.begin(total=len(runs), complete=len(runs) - len(waiting))
    active, ends = list[Job](), dict[str, list[Folder]]()
    with _signals() as received, _nobody_left(active):
        while waiting or active:
            while waiting and len(active) < jobs and not received:
                slot = min(set(range(jobs)) - {job.slot for job in active})
                active.append(_start(command, waiting.pop(0), slot, jobs, devices))
                watch.started(active[-1].run)
            ended = [job for job in active if job.process.poll() is not None]
            for job in ended:
                active.remove(job)
                ends.setdefault(_ended(job, watch), []).append(job.run)
            if received and not active:
                break
            _pass_on(received, active)
            watch.look([job.run for job in active])
            time.sleep(0 if ended else POLL)
    if received or "stopped" in ends:
        by = f"stopped by {received[0].name}" if received else f"{ends['stopped'][0].label} was stopped"
        raise Preempted(f"{by}; run the same command again to go on")
    return ends.get("failed", [])


@contextmanager
def _nobody_left(active: list[Job]) -> Iterator[None]:
    """Whatever happens here, no process goes on by itself: it is asked to save, and waited for."""
    try:
        yield
    finally:
        for job in active:
            job.process.terminate()
        for job in active:
            job.process.wait()


def _start(command: Sequence[str], run: Folder, slot: int, jobs: int, devices: int) -> Job:
    run.path.mkdir(parents=True, exist_ok=True)
    run.forget_failure()
    environment = dict(os.environ)
    if devices:
        environment["CUDA_VISIBLE_DEVICES"] = _device(slot, devices)
    else:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    own = [*command, "--variant", run.variant, "--seed", str(run.seed)]
    with run.log.open("ab") as log:
        # A session of its own: the terminal's Ctrl-C comes from here alone, as a request to save.
        process = subprocess.Popen(
            own, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    return Job(run, process, slot)


def _device(slot: int, devices: int) -> str:
    """The GPU of a slot, by the name that the environment gives it."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return visible[slot % len(visible)] if visible else str(slot % devices)


def _ended(job: Job, watch: Watch) -> str:
    """``complete``, ``stopped`` or ``failed``, which is noted in the run's folder."""
    code, run = job.process.returncode, job.run
    if code == 0 and run.state() == "complete":
        watch.ended(run, "complete")
        return "complete"
    if code == STOPPED or (job.told and code == -signal.SIGTERM):  # the latter before it could listen
        watch.ended(run, "stopped")
        return "stopped"
    if run.failure() is None:
        run.note_failure(code, f"{_cause(code)}; its last words: {_last_line(run.log)}")
    watch.ended(run, f"failed: {(run.failure() or {}).get('error')}")
    return "failed"


def _cause(code: int) -> str:
    if code == 0:
        return "it ended well, but not this run: was the spec edited meanwhile?"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _last_line(log: Path) -> str:
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 4096))
        lines = stream.read().decode("utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "nothing"


@contextmanager
def _signals() -> Iterator[list[signal.Signals]]:
    """Collects the signals that arrive; the handlers are put back afterwards."""
    received: list[signal.Signals] = []

    def receive(number: int, _: Any) -> None:
        received.append(signal.Signals(number))

    before = {number: signal.signal(number, receive) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _pass_on(received: list[signal.Signals], active: Sequence[Job]) -> None:
    """Every process finishes its step, saves and leaves; asked a third time, it is killed."""
    for job in active if received else ():
        if not job.told:
            job.process.terminate()
            job.told = True
        elif len(received) >= IMPATIENT:
            job.process.kill()


def train_command(spec: Path, overrides: Sequence[str]) -> list[str]:
    """What trains one run."""
    return [sys.executable, "-P", "-m", "kava_core", "train", str(spec), *overrides]
