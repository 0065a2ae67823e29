"""``kava profile`` on tiny models: every stage, what is planted is found, and the command as it is run."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from kava_core.cli.app import main
from kava_core.console import quiet
from kava_core.errors import SpecError
from kava_core.jobs.profile.layer_comparison import as_student_keys, student_rules
from kava_core.jobs.profile.prepared_variant import (
    KEYS_AND_VALUES,
    PreparedVariant,
    plan_time_map,
    prepare_variant,
)
from kava_core.jobs.profile.profile_warnings import profile_warnings
from kava_core.jobs.profile.profiled_stages import (
    CAPTURED,
    PLAN,
    STEP,
    STUDENT,
    profile_costs,
    profile_stages,
)
from kava_core.jobs.profile.quality_gate import ARMS, judge_teachers, output_agreement
from kava_core.jobs.profile.variant_profile import (
    Profile,
    ProfileOptions,
    profile_variant,
    with_random_alignment,
)
from kava_core.kv.align.finite import part_at_least_float32
from kava_core.registry import Registry
from tests.support import tiny

REGISTRY = Registry.build()
LOUD = tiny.llama(initializer_range=0.5)
"""Random weights so large that attention is far from uniform."""
ALIKE = {"name": "alike", "config": LOUD, "tokenizer": tiny.CHARS}


@pytest.fixture(scope="module", autouse=True)
def _one_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KAVA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


def prepared_variant(folder: Path, **changes: Any) -> PreparedVariant:
    with quiet():
        return prepare_variant(tiny.spec(folder, **changes), folder / "maps")


@torch.no_grad()
def profile_of(variant: PreparedVariant, *, trained: bool = False, gate: int | None = None) -> Profile:
    return profile_variant(variant, REGISTRY, ProfileOptions(2, gate), trained)


def spoil(module: nn.Module) -> None:
    with torch.no_grad():
        next(module.parameters()).fill_(torch.nan)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """Of two teachers of other shapes."""
    return profile_of(prepared_variant(tmp_path_factory.mktemp("two")), gate=8)


def test_every_teacher_and_part_goes_through_every_stage(found: Profile) -> None:
    for name in ("wide", "gpt"):
        for part in KEYS_AND_VALUES:
            mine = [one.stage for one in found.stages if (one.teacher, one.part) == (name, part)]
            assert mine[:2] == [CAPTURED, "layers"]
            assert sorted(mine[2:]) == ["heads", "time", "width"]
    own = [one for one in found.stages if one.teacher is None]
    assert [(one.part, one.stage) for one in own] == [("keys", STUDENT), ("values", STUDENT)]
    for one in found.stages:
        assert (one.numbers.bad, one.bad_layers) == (0.0, ())
        assert one.numbers.low < one.numbers.mean < one.numbers.high


def test_the_last_stage_has_the_students_extents(found: Profile) -> None:
    own = next(one for one in found.stages if one.teacher is None).numbers.shape
    for name in ("wide", "gpt"):
        assert [one for one in found.stages if one.teacher == name][-1].numbers.shape == own
    captured = next(one for one in found.stages if one.teacher == "wide")
    assert captured.layers == (1, 3)
    assert captured.numbers.shape[2] == 4


def test_costs_name_every_stage_and_the_step(found: Profile) -> None:
    names = [one.stage for one in found.costs if one.teacher == "gpt"]
    assert names[:3] == [CAPTURED, PLAN, "layers"]
    assert [one.stage for one in found.costs if one.teacher is None] == [STUDENT, STEP]
    assert all(one.milliseconds > 0 for one in found.costs)
    assert next(one for one in found.costs if one.stage == STEP).mebibytes > 0


def test_numbers_of_a_stage_are_those_of_the_aligned_cache(tmp_path: Path) -> None:
    variant = prepared_variant(tmp_path)
    (batch,) = variant.validation_batches(8, 8)
    last = [one for one in profile_stages(variant, [batch]) if (one.teacher, one.part) == ("wide", "values")][
        -1
    ]
    side, aligner = batch["teachers"]["wide"], variant.pipeline.teachers[0]
    time_map = plan_time_map(aligner, side, batch["student"])
    target = aligner.align(variant.teachers[0].cache(side).map(part_at_least_float32), time_map)
    values = [
        float(v)
        for b in range(8)
        for t in range(time_map.valid.shape[1])
        if time_map.valid[b, t]
        for v in target.values[b, :, :, t].flatten().double()
    ]
    assert last.numbers.mean == pytest.approx(sum(values) / len(values), rel=1e-6)
    assert (last.numbers.low, last.numbers.high) == (min(values), max(values))


def test_a_planted_nan_is_named_by_layer_and_stage(tmp_path: Path) -> None:
    variant = prepared_variant(tmp_path)
    spoil(variant.teachers[0].model.model.layers[3].self_attn.v_proj)
    told = profile_warnings(profile_of(variant))
    assert (
        "teacher 'wide', stage captured: values of layer 3 hold NaN or infinity (50.0% of all values)" in told
    )
    assert not any("keys" in line for line in told if "NaN" in line)
    assert not any("'gpt'" in line for line in told if "NaN" in line)


def test_a_nan_of_a_projector_is_named_by_its_stage(tmp_path: Path) -> None:
    variant = prepared_variant(tmp_path)
    variant.pipeline.teachers[1].dim_projector.values_basis[1].fill_(torch.nan)
    (told,) = [line for line in profile_warnings(profile_of(variant)) if "NaN" in line]
    assert told.startswith("teacher 'gpt', stage width: values of layer 1 hold NaN or infinity")


def test_a_planted_sleep_is_on_top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variant = prepared_variant(tmp_path)
    kind = type(variant.pipeline.teachers[0].head_adapter)
    forward = kind.forward

    def slow(*arguments: Any) -> Any:
        time.sleep(0.03)
        return forward(*arguments)

    plain = {
        (one.teacher, one.stage): one
        for one in profile_costs(variant, next(variant.validation_batches(8, 8)))
    }
    monkeypatch.setattr(kind, "forward", slow)
    taken = profile_costs(variant, next(variant.validation_batches(8, 8)))
    slowest = max((one for one in taken if one.stage != STEP), key=lambda one: one.milliseconds)
    assert slowest.stage == "heads"
    assert slowest.milliseconds > 60 > plain[slowest.teacher, "heads"].milliseconds


def test_a_stage_that_takes_most_of_the_step_is_told(found: Profile) -> None:
    step = next(one for one in found.costs if one.stage == STEP)
    slow = [
        type(one)(one.teacher, one.stage, 0.6 * step.milliseconds, 0.0) if one.stage == "time" else one
        for one in found.costs
    ]
    told = profile_warnings(type(found)(**(vars(found) | {"costs": slow})))
    assert sum("stage time: takes" in line and "60% of a step" in line for line in told) == 2


def test_dead_channels_and_positions_without_target_are_told(tmp_path: Path) -> None:
    variant = prepared_variant(tmp_path)
    with torch.no_grad():
        variant.teachers[0].model.model.layers[1].self_attn.v_proj.weight[:4] = 0
    told = profile_warnings(profile_of(variant))
    assert any(
        line.startswith("teacher 'wide', stage captured: 3.1% of the channels of values") for line in told
    )
    align = {"time_warper": {"name": "segment", "segments": ["answer"]}}
    teachers = [one | {"align": align} for one in tiny.FIELDS["teachers"]]
    told = profile_warnings(profile_of(prepared_variant(tmp_path, teachers=teachers)))
    assert sum("of the student's positions have a target" in line for line in told) == 2


def test_uniform_attention_is_told_of_trained_students_only(tmp_path: Path) -> None:
    variant = prepared_variant(tmp_path)
    told = profile_warnings(profile_of(variant, trained=True))
    assert any(
        line.startswith("the student: attention of layer 0 looks at all positions alike") for line in told
    )
    assert not any(line.startswith("the student") for line in profile_warnings(profile_of(variant)))
    loud = prepared_variant(tmp_path, teachers=[ALIKE], student={"config": LOUD, "tokenizer": tiny.CHARS})
    assert not any("alike (entropy" in line for line in profile_warnings(profile_of(loud, trained=True)))


def twins(folder: Path, **changes: Any) -> PreparedVariant:
    """A teacher with the student's own weights, nothing to be projected."""
    align = {"layer_mapper": "ratio", "time_warper": "pad", "dim_projector": "identity"}
    teachers = [ALIKE | {"align": align | {"sinks": "compare"}}]
    student = {"config": LOUD, "tokenizer": tiny.CHARS}
    variant = prepared_variant(folder, teachers=teachers, student=student, **changes)
    variant.teachers[0].model.load_state_dict(variant.distiller.student.state_dict())
    return variant


