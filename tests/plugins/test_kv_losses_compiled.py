"""A compiler that fails never breaks a run; without being asked for it is never called."""

from __future__ import annotations

import pytest
import torch

from kava_plugins.kv_losses.compiled import SWITCH, Compiled


def double(x):
    return 2 * x


def broken(*arguments, **options):
    raise RuntimeError("no compiler here")


@pytest.mark.parametrize("asked", ["0", None])
def test_off_unless_asked_for(monkeypatch, asked):
    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.delenv(SWITCH, raising=False)
    if asked:
        monkeypatch.setenv(SWITCH, asked)
    assert torch.equal(Compiled(double)(torch.ones(2)), torch.full((2,), 2.0))


def test_a_failure_is_told_once_and_remembered(monkeypatch, recwarn):
    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setenv(SWITCH, "1")
    function = Compiled(double)
    for _ in range(3):
        assert torch.equal(function(torch.ones(2)), torch.full((2,), 2.0))
    assert [str(one.message) for one in recwarn] == ["double runs uncompiled: no compiler here"]


def test_compiled_once(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: calls.append(options) or function)
    monkeypatch.setenv(SWITCH, "1")
    function = Compiled(double)
    function(torch.ones(2)), function(torch.ones(3))
    assert calls == [{"dynamic": True, "fullgraph": True}]
