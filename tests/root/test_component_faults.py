"""No fault of a component passes unnoticed: 200 at random in debug mode and without, and some by name."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from typing import Any

import pytest
import torch

from kava_core import shapecheck
from kava_core.cli.app import explain_error
from kava_core.config import ComponentConfig
from kava_core.errors import NonFiniteError, PluginError
from kava_core.kv.align import aligner, finite, returned
from kava_core.kv.align.boundaries import attribute_errors_to, plan_time
from kava_core.kv.compare.pipeline import KVPipeline
from kava_core.protocols.time_map import TimeMap
from kava_core.protocols.timeline import Timeline
from tests.support.component_faults import (
    KINDS,
    RAISED,
    UNSEEN_WHEN_FAST,
    Sound,
    faults_of,
    made_pipeline,
    random_faults,
    run_step,
    told,
)
from tests.support.pipeline_helpers import Module, timeline
from tests.support.repository import ROOT

COUNT, SEED = 200, 0


def outcomes(debug: bool, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str | None]]:
    """What is said of every fault. Where modules are instrumented, a process of its own is the fast mode."""
    if debug or not shapecheck.active():
        monkeypatch.setattr(shapecheck, "_hooked", debug)
        return list(random_faults(COUNT, SEED))
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.component_faults", str(COUNT), str(SEED)]
    environment = os.environ | {"KAVA_SHAPE_CHECK": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("debug", [True, False], ids=["debug", "fast"])
def test_no_random_fault_passes_unnoticed(debug: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = outcomes(debug, monkeypatch)
    assert len(found) == COUNT
    assert len({kind for kind, _, _ in found}) == 6
    wrong = []
    for kind, fault, said in found:
        may_pass = not debug and any(word in fault for word in UNSEEN_WHEN_FAST)
        teacher = "" if kind in ("fuser", "kv_loss") else ", teacher 'a'"
        named = said is not None and said.partition(": ")[2].startswith(f"{kind} 'fake'{teacher}: ")
        right_exit = said is not None and said.startswith(("exit 3: ", "exit 4: "))
        if not (named and right_exit) and not (may_pass and said is None):
            wrong.append((kind, fault, said))
    assert wrong == []


def test_a_sound_component_is_not_accused() -> None:
    """The same components and pipelines, with nothing wrong."""
    kinds = ("head_adapter", "dim_projector", "time_warper", "layer_mapper", "fuser", "kv_loss")
    assert {kind: told(kind, "", lambda sound, _: sound) for kind in kinds} == dict.fromkeys(kinds)


@pytest.mark.parametrize("raised", RAISED, ids=lambda raised: raised.__name__)
def test_what_a_component_raises_never_ends_kava(raised: type[BaseException]) -> None:
    with pytest.raises(Exception) as caught, attribute_errors_to("fuser 'x'"):  # noqa: PT011
        raise raised("on purpose")
    assert caught.value.__notes__ == ["in fuser 'x'"]
    if not issubclass(raised, Exception):
        assert type(caught.value) is PluginError
        assert str(caught.value).startswith(
            f"raised {raised.__name__}: on purpose at test_component_faults.py:"
        )


def test_ctrl_c_inside_a_component_stops_kava() -> None:
    with pytest.raises(KeyboardInterrupt), attribute_errors_to("fuser 'x'"):
        signal.raise_signal(signal.SIGINT)


def test_the_plugins_own_line_is_named() -> None:
    """Not that of a library it calls."""

    class Config(ComponentConfig):
        name: str = "x"

    with pytest.raises(PluginError) as caught, attribute_errors_to("fuser 'x'", Config()):
        json.loads("1", parse_int=lambda _: sys.exit(3))
    assert "raised SystemExit: 3 at test_component_faults.py:" in str(caught.value)


# time maps, by name


def planned(change: Any, student: Timeline, teacher: Timeline) -> str:
    """What is said of a map of one tap a position that is changed."""

    def plan(theirs: Timeline, ours: Timeline) -> TimeMap:
        return change(TimeMap.gather(ours.positions, ours.mask))

    with pytest.raises((PluginError, NonFiniteError)) as caught:
        plan_time(Module(plan), teacher, student)
    return str(caught.value)


RISES = "start of the TimeMap must rise from 0 to the number of taps, 160"


@pytest.mark.parametrize(
    ("field", "place", "value", "said"),
    [
        ("index", 0, 80, "index of the TimeMap must be from 0 to 79, inside its own example, not 80"),
        ("index", 80, -1, "index of the TimeMap must be from 0 to 79, inside its own example, not -1"),
        ("weight", 3, 0.5, "weights of a valid position must sum to 1, not [0.5], in examples [0]"),
        ("weight", 90, torch.nan, "weights of taps must be finite, not nan"),
        ("weight", 90, -1.0, "weights must be at least 0, not -1"),
        ("start", 7, 90, f"{RISES}, not from 0 to 160 with falls between"),
        ("start", 0, 1, f"{RISES}, not from 1 to 160"),
        ("index", 80, 79, "padding of the teacher is read in examples [1]"),
    ],
)  # fmt: skip
def test_wrong_number_in_a_time_map(field: str, place: int, value: float, said: str) -> None:
    """Two examples of 80 and 60 tokens on either side."""
    side = timeline((20, 40, 20), (20, 20, 20))

    def change(time_map: TimeMap) -> TimeMap:
        getattr(time_map, field)[place] = value
        return time_map

    assert planned(change, side, side) == said


def test_weights_that_are_not_read_may_be_anything() -> None:
    side = timeline((1, 1, 1), (1, 0, 0))

    def plan(theirs: Timeline, ours: Timeline) -> TimeMap:
        time_map = TimeMap.gather(ours.positions, ours.mask)
        time_map.weight[5] = torch.nan
        return time_map

    assert plan_time(Module(plan), side, side).valid.tolist() == side.mask.tolist()


# what a GPU tells late


@pytest.mark.parametrize(
    ("kind", "fault", "said"),
    [
        (
            "dim_projector",
            "number",
            "the aligned cache of teacher 'a': keys of layers [0] hold NaN or infinity",
        ),
        ("layer_mapper", "sum", "layer_mapper 'fake', teacher 'a': rows must be at least 0 and sum to 1"),
        ("fuser", "negative", "fuser 'fake': weights must be at least 0, not -0.5"),
        ("fuser", "number", "fuser 'fake': weights of teachers must be finite"),
        ("kv_loss", "number", "kv_loss 'fake': returned "),
        (
            "time_warper",
            "index above",
            "time_warper 'fake', teacher 'a': index of the TimeMap must be from 0",
        ),
    ],
)
def test_a_fault_on_a_gpu_is_told_when_the_step_reads_its_flags(
    kind: str, fault: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if these tensors were on a GPU: nothing is read while the step runs."""
    reads_late(monkeypatch)
    component = KINDS[kind](faults_of(kind, random.Random(0))[fault], fault)
    pipeline = made_pipeline(kind, component) if kind != "layer_mapper" else late_mapper(component)
    with pytest.raises((PluginError, NonFiniteError)) as caught:
        step_until_flags_are_read(pipeline)
    told_by_command_line = explain_error(caught.value)
    assert said in str(told_by_command_line)
    finite.raise_unread_faults()


def reads_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite, "_unread", [])
    for module in (finite, returned, aligner):
        monkeypatch.setattr(module, "has_numbers_at_hand", lambda x: False)


def late_mapper(component: Sound) -> KVPipeline:
    """Its matrix is sound while the pipeline is built."""
    spoil, component.spoil = component.spoil, lambda sound, _: sound
    pipeline = made_pipeline("layer_mapper", component)
    component.spoil = spoil
    return pipeline


def step_until_flags_are_read(pipeline: KVPipeline) -> None:
    run_step(pipeline)
    finite.raise_unread_faults()
