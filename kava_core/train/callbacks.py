"""Act around steps: metrics to disk, progress to people, signals to a clean stop."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kava_core.distill.distiller import Distiller
from kava_core.errors import KavaError
from kava_core.runs.metrics import read_metrics

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)


class StopOnSignal(TrainerCallback):
    """Finish the step, save once, stop: on SIGTERM, SIGUSR1, SIGUSR2, SIGINT (Ctrl-C) and SIGHUP.

    A second Ctrl-C ends the run at once, without saving. A signal that is ignored stays so, as SIGHUP under
    nohup.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __enter__(self) -> StopOnSignal:
        heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._receive) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: Any) -> None:
        """Note the signal.

        Raises:
            KeyboardInterrupt: it is a second Ctrl-C.
        """
        if number == signal.SIGINT:
            if self.received == signal.SIGINT:
                raise KeyboardInterrupt
            # Not print: the signal may have come while it was at work.
            os.write(2, b"Ctrl-C: saves and stops after this step; once more ends it at once\n")
        self.received = signal.Signals(number)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Stop every process at the same step, whichever got the signal."""
        if self._anyone_received(args):
            control.should_save = control.should_training_stop = True
        return control

    def _anyone_received(self, args: TrainingArguments) -> bool:
        if args.world_size == 1:
            return self.received is not None
        flag = torch.tensor(float(self.received is not None), device=args.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        if flag.item() and self.received is None:
            self.received = signal.SIGTERM
        return bool(flag.item())


class EvaluateAtEnd(TrainerCallback):
    """Log and evaluate at the last step, whatever the intervals: its checkpoint then holds the results."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Ask for both; the checkpoint of the last step is written after them."""
        if state.global_step >= state.max_steps:
            control.should_log = control.should_evaluate = True
        return control


class ScheduleWeights(TrainerCallback):
    """Tells the distiller how far the run is: 0 at the first step, 1 at the last."""

    def __init__(self, distiller: Distiller) -> None:
        self.distiller = distiller

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Set the progress before the forward pass, after a resume as well."""
        self.distiller.set_progress(state.global_step / max(state.max_steps - 1, 1))


class MetricsFile(TrainerCallback):
    """Writes ``metrics.jsonl``, one JSON object a line: step, seconds, and whatever was logged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.begin = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Drop lines beyond the checkpoint that is resumed from: they will be written again.

        Seconds go on from the last line that is kept.
        """
        if not state.is_world_process_zero or not self.path.exists():
            return
        kept = []
        if state.global_step:  # a run from the start keeps no line, not even one of step 0
            kept = [line for line in read_metrics(self.path) if line["step"] <= state.global_step]
        if kept:
            self.begin = time.monotonic() - kept[-1].get("seconds", 0)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        temporary.replace(self.path)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **_: Any,
    ) -> None:
        """Append a line."""
        if state.is_world_process_zero and "train_runtime" not in logs:
            line = {"step": state.global_step, "seconds": round(time.monotonic() - self.begin, 3), **logs}
            try:
                with self.path.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(line) + "\n")
            except OSError as error:
                raise KavaError(f"{self.path}: cannot be written: {error.strerror}") from error


class ShowProgress(TrainerCallback):
    """Shows a bar on a terminal, a line for every log otherwise, on stderr."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar: Progress | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start the bar at the step the run starts from."""
        if not state.is_world_process_zero or not sys.stderr.isatty() or "CI" in os.environ:
            return
        from rich.console import Console

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, TextColumn("{task.fields[news]}"), console=Console(stderr=True))
        self.task = self.bar.add_task(self.title, total=state.max_steps, completed=state.global_step, news="")
        self.bar.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **_: Any,
    ) -> None:
        """Show the newest numbers."""
        news = log_summary(logs)
        if not state.is_world_process_zero or not news:
            return
        if self.bar is not None:
            self.bar.update(self.task, news=news)
        else:
            print(
                f"{self.title}  step {state.global_step}/{state.max_steps}  {news}",
                file=sys.stderr,
                flush=True,
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Stop the bar."""
        if self.bar is not None:
            self.bar.stop()


def log_summary(logs: dict[str, Any]) -> str:
    """Return ``ce 1.23  relation 0.4`` from a log line; empty for lines without news."""
    hidden = {"epoch", "learning_rate", "grad_norm", "loss", "step"}
    if "train_runtime" in logs:
        return ""
    shown = [name for name in logs if name not in hidden and "/" not in name]
    return "  ".join(f"{name} {logs[name]:.4g}" for name in shown)
