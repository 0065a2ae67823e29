"""A teacher's attention sinks behind the first token have no target, whichever way its cache is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kava_core.build.data import make_data
from kava_core.build.distiller import make_distiller
from kava_core.distill.calibration import aligned_targets
from kava_core.distill.distiller import Distiller
from kava_core.kv.align.aligner import TeacherAligner
from kava_core.protocols.axes import Cache
from kava_core.protocols.time_map import TimeMap
from kava_core.train.before_training import calibrate_components
from tests.support import tiny

SINK = 5
"""The position of every text that the teacher's attention rests on."""


def drain(model: nn.Module) -> None:
    """Make the values of one position tiny in every layer, as those of a sink."""

    def shrink(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        factor = torch.ones(output.shape[1])
        factor[SINK] = 0.02
        return output * factor[:, None]

    for name, module in model.named_modules():
        if name.endswith("v_proj"):
            module.register_forward_hook(shrink)


def made(tmp_path: Path, sinks: str) -> tuple[Distiller, dict[str, Any]]:
    """A calibrated distiller whose teacher has a sink, and a batch padded on the right."""
    align = {"time_warper": "identity", "sinks": sinks}
    teachers = [{"name": "t", "config": tiny.llama(), "tokenizer": tiny.CHARS, "align": align}]
    spec = tiny.spec(tmp_path, teachers=teachers, losses=["mse"])
    data = make_data(spec)
    distiller = make_distiller(spec, data, seed=0)
    drain(distiller.teachers[0].model)
    calibrate_components(distiller, data, spec, torch.device("cpu"))
    return distiller, data.plain_collator([data.train_items[index] for index in range(4)])


@pytest.mark.parametrize("stream", [False, True])
def test_its_target_is_not_valid(tmp_path: Path, stream: bool) -> None:
    valid = {}
    for choice in ("leave_out", "leave_out_first"):
        distiller, batch = made(tmp_path, choice)
        distiller.choose_alignment(stream=stream)
        [target] = aligned_targets(distiller, batch)
        valid[choice] = target.valid
    assert valid["leave_out_first"][:, SINK].all()
    assert not valid["leave_out"][:, SINK].any()
    valid["leave_out_first"][:, SINK] = False
    assert torch.equal(valid["leave_out"], valid["leave_out_first"])


@pytest.mark.parametrize("sinks", ["leave_out", "leave_out_first"])
def test_calibration_does_not_see_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sinks: str) -> None:
    shown, observe = [], TeacherAligner.observe

    def note_what_is_shown(self: TeacherAligner, teacher: Cache, student: Cache, time_map: TimeMap) -> None:
        shown.append(time_map.valid[:, SINK])
        observe(self, teacher, student, time_map)

    monkeypatch.setattr(TeacherAligner, "observe", note_what_is_shown)
    made(tmp_path, sinks)
    assert torch.cat(shown).all() == (sinks == "leave_out_first")
    assert torch.cat(shown).any() == (sinks == "leave_out_first")