def test_the_gate_opens_for_the_students_own_cache(tmp_path: Path) -> None:
    variant = twins(tmp_path, evaluate={"every": 3, "examples": 16, "max_new_tokens": 6})
    found = profile_of(variant, gate=16)
    assert found.gates is not None
    gate = found.gates["alike"]
    assert gate is not None
    assert gate.examples == 16
    assert gate.mean["true"] == pytest.approx(1, abs=1e-4)
    assert gate.mean["shuffled"] < 0.99
    assert gate.mean["random"] < 0.9
    assert gate.open
    layers = found.teachers["alike"]
    assert layers.cosines["keys"] == pytest.approx((1, 1), abs=1e-4)
    assert layers.after is not None
    assert layers.after.nats == pytest.approx(found.student.nats, abs=1e-4)
    assert layers.before.nats == pytest.approx(found.student.nats, abs=1e-4)


@pytest.mark.parametrize("rotary", ["keep", "match"])
def test_keys_are_rotated_as_the_students_are(tmp_path: Path, rotary: str) -> None:
    found = profile_of(twins(tmp_path, rotary=rotary))
    after = found.teachers["alike"].after
    assert after is not None
    assert after.nats == pytest.approx(found.student.nats, abs=1e-4)


def test_the_shuffled_arm_is_the_collators_shuffled_teacher(tmp_path: Path) -> None:
    variant = prepared_variant(tmp_path)
    random = variant.make_aligners(with_random_alignment(variant.spec, REGISTRY))
    with torch.no_grad():
        found = judge_teachers(variant, random, 8)["wide"]
    collator = variant.data.plain_collator
    items = variant.data.validation_items.items[:8]
    collator.shuffle_teacher = True
    shuffled, aligner = collator(items), variant.key_value_aligners[0]
    collator.shuffle_teacher = False
    own, turn = variant.attended_student_cache(shuffled["student"])
    valid = [
        plan_time_map(aligner, b["teachers"]["wide"], b["student"]).valid for b in (shuffled, collator(items))
    ]
    side = shuffled["teachers"]["wide"]
    time_map = plan_time_map(aligner, side, shuffled["student"])
    target = aligner.align(variant.alignable_teacher_cache(0, side).pick(KEYS_AND_VALUES), time_map)
    held = as_student_keys(variant, aligner, target, own, turn)
    wanted = output_agreement(own, held, valid[0] & valid[1], student_rules(variant, own))
    assert found is not None
    assert found.layers["shuffled"] == pytest.approx(wanted.mean(0).tolist(), abs=1e-5)


