"""Rules between the blocks of a spec: each is broken once, and gives its message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kava_core.errors import SpecError
from kava_core.jobs.check import check
from kava_core.registry import Registry
from kava_core.specfile.load import load_spec
from kava_core.specfile.sections import rules
from kava_core.specfile.sections.rules import RULES
from tests.support.repository import MINIMAL_SPEC

LATENT = "trajectory=latent"
BIG = "name: big, path: elsewhere"
ITSELF = "teachers=[{name: own, itself: {}}]"
ENCODER = "teachers=[{name: enc, path: elsewhere, encoder: true}]"
CHAR_IOU = "align: {time_warper: char_iou}"

CASES: dict[str, tuple[list[str], str]] = {
    "itself-model": (
        [LATENT, "teachers=[{name: own, itself: {}, path: elsewhere}]"],
        "teacher 'own' is the student itself: leave out 'path'",
    ),
    "teacher-names-differ": (
        [f"teachers=[{{{BIG}}}, {{{BIG}}}]"],
        "teachers must have different names, not big, big",
    ),
    "teacher-name-reserved": (
        ["teachers.0.name=student"],
        "a teacher cannot be called 'student': records use that name",
    ),
    "losses-teacher": (["teachers=[]"], "'losses' need at least one teacher"),
    "pretrain-data": (
        ["student.pretrain={steps: 1, data: {modulus: 1}}"],
        "modulus: must be at least 2, not 1",
    ),
    "stand-in-itself": (
        [LATENT, "teachers=[{name: own, itself: {}, stand_in: {kind: token_identity}}]"],
        "teacher 'own': stand_in 'token_identity' replaces a teacher, and this one is the student itself",
    ),
    "stand-in-quantize": (
        ["teachers.0.stand_in.kind=random_weights", "teachers.0.quantize=int8"],
        "teacher 'big': stand_in 'random_weights' changes weights, and quantised ones cannot be changed; set "
        "its 'quantize: null', or use token_identity, which has none",
    ),
    "stand-in-logits": (
        ["teachers.0.stand_in.kind=shuffled_weights", "logits={}"],
        "teacher 'big': stand_in 'shuffled_weights' is a control of caches, and its logits are noise or "
        "none; set 'logits: null'",
    ),
    "stand-in-cross-logits": (
        ["teachers.0.stand_in.kind=random_weights", "cross_logits={}"],
        "teacher 'big': stand_in 'random_weights' is a control of caches, and its logits are noise or none; "
        "set 'cross_logits: null'",
    ),
    "stand-in-hidden": (
        ["teachers.0.stand_in.kind=token_identity", "hidden={}"],
        "teacher 'big': stand_in 'token_identity' has keys and values alone, and no hidden states; use "
        "random_weights, or set 'hidden: null'",
    ),
    "stand-in-codi": (
        [LATENT, "teachers.0.stand_in.kind=token_identity", "codi={}"],
        "teacher 'big': stand_in 'token_identity' is a control of caches, and its hidden states are noise or "
        "none; set 'codi: null'",
    ),
    "warper-same-text": (
        [f"teachers=[{{{BIG}, rationale: 1, {CHAR_IOU}}}]"],
        "teacher 'big' reads another text than the student (rationale), but time_warper 'char_iou' compares "
        "the characters of one text; use segment",
    ),
    "warper-whole-text": (
        [LATENT, f"teachers=[{{{BIG}, {CHAR_IOU}}}]"],
        "teacher 'big': time_warper 'char_iou' matches whole texts, and latent tokens stand for the "
        "reasoning alone; use segment, uniform, crop or rkv",
    ),
    "warper-latent-only": (
        ["teachers.0.align.time_warper=rkv"],
        "teacher 'big': time_warper 'rkv' chooses tokens for latent ones and needs 'trajectory: latent'; "
        "uniform, crop and segment do not",
    ),
    "logits-teacher": (["losses=[]", "teachers=[]", "logits={}"], "'logits' needs at least one teacher"),
    "logits-unknown-teacher": (
        ["logits.teachers=[bog]"],
        "'logits.teachers': no teacher 'bog'; there are big",
    ),
    "logits-shuffled": (
        ["logits={}", "train.shuffle_teacher=true"],
        "'train.shuffle_teacher' puts another example beside the student, whose tokens are others; set "
        "'logits: null'",
    ),
    "logits-store": (
        ["logits={}", "store.folder=x"],
        "'logits' needs teachers that run, and a store holds no logits; set 'store: null'",
    ),
    "cross-logits-teacher": (
        ["losses=[]", "teachers=[]", "cross_logits={}"],
        "'cross_logits' needs at least one teacher",
    ),
    "cross-logits-unknown-teacher": (
        ["cross_logits.teacher_weights={bog: 2}"],
        "'cross_logits.teacher_weights': no teacher 'bog'; there are big",
    ),
    "cross-logits-same-text": (
        ["cross_logits={}", "teachers.0.rationale=1"],
        "'cross_logits.form: spans' compares the characters of one text, but teacher 'big' reads another "
        "(rationale); use form: sorted",
    ),
    "cross-logits-store": (
        ["cross_logits={}", "store.folder=x"],
        "'cross_logits' needs teachers that run, and a store holds no logits; set 'store: null'",
    ),
    "hidden-teacher": (["losses=[]", "teachers=[]", "hidden={}"], "'hidden' needs at least one teacher"),
    "hidden-unknown-teacher": (
        ["hidden.teachers=[bog]"],
        "'hidden.teachers': no teacher 'bog'; there are big",
    ),
    "hidden-store": (
        ["hidden={}", "store.folder=x"],
        "'hidden' needs teachers that run, and a store holds no hidden states; set 'store: null'",
    ),
    "itself-once": (
        [LATENT, "teachers=[{name: own, itself: {}}, {name: me, itself: {}}]"],
        "only one teacher can be the student itself, not own, me",
    ),
    "codi-latent": (["codi={}"], "codi: needs 'trajectory: latent'"),
    "controls-latent": (["evaluate.controls=true"], "evaluate.controls: needs 'trajectory: latent'"),
    "itself-latent": ([ITSELF], "teacher 'own': itself: needs 'trajectory: latent'"),
    "codi-teacher": (
        [LATENT, "codi={}", f"teachers=[{{{BIG}}}, {{name: two, path: elsewhere}}]"],
        "'codi.teacher': name one of big, two",
    ),
    "codi-unknown-teacher": (
        [LATENT, "codi.teacher=bog"],
        "'codi.teacher': no teacher 'bog'; there are big",
    ),
    "curriculum-terms": (
        [LATENT, "train.steps=7", "latent.curriculum={steps: 1}"],
        "'latent.curriculum' does not go together with losses, codi or step_cross_entropy",
    ),
    "curriculum-steps": (
        [LATENT, "losses=[]", "latent.curriculum={steps: 1}"],
        "'latent.curriculum': all latent tokens are there after 6 steps, but 'train.steps' is 3",
    ),
    "no-latent-losses": ([LATENT, "latent.count=0"], "'latent.count': 0 leaves no latent tokens for losses"),
    "no-latent-step-cross-entropy": (
        [LATENT, "losses=[]", "latent={count: 0, step_cross_entropy: 1}"],
        "'latent.count': 0 leaves no latent tokens for latent.step_cross_entropy",
    ),
    "no-latent-controls": (
        [LATENT, "losses=[]", "latent.count=0", "evaluate.controls=true"],
        "'latent.count': 0 leaves no latent tokens for evaluate.controls",
    ),
    "latent-logits": ([LATENT, "logits={}"], "'trajectory: latent' does not go together with logits yet"),
    "latent-cross-logits": (
        [LATENT, "cross_logits={}"],
        "'trajectory: latent' does not go together with cross_logits yet",
    ),
    "latent-hidden": (
        [LATENT, "hidden={}"],
        "'trajectory: latent' does not go together with hidden yet",
    ),
    "latent-store": (
        [LATENT, "store.folder=x"],
        "'trajectory: latent' does not go together with store yet",
    ),
    "latent-rotary": (
        [LATENT, "rotary=match"],
        "'trajectory: latent' does not go together with rotary: match yet",
    ),
    "latent-compile": (
        [LATENT, "train.compile=inductor"],
        "'trajectory: latent' does not go together with train.compile yet",
    ),
    "itself-stream": (
        [LATENT, ITSELF, "train.stream=true"],
        "'trajectory: latent' does not go together with train.stream beside a teacher that is the student "
        "itself yet",
    ),
    "latent-frozen": (
        [LATENT, "student.frozen=true"],
        "'trajectory: latent' does not go together with student.frozen yet",
    ),
    "frozen-lora": (
        ["student.frozen=true", "student.lora={}"],
        "'student.frozen' leaves no use for 'lora'",
    ),
    "frozen-share": (
        ["student.frozen=true", "losses.0.share=0.1"],
        "'share' weighs gradients of the student's weights; with 'frozen' there are none",
    ),
    "online-latent": ([LATENT, "online={}"], "'online' does not go together with trajectory: latent"),
    "online-store": (["online={}", "store.folder=x"], "'online' does not go together with store"),
    "online-marker": (
        ["online={}", "data.template.answer='{answer}'"],
        "'online' needs a marker before {answer} in 'data.template.answer' to find it by",
    ),
    "online-share": (
        ["online.share=0.01"],
        "'online.share': 0.01 of 'train.batch_size' 32 is none or all of it: use a larger batch (and less "
        "'accumulate') or another share",
    ),
    "all-online-logits": (
        ["online.share=1", "logits={}"],
        "'online.share': 1 leaves no labels for logits",
    ),
    "all-online-cross-logits": (
        ["online.share=1", "cross_logits={}"],
        "'online.share': 1 leaves no labels for cross_logits",
    ),
    "all-online-share": (
        ["online.share=1", "losses.0.share=0.1"],
        "'online.share': 1 leaves no labels for terms with 'share'",
    ),
    "online-text": (
        ["online={}", "teachers.0.last_step=false"],
        "'online': teacher 'big' reads another text than the student (last_step), but all are to read what "
        "the student writes",
    ),
    "encoder-teachers": (
        ["student.encoder=true", "evaluate.generate=false"],
        "'student.encoder': an encoder writes nothing; not with teachers",
    ),
    "encoder-latent": (
        ["student.encoder=true", "evaluate.generate=false", "losses=[]", "teachers=[]", LATENT],
        "'student.encoder': an encoder writes nothing; not with trajectory: latent",
    ),
    "encoder-generate": (
        ["student.encoder=true", "losses=[]", "teachers=[]"],
        "'student.encoder': an encoder writes nothing; not with evaluate.generate: true",
    ),
    "encoder-lora": (
        ["student.encoder=true", "evaluate.generate=false", "losses=[]", "teachers=[]", "student.lora={}"],
        "'student.encoder': an encoder writes nothing; not with student.lora",
    ),
    "encoder-checkpointing": (
        [
            *("student.encoder=true", "evaluate.generate=false", "losses=[]", "teachers=[]"),
            "student.gradient_checkpointing=true",
        ],
        "'student.encoder': an encoder writes nothing; not with student.gradient_checkpointing",
    ),
    "encoder-among-logits": (
        [ENCODER, "logits={}"],
        "'logits.teachers': name teachers that are no encoders, which predict no tokens",
    ),
    "encoder-codi": (
        [LATENT, ENCODER, "codi.teacher=enc"],
        "'codi.teacher': teacher 'enc' is an encoder: it has caches alone",
    ),
    "encoder-logits": (
        [ENCODER, "logits.teachers=[enc]"],
        "'logits.teachers: enc': teacher 'enc' is an encoder: it has caches alone",
    ),
    "encoder-cross-logits": (
        [ENCODER, "cross_logits={}"],
        "'cross_logits.teachers': teacher 'enc' is an encoder: it predicts no tokens",
    ),
    "stream-store": (
        ["train.stream=true", "store.folder=x"],
        "'train.stream' is about teachers that run; a store needs none",
    ),
    "seeds-differ": (["seeds=[1, 1]"], "'seeds' must differ from one another"),
    "shuffled-store": (
        ["train.shuffle_teacher=true", "store.folder=x"],
        "'train.shuffle_teacher' aligns every teacher's cache to another example, which no store holds; set "
        "'store: null'",
    ),
    "shuffled-codi": (
        [LATENT, "train.shuffle_teacher=true", "codi={}"],
        "'train.shuffle_teacher' would give CODI's term another example's states as well; set 'codi: null'",
    ),
}
"""Changes of the minimal spec that break one rule, and the message."""


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry.build()


def test_every_rule_has_a_case_in_the_order_of_the_table() -> None:
    assert list(CASES) == [rule.name for rule in RULES]


@pytest.mark.parametrize("name", CASES)
def test_a_broken_rule_gives_its_message(
    name: str, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, message = CASES[name]
    with pytest.raises(SpecError) as caught:
        load_spec(MINIMAL_SPEC, changes, registry)
    (line,) = str(caught.value).splitlines()
    assert line.removeprefix(f"{MINIMAL_SPEC}:1:1: ") == message
    others = tuple(rule for rule in RULES if rule.name != name)
    monkeypatch.setattr(rules, "RULES", others)
    load_spec(MINIMAL_SPEC, changes, registry)


def test_neighbours_that_are_broken_together_are_one_error(registry: Registry) -> None:
    changes = [LATENT, "logits={}", "rotary=match", "student.frozen=true"]
    with pytest.raises(SpecError, match=r"with logits, rotary: match, student.frozen yet"):
        load_spec(MINIMAL_SPEC, changes, registry)


def test_people_can_read_the_table() -> None:
    assert all(rule.when and rule.what and rule.message for rule in RULES)


def test_check_counts_the_rules(tmp_path: Path) -> None:
    levels: Any = check(MINIMAL_SPEC)
    assert dict(next(levels) for _ in range(3))["rules"] == f"{len(RULES)} rules hold"
