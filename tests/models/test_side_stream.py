"""How a teacher's stream and the student's wait for each other, with streams that only record."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch

from kava_core.models.side_stream import SideStream, on_other_gpu


class Recorder:
    """Stands for a CUDA stream."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.device = name, log, torch.device("cuda:0")

    def wait_stream(self, other: Recorder) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What streams were told, with CUDA's functions replaced."""
    told: list[str] = []
    main = Recorder("main", told)

    @contextmanager
    def current(stream: Recorder) -> Any:
        told.append(f"on {stream.name}")
        yield
        told.append("on main")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Recorder("side", told))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", current)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda _, stream: told.append(f"used on {stream.name}")
    )
    return told


def test_the_side_begins_after_and_ends_before_the_main_stream(log: list[str]) -> None:
    aside = SideStream(torch.device("cuda:0"))
    with aside():
        log.append("teacher")
    log.append("student")
    aside.join(torch.ones(2))
    inside = ["side waits for main", "on side", "teacher", "on main"]
    assert log == [*inside, "student", "main waits for side", "used on main"]


def test_nothing_happens_off_cuda(log: list[str]) -> None:
    aside = SideStream(torch.device("cpu"))
    with aside():
        made = torch.ones(2)
    aside.join(made)
    assert log == []


def test_only_another_gpu_is_another() -> None:
    home = torch.device("cuda:0")
    found = {name: on_other_gpu(name, home) for name in ("replicated", "sharded", "cpu", "cuda", "cuda:0")}
    assert not any(found.values())
    assert on_other_gpu("cuda:1", home)
    assert on_other_gpu("cuda:1", torch.device("cpu"))
