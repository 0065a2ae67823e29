"""Runs that a signal stops."""

from __future__ import annotations

import signal
from typing import Any

import pytest
from transformers import TrainerCallback

from kava_core.train import run as run_module


class Send(TrainerCallback):
    """Sends this process a signal in the middle of the step after ``at``."""

    def __init__(self, at: int, number: signal.Signals) -> None:
        self.at, self.number = at, number

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.at:
            signal.raise_signal(self.number)


def stop(monkeypatch: pytest.MonkeyPatch, at: int, number: signal.Signals = signal.SIGTERM) -> None:
    """Every run from here on gets the signal, until ``monkeypatch`` is undone."""
    monkeypatch.setattr(run_module, "ShowProgress", lambda title: Send(at, number))
