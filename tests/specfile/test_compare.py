"""The section ``compare``: controls by one word, pairs, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kava_core.errors import SpecError
from kava_core.jobs.check import check
from kava_core.specfile.digest import spec_digest
from kava_core.specfile.load import load_spec
from kava_core.specfile.sections.compare import CompareSpec
from kava_core.specfile.variants import chosen_runs, treatment_variant
from tests.support.repository import MINIMAL_SPEC

TEXT = MINIMAL_SPEC.read_text(encoding="utf-8")


def test_controls_are_the_treatment_with_one_thing_broken(resolve: Any) -> None:
    specs = resolve(
        "variants:\n  light: {}\n  heavy: {losses.0.weight: 2.5}\n"
        "compare:\n  treatment: heavy\n  controls: [no_kv, shuffled_teacher, random_alignment]\n"
    )
    assert list(specs) == ["light", "heavy", "no_kv", "shuffled_teacher", "random_alignment"]
    heavy = specs["heavy"]
    assert (specs["no_kv"].losses, heavy.losses[0].weight) == ((), 2.5)
    assert specs["shuffled_teacher"].train.shuffle_teacher
    assert specs["shuffled_teacher"].losses == heavy.losses
    drawn = specs["random_alignment"].teachers[0].align.dim_projector
    assert (drawn.name, drawn.trainable, drawn.init) == ("linear", False, "random")
    same = [
        spec.model_copy(update={"losses": heavy.losses, "train": heavy.train, "teachers": heavy.teachers})
        for spec in specs.values()
    ]
    assert len({spec_digest(spec) for spec in same}) == 1
    assert all(spec.compare is None and spec.variants == {} for spec in specs.values())


STAND_INS = {
    "untrained_teacher": "random_weights",
    "shuffled_weights": "shuffled_weights",
    "token_identity": "token_identity",
}


def test_controls_that_know_nothing_stand_in_for_every_teacher(resolve: Any) -> None:
    two = "teachers: [{name: a, path: elsewhere}, {name: b, path: there, stand_in: {kind: token_identity}}]"
    specs = resolve(
        f"variants:\n  kv: {{}}\n  two: {{{two}}}\n"
        "compare:\n  treatment: two\n  controls: [untrained_teacher, shuffled_weights, token_identity]\n"
    )
    treatment = specs["two"]
    for control, kind in STAND_INS.items():
        stand_ins = [teacher.stand_in for teacher in specs[control].teachers]
        assert [(each.kind, each.seed) for each in stand_ins if each] == [(kind, 0), (kind, 0)]
        without = specs[control].model_copy(update={"teachers": treatment.teachers})
        assert spec_digest(without) == spec_digest(treatment) != spec_digest(specs[control])


def test_a_teacher_without_a_stand_in_has_the_digest_it_always_had(resolve: Any) -> None:
    """Runs of a version without stand-ins are found again, and so are their stores and layer maps."""
    teacher = resolve("")["main"].teachers[0]
    assert "stand_in" not in teacher.model_dump(mode="json")
    assert teacher.has_weights


def test_a_frozen_probe_keeps_the_student(resolve: Any) -> None:
    specs = resolve("compare: {controls: [frozen_probe]}\n")
    assert {name: spec.student.frozen for name, spec in specs.items()} == {
        "main": False,
        "frozen_probe": True,
    }


def test_hidden_states_and_cross_logits_have_controls_without_kv_losses(resolve: Any) -> None:
    specs = resolve(
        "variants: {a: {losses: [], hidden: {}}}\ncompare: {controls: [shuffled_teacher, random_alignment]}\n"
    )
    assert specs["shuffled_teacher"].train.shuffle_teacher
    assert specs["random_alignment"].teachers[0].align.dim_projector.name == "linear"
    assert all(spec.hidden is not None for spec in specs.values())
    specs = resolve(
        "variants: {a: {losses: [], cross_logits: {}}}\ncompare: {controls: [shuffled_teacher]}\n"
    )
    assert specs["shuffled_teacher"].cross_logits == specs["a"].cross_logits


def test_the_first_variant_is_the_treatment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s.yaml").write_text(TEXT + "variants:\n  b: {}\n  a: {}\n", encoding="utf-8")
    assert treatment_variant(load_spec("s.yaml").spec) == "b"
    assert treatment_variant(load_spec("s.yaml", ["compare.treatment=a"]).spec) == "a"


def test_no_kv_may_train_longer(resolve: Any) -> None:
    specs = resolve("compare: {controls: [no_kv, shuffled_teacher], no_kv_steps: 11}\n")
    assert [spec.train.steps for spec in specs.values()] == [3, 11, 3]


def test_a_comparison_changes_no_run(resolve: Any) -> None:
    alone, compared = resolve("")["main"], resolve("compare: {controls: [no_kv]}\n")["main"]
    assert spec_digest(alone) == spec_digest(compared)


def test_unknown_names_are_told_at_their_lines(refused: Any) -> None:
    text = "variants:\n  kv: {}\n  wide: {}\ncompare:\n  treatment: vk\n  pairs:\n    - [kv, wid]\n"
    first = TEXT.count("\n") + 5
    found = refused(text)
    possible = "possible: kv, wide"
    assert found == [
        f"s.yaml:{first}:14: compare.treatment: no variant 'vk'; {possible}",
        f"s.yaml:{first + 2}:12: compare.pairs.0.1: no variant 'wid'; {possible}; did you mean 'wide'?",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "variants: {no_kv: {}}\ncompare: {controls: [no_kv]}\n",
            "variant 'no_kv' exists already; rename it",
        ),
        (
            "variants: {a: {losses: []}}\ncompare: {controls: [no_kv]}\n",
            "has no KV losses: nothing to control",
        ),
        (
            "variants: {a: {losses: [], cross_logits: {}}}\ncompare: {controls: [random_alignment]}\n",
            "the treatment has no KV losses or hidden states: nothing to control",
        ),
        ("compare: {controls: [no_kv, no_kv]}\n", "'controls' must differ"),
        ("compare: {pairs: [[main, main]]}\n", "compare two different variants"),
        ("compare: {metric: steps_to_target}\n", "'target' goes with 'metric: steps_to_target'"),
        ("compare: {metric: relation}\n", "'metric: relation' needs 'goal'"),
        (
            "compare: {metric: steps_to_target, target: 1, of: relation}\n",
            "possible: exact_match, ce, perplexity",
        ),
        ("compare: {target: 0.9}\n", "'target' goes with 'metric: steps_to_target'"),
        ("compare: {controls: [shuffled_teachers]}\n", "did you mean 'shuffled_teacher'?"),
        ("compare: {unequal: [time]}\n", "flops"),
        ("variants: {a: {compare.metric: ce}}\n", "a variant cannot change 'compare'"),
    ],
)
def test_what_cannot_be_compared_is_refused(refused: Any, text: str, said: str) -> None:
    found = refused(text)
    assert any(said in line and line.startswith("s.yaml:") for line in found), found


@pytest.mark.parametrize(
    ("fields", "lower"),
    [
        ({}, False),
        ({"metric": "ce"}, True),
        ({"metric": "perplexity"}, True),
        ({"metric": "steps_to_target", "target": 0.9}, True),
        ({"metric": "flops_to_target", "target": 0.9}, True),
        ({"metric": "relation", "goal": "lower"}, True),
        ({"metric": "ce", "goal": "higher"}, False),
    ],
)
def test_which_way_is_better(fields: dict[str, Any], lower: bool) -> None:
    assert CompareSpec(**fields).lower_is_better is lower


def test_single_runs_are_chosen_by_name(resolve: Any) -> None:
    specs = resolve("variants: {a: {}, b: {}}\n", "seeds=[3,5]")
    assert [(name, seed) for name, seed, _ in chosen_runs(specs)] == [("a", 3), ("a", 5), ("b", 3), ("b", 5)]
    assert [(name, seed) for name, seed, _ in chosen_runs(specs, "b", 5)] == [("b", 5)]
    with pytest.raises(SpecError, match=r"--variant: no variant 'c'; possible: a, b"):
        chosen_runs(specs, "c")
    with pytest.raises(SpecError, match=r"--seed: the spec has no seed 4; possible: 3, 5"):
        chosen_runs(specs, "a", 4)


def test_check_counts_the_chains_that_pretraining_asks_for(tmp_path: Path) -> None:
    plan = "    pretrain: {steps: 2, data: {train_skip: 8192, train: 100000000}}\n"
    text = TEXT.replace("losses:", plan + "losses:")
    (tmp_path / "s.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(SpecError, match=r"100008192 training and 512 validation chains were asked for"):
        list(check(tmp_path / "s.yaml"))
