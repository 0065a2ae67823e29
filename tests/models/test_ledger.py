"""What training costs: tokens counted in the data, operations counted by torch."""

from __future__ import annotations

import json
import resource
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kava_core.build.data import make_data
from kava_core.costs.dry_run import sized_config
from kava_core.costs.flops import forward_flops, step_passes
from kava_core.costs.recorded import recorded_compute
from kava_core.distill.distiller import Distiller
from kava_core.errors import CheckpointError, Preempted
from kava_core.jobs.cache import write_store
from kava_core.kv.capture.taps import StopForward
from kava_core.models.ledger import Ledger, ModelCounts, peak_memory, reset_peak_memory
from kava_core.models.teacher import Teacher
from kava_core.train.run import run
from tests.support import tiny
from tests.support.stops import stop

WHOLE = {"steps": 4, "batch_size": 16, "save_every": 2}
"""Sixteen examples: every step sees all of them."""
DATA = {"name": "chain", "steps": 2, "train": 16, "validation": 8}


def ran(folder: Path, **changes: Any) -> dict[str, Any]:
    result = run(tiny.spec(folder, **{"train": WHOLE, "data": DATA} | changes), variant="main", seed=0)
    found: dict[str, Any] = json.loads((result.folder / "run.json").read_text())["compute"]
    return found


def lengths(spec: Any) -> tuple[list[int], dict[str, list[int]]]:
    items = make_data(spec).train_items.items
    names = [teacher.name for teacher in spec.teachers]
    return [len(i.student) for i in items], {n: [len(i.teachers[n].input_ids) for i in items] for n in names}


def test_tokens_are_those_of_the_data(tmp_path: Path) -> None:
    cost = ran(tmp_path)
    student, teachers = lengths(tiny.spec(data=DATA))
    assert cost["student_tokens"] == 4 * sum(student)
    assert cost["teacher_tokens"] == 4 * sum(map(sum, teachers.values()))
    assert cost["flops"] == pytest.approx(sum(cost["flops_of"].values()))
    assert cost["seconds"] > 0
    assert 10_000_000 < cost["peak_memory"] < 1.2 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_operations_are_those_torch_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward passes of student and teachers over the very batches, with eager attention."""
    counted = {"student": 0.0, "teachers": 0.0}
    student_pass, teacher_pass = Distiller.run_student, Teacher.run_model

    def outputs(self: Any, *args: Any) -> Any:
        with FlopCounterMode(display=False) as counter:
            found = student_pass(self, *args)
        counted["student"] += counter.get_total_flops() if self.training else 0
        return found

    def run_model(self: Any, *args: Any) -> Any:
        with FlopCounterMode(display=False) as counter, suppress(StopForward):
            teacher_pass(self, *args)
        counted["teachers"] += counter.get_total_flops() if self.ledger.on else 0
        return {}

    monkeypatch.setattr(Distiller, "run_student", outputs)
    monkeypatch.setattr(Teacher, "run_model", run_model)
    eager = [t | {"attention": "eager"} for t in tiny.FIELDS["teachers"]]
    student = {"config": tiny.llama(), "tokenizer": tiny.CHARS, "attention": "eager"}
    cost = ran(tmp_path, student=student, teachers=eager)["flops_of"]
    assert cost["student"] == pytest.approx(3 * counted["student"], rel=1e-9)
    # A teacher stops inside its last layer, whose rest is counted though it does not run.
    theirs = cost["wide"] + cost["gpt"]
    assert 0.75 * theirs < counted["teachers"] < theirs
    assert cost["alignment"] > 0


def test_a_store_costs_one_reading_of_the_training_examples(tmp_path: Path) -> None:
    """Four live steps read all examples four times, padded; the store read them once, not padded."""
    live = ran(tmp_path / "live")
    fields = {"store": {"folder": str(tmp_path / "stores")}}
    made = tiny.spec(tmp_path, train=WHOLE, data=DATA, **fields)
    write_store(made, seed=0)
    stored = ran(tmp_path, **fields)
    assert set(stored["flops_of"]) == {"student", "store"}
    assert stored["flops"] == sum(stored["flops_of"].values())
    assert 4 * stored["teacher_tokens"] == live["teacher_tokens"]
    read = sum(
        forward_flops(sized_config(teacher, where=teacher.name), time, head=False)
        for teacher in made.teachers
        for time in lengths(made)[1][teacher.name]
    )
    alignment = live["flops_of"]["alignment"] / 4
    assert stored["flops_of"]["store"] - read == pytest.approx(alignment, rel=0.2)
    assert alignment < 0.2 * read


def test_a_control_without_teachers_costs_the_student_alone(tmp_path: Path) -> None:
    with_teachers, alone = ran(tmp_path), ran(tmp_path, losses=[])
    assert alone["student_tokens"] == with_teachers["student_tokens"]
    assert (alone["teacher_tokens"], set(alone["flops_of"])) == (0, {"student"})
    assert alone["flops"] == with_teachers["flops_of"]["student"]


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_latent_passes_are_counted_as_they_run(
    tmp_path: Path, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch counts decoder and head over Jacobi and final passes, prompt and slots as they are read."""
    counted = [0.0]
    whole = Distiller.run_student

    def call(self: Any, *args: Any) -> Any:
        with FlopCounterMode(display=False) as counter:
            found = whole(self, *args)
        counted[0] += counter.get_total_flops() if self.training else 0
        return found

    monkeypatch.setattr(Distiller, "run_student", call)
    student = {"config": tiny.llama(), "tokenizer": tiny.CHARS, "attention": "eager"}
    latent = {"trajectory": "latent", "latent": {"count": 3, "passes": passes, "projection": "none"}}
    cost = ran(tmp_path, student=student, losses=[], teachers=[], **latent)
    assert cost["flops"] == pytest.approx(3 * counted[0], rel=1e-9)


