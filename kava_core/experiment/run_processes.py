"""Run what is missing of an experiment, each run in a process of its own, several at a time."""

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
from kava_core.experiment.experiment_progress import ExperimentProgress
from kava_core.runs.folder import Folder

POLL_SECONDS = 0.2
SIGNALS_UNTIL_KILL = 3
"""Signals after which no process is waited for."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
LOG_TAIL_BYTES = 4096
"""Bytes of a log that are sure to hold its last line."""


@dataclass
class RunningProcess:
    """A run at work."""

    run: Folder
    process: subprocess.Popen[bytes]
    slot: int
    signalled: bool = False
    """Whether a signal was passed on to it."""


def run_processes(
    command: Sequence[str],
    runs: Sequence[Folder],
    progress: ExperimentProgress,
    *,
    jobs: int,
    devices: int = 0,
) -> list[Folder]:
    """Start every run that is not complete, ``jobs`` at a time; what fails does not stop the others.

    Args:
        command: ``kava train SPEC KEY=VALUE …``, as a list; variant and seed are added.
        runs: what is planned.
        progress: shows every beginning and end.
        jobs: processes at a time.
        devices: GPUs, given to the processes in turn; 0: none.

    Returns:
        The runs that failed, whose folders hold ``failure.json`` and ``log.txt``.

    Raises:
        Preempted: a signal was passed on to all processes, which have saved; or one of them got its own.
    """
    waiting = [run for run in runs if run.state() != "complete"]
    progress.begin(total=len(runs), complete=len(runs) - len(waiting))
    active: list[RunningProcess] = []
    runs_by_end: dict[str, list[Folder]] = {}
    with _collecting_signals() as received, _ending_all_processes(active):
        while waiting or active:
            while waiting and len(active) < jobs and not received:
                run = waiting.pop(0)
                active.append(_start_process(command, run, _free_slot(active, jobs), jobs, devices))
                progress.run_started(run)
            ended = [job for job in active if job.process.poll() is not None]
            for job in ended:
                active.remove(job)
                end = _record_end(job, progress)
                runs_by_end.setdefault(end, []).append(job.run)
            if received and not active:
                break
            _pass_signals_on(received, active)
            progress.update_bars([job.run for job in active])
            time.sleep(0 if ended else POLL_SECONDS)
    if received:
        raise Preempted(f"stopped by {received[0].name}; run the same command again to go on")
    if "stopped" in runs_by_end:
        label = runs_by_end["stopped"][0].label
        raise Preempted(f"{label} was stopped; run the same command again to go on")
    return runs_by_end.get("failed", [])


def _free_slot(active: Sequence[RunningProcess], jobs: int) -> int:
    return min(set(range(jobs)) - {job.slot for job in active})


@contextmanager
def _ending_all_processes(active: list[RunningProcess]) -> Iterator[None]:
    """Leave no process behind, whatever happens: each is asked to save, and waited for."""
    try:
        yield
    finally:
        for job in active:
            job.process.terminate()
        for job in active:
            job.process.wait()


def _start_process(command: Sequence[str], run: Folder, slot: int, jobs: int, devices: int) -> RunningProcess:
    run.path.mkdir(parents=True, exist_ok=True)
    run.forget_failure()
    environment = dict(os.environ)
    if devices:
        environment["CUDA_VISIBLE_DEVICES"] = _device_of_slot(slot, devices)
    else:
        threads = max(1, (os.cpu_count() or 1) // jobs)
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    own_command = [*command, "--variant", run.variant, "--seed", str(run.seed)]
    with run.log.open("ab") as log:
        # A session of its own: the terminal's Ctrl-C comes from here alone, as a request to save.
        process = subprocess.Popen(
            own_command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    return RunningProcess(run, process, slot)


def _device_of_slot(slot: int, devices: int) -> str:
    """Return the GPU of a slot, by the name that the environment gives it."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return visible[slot % len(visible)] if visible else str(slot % devices)


def _record_end(job: RunningProcess, progress: ExperimentProgress) -> str:
    """Return ``complete``, ``stopped`` or ``failed``, which is noted in the run's folder."""
    code, run = job.process.returncode, job.run
    if code == 0 and run.state() == "complete":
        progress.run_ended(run, "complete")
        return "complete"
    # A process that was asked to stop before it could listen dies of the signal.
    died_of_request = job.signalled and code == -signal.SIGTERM
    if code == Preempted.exit_code or died_of_request:
        progress.run_ended(run, "stopped")
        return "stopped"
    if run.failure() is None:
        run.note_failure(code, f"{_cause_of_end(code)}; its last words: {_last_line(run.log)}")
    progress.run_ended(run, f"failed: {(run.failure() or {}).get('error')}")
    return "failed"


def _cause_of_end(code: int) -> str:
    if code == 0:
        return "it ended well, but not this run: was the spec edited meanwhile?"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _last_line(log: Path) -> str:
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
        lines = stream.read().decode("utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "nothing"


@contextmanager
def _collecting_signals() -> Iterator[list[signal.Signals]]:
    """Collect the signals that arrive; the handlers are put back afterwards."""
    received: list[signal.Signals] = []

    def receive(number: int, _: Any) -> None:
        received.append(signal.Signals(number))

    handlers_before = {number: signal.signal(number, receive) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in handlers_before.items():
            signal.signal(number, handler)


def _pass_signals_on(received: Sequence[signal.Signals], active: Sequence[RunningProcess]) -> None:
    """Ask every process to finish its step, save and leave; kill it after several signals."""
    if not received:
        return
    for job in active:
        if not job.signalled:
            job.process.terminate()
            job.signalled = True
        elif len(received) >= SIGNALS_UNTIL_KILL:
            job.process.kill()


def train_command(spec: Path, overrides: Sequence[str]) -> list[str]:
    """Return the command that trains a run, without its variant and seed."""
    return [sys.executable, "-P", "-m", "kava_core", "train", str(spec), *overrides]