CHANGES: dict[str, dict[str, Any]] = {
    "fused": {"target": "fused", "losses": ["mercator"]},
    "bf16": {"train": {"precision": "bf16"}},
    "flat": {"teachers": [t | {"align": {"head_adapter": "flat"}} for t in tiny.FIELDS["teachers"]]},
    "merged": {
        "teachers": [
            t | {"align": {"head_adapter": {"name": "flat", "layers": True}}} for t in tiny.FIELDS["teachers"]
        ]
    },
    "one layer": {"losses": [{"name": "mercator", "layers": [1]}]},
    "values": {"losses": [{"name": "relation", "parts": ["values"]}]},
    "queries": {"losses": ["attention_output"]},
    "trained": {"teachers": [t | {"align": {"dim_projector": "linear"}} for t in tiny.FIELDS["teachers"]]},
    "streamed": {"train": {"stream": True}},
    "lora": {"student": {"lora": {"rank": 2}}},
    "router": {"fuser": "learnable", "target": "fused", "losses": ["mercator"]},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_it_works_with(tmp_path: Path, changes: dict[str, Any]) -> None:
    if "lora" in changes.get("student", {}):
        pytest.importorskip("peft")
    found = profile_of(prepared_variant(tmp_path, **changes), gate=4)
    assert found.gates is not None
    for name in ("wide", "gpt"):
        gate, one = found.gates[name], found.teachers[name]
        assert gate is not None
        assert all(math.isfinite(gate.mean[arm]) for arm in ARMS)
        assert one.after is not None
        assert all(0 <= share <= 1.001 for share in (*one.after.share, *one.before.share))
        assert one.covered > 0.5
        assert set(one.cosines) == {"keys", "values"}


@pytest.mark.parametrize(
    "align", [{"direction": "to_teacher", "dim_projector": "linear"}, {"dim_projector": "identity"}]
)
def test_targets_in_another_space_have_no_gate(tmp_path: Path, align: dict[str, Any]) -> None:
    teachers = [tiny.FIELDS["teachers"][0] | {"align": align}]
    found = profile_of(prepared_variant(tmp_path, teachers=teachers, losses=["relation"]), gate=4)
    assert found.gates == {"wide": None}
    assert found.teachers["wide"].after is None


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "spec.yaml"
    path.write_text(json.dumps(tiny.fields(**changes) | {"output": str(folder / "runs")}))
    return path


def kava(*words: str | Path) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(list(map(str, words)))
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


VARIANTS = {
    "structured": {},
    "flat": {"teachers.0.align.head_adapter": "flat", "teachers.1.align.head_adapter": "flat"},
    "none": {"losses": []},
}


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "out"
    file = write(tmp_path, variants=VARIANTS)
    assert kava("profile", file, "--gate", "--gate-examples", "4", "--output", folder) == 0
    printed = capsys.readouterr().out
    for word in ("variants side by side", "flat: what every stage holds", "true − shuffled", "(n = 4"):
        assert word in printed
    assert "structured: failed: " in printed
    assert "note: the student has random weights" in printed
    kept = json.loads((folder / "profile.json").read_text())
    assert list(kept) == ["structured", "flat"]
    assert kept["flat"]["gates"]["gpt"]["open"] in (True, False)
    assert Image.open(folder / "profile.png").size[0] > 1000


def test_as_json_nothing_else_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kava("profile", write(tmp_path), "--format", "json") == 0
    kept = json.loads(capsys.readouterr().out)["main"]
    assert kept["gates"] is None
    assert kept["stages"][0]["numbers"]["shape"][0] == 8
    assert kept["teachers"]["wide"]["covered"] > 0.5


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"losses": []}, "no variant compares a teacher's cache"),
        ({"store": {"folder": "kept"}}, "a store holds targets that are aligned already; set store=null"),
        ({"trajectory": "latent", "latent": {"count": 2}}, "trajectory: latent is not profiled"),
    ],
)
def test_what_it_does_not_do_is_said_in_one_line(
    tmp_path: Path, changes: dict[str, Any], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kava("profile", write(tmp_path, **changes)) == SpecError.exit_code
    captured = capsys.readouterr()
    assert told in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
