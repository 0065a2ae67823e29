"""Variants: named changes of one spec."""

from __future__ import annotations

from typing import Any

import pytest


def test_no_variants_is_main(resolve: Any) -> None:
    specs = resolve("")
    assert list(specs) == ["main"]
    assert specs["main"].train.steps == 3


def test_each_variant_is_the_base_with_its_changes(resolve: Any) -> None:
    specs = resolve(
        "variants:\n"
        "  base: {}\n"
        "  heavy: {losses.0.weight: 2.5}\n"
        "  alone: {losses: [], teachers: []}\n"
        "  warped:\n"
        "    teachers.0.align.time_warper: linear\n"
        "    teachers.0.align.time_warper.mode: nearest\n"
        "    train: {steps: 7}\n"
    )
    assert list(specs) == ["base", "heavy", "alone", "warped"]
    assert all(spec.variants == {} for spec in specs.values())
    assert [spec.losses[0].weight for spec in (specs["base"], specs["heavy"], specs["warped"])] == [
        1.0,
        2.5,
        1.0,
    ]
    assert (specs["alone"].losses, specs["alone"].teachers) == ((), ())
    assert specs["warped"].teachers[0].align.time_warper.mode == "nearest"
    assert [spec.train.steps for spec in specs.values()] == [3, 3, 3, 7]
    assert [spec.seeds for spec in specs.values()] == [(0,)] * 4


def test_overrides_change_the_base_and_single_variants(resolve: Any) -> None:
    text = "variants:\n  a: {}\n  b: {train.steps: 5}\n"
    specs = resolve(text, "train.steps=9", "variants.a.train.batch_size=2")
    assert [(spec.train.steps, spec.train.batch_size) for spec in specs.values()] == [(9, 2), (5, 32)]


def test_a_variant_does_not_change_another(resolve: Any) -> None:
    specs = resolve(
        "variants:\n  a:\n    train: {steps: 7}\n    train.steps: 8\n  b:\n    train.batch_size: 5\n"
    )
    assert (specs["a"].train.steps, specs["b"].train.steps, specs["b"].train.batch_size) == (8, 3, 5)


def test_errors_of_all_variants_at_their_lines(refused: Any) -> None:
    text = (
        "variants:\n"
        "  a:\n"
        "    losses.0.weight: -1\n"
        "    teachers.0.align.time_warper: {name: segment,\n"
        "      ratio: {prompt: 2}}\n"
        "  b: {losses.3.weight: 1, output: x, name.x: 1, variants: {}}\n"
        "  c: {student.path: gpt2}\n"
    )
    shared = "all variants share it"
    assert refused(text) == [
        "s.yaml:16:22: variant a: losses.0.weight: must be at least 0, not -1",
        "s.yaml:18:23: variant a: teachers.0.align.time_warper.ratio.prompt: must be at most 1, not 2",
        "s.yaml:19:7: variant b: losses: no entry '3'; possible: 0 to 0",
        f"s.yaml:19:27: variant b: a variant cannot change 'output': {shared}",
        f"s.yaml:19:38: variant b: a variant cannot change 'name': {shared}",
        f"s.yaml:19:49: variant b: a variant cannot change 'variants': {shared}",
        "s.yaml:3:3: variant c: student: give exactly one of 'path' (a folder or hub name) and 'config' "
        "(random weights)",
    ]


def test_an_override_of_a_variant_is_named(refused: Any) -> None:
    assert refused("variants:\n  a: {}\n", "variants.a.losses.0.weight=-1") == [
        "override variants.a.losses.0.weight=-1: variant a: losses.0.weight: must be at least 0, not -1"
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("variants: {a: 3}\n", "s.yaml:14:15: variants.a: must be a mapping, not 3"),
        ("variants: [a]\n", "s.yaml:14:11: variants: must be a mapping, not a list"),
        (
            "variants: {../a: {}}\n",
            "s.yaml:14:12: variants.../a: must be letters, digits, '_', '.' and '-', "
            "starting with a letter or digit, not '../a'",
        ),
    ],
)
def test_malformed_variants(refused: Any, text: str, line: str) -> None:
    assert refused(text) == [line]