def test_the_student_as_its_own_teacher_is_counted_once_with_its_gradient(tmp_path: Path) -> None:
    align = {"time_warper": {"name": "segment", "segments": ["reasoning"]}, "dim_projector": "linear"}
    latent = {"trajectory": "latent", "latent": {"count": 3, "passes": 1}}
    itself = {
        weight: ran(
            tmp_path,
            teachers=[{"name": "own", "itself": {"cross_entropy": weight}, "align": align}],
            **latent,
        )
        for weight in (0.0, 1.0)
    }
    tokens = [cost["student_tokens"] for cost in itself.values()]
    assert tokens[0] == tokens[1] > 0
    assert all(cost["teacher_tokens"] == 0 for cost in itself.values())
    body = [cost["flops_of"]["student"] for cost in itself.values()]
    assert body[1] > 1.2 * body[0]


def test_counts_go_on_after_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ran(tmp_path / "whole")
    stop(monkeypatch, 1)
    with pytest.raises(Preempted):
        ran(tmp_path / "cut")
    monkeypatch.undo()
    cut = ran(tmp_path / "cut")
    same = ("student_tokens", "teacher_tokens", "flops", "flops_of")
    assert {name: cut[name] for name in same} == {name: whole[name] for name in same}


def test_what_was_saved_is_read_back(tmp_path: Path) -> None:
    ledger, again = Ledger(3), Ledger(3)
    with ledger.counting():
        ledger.add_text("student", torch.ones(2, 5, dtype=torch.long), 3.0, head=True)
        ledger.add_tokens("student", torch.tensor([[1, 1, 0]]))
    ledger.add("student", 9, 9, 9)
    ledger.save(tmp_path / "ledger.json")
    again.load(tmp_path / "ledger.json")
    assert again.state() == ledger.state()
    assert (again.passes, again.read["student"]) == (1, ModelCounts(30.0, 150.0, 1))
    (tmp_path / "ledger.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"ledger\.json: unreadable"):
        again.load(tmp_path / "ledger.json")


@pytest.mark.parametrize("fields", [tiny.llama(), tiny.gpt2()], ids=["llama", "gpt2"])
def test_operations_at_any_length(fields: dict[str, Any], tmp_path: Path) -> None:
    """Two lengths tell linear and squared parts: a third one must follow."""
    spec = tiny.spec(student={"config": fields, "tokenizer": tiny.CHARS}, teachers=[], losses=[])
    ledger = Ledger(step_passes(spec.student))
    mask = torch.ones(2, 57, dtype=torch.long)
    with ledger.counting():
        ledger.add_text("student", mask, ledger.backward, head=True)
    config = sized_config(spec.student, where="student")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "seconds": 2.5}\n')
    cost = recorded_compute(
        spec, {"student": config}, [ledger.state()], metrics=tmp_path / "metrics.jsonl", memory=1
    )
    assert cost["seconds"] == 2.5
    whole = forward_flops(config, 57, head=True)
    assert cost["flops"] == pytest.approx(3 * 2 * whole, rel=1e-12)


def test_a_cost_that_cannot_be_told_loses_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> float:
        raise RuntimeError("Tensor.item() cannot be called\non meta tensors")

    monkeypatch.setattr("kava_core.costs.recorded.alignment_flops", broken)
    cost = ran(tmp_path)
    assert cost["unknown"] == "RuntimeError: Tensor.item() cannot be called on meta tensors"
    assert cost["student_tokens"] > 0
    assert "flops" not in cost


def test_teachers_that_do_not_run_cost_nothing(tmp_path: Path) -> None:
    """One of weight 0 is not aligned either: as if it were not declared."""
    weights = {"name": "fixed", "weights": {"wide": 1, "gpt": 0}}
    idle = ran(tmp_path, fuser=weights)["flops_of"]
    alone = ran(tmp_path, teachers=[tiny.FIELDS["teachers"][0]])["flops_of"]
    assert idle["gpt"] == 0
    assert idle["alignment"] == alone["alignment"]


def test_memory_held_before_is_not_the_runs() -> None:
    held = torch.ones(80_000_000)
    high = peak_memory()
    del held
    reset_peak_memory()
    assert peak_memory() < high - 200_000_000
