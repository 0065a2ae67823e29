"""Which tokens of two tokenizers meet, against loops over characters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kava_core.data.collate import Collator, Reading
from kava_core.data.examples import Example
from kava_core.distill.cross_tokenizer.token_groups import (
    PairedGroups,
    TokenGroups,
    pair_by_characters,
    pair_by_order,
)
from kava_core.specfile.sections.data import Template
from tests.support import tiny_models

TEMPLATE = Template(prompt="{prompt}=", reasoning="{reasoning}", answer=" #{answer}")
LONG = Template(prompt="say: {prompt}=", reasoning="{reasoning}", answer=" #{answer}")
EXAMPLES = [
    Example("10+20", " 30 and 4", "34"),
    Example("4-1+1", " 3 and and 40", "44"),
    Example("5+1", " naïve 🙂 6", "6"),
]


def sides(
    *, rows: int = 3, reading: Reading | None = None, **how: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    own, theirs = tiny_models.tokenizer("chars"), tiny_models.tokenizer("bpe")
    readings = {} if reading is None else {"t": reading}
    batch = Collator(own, {"t": theirs}, TEMPLATE, readings=readings, **how)(EXAMPLES[:rows])
    return batch["student"], batch["teachers"]["t"]


def listed(groups: TokenGroups) -> list[list[tuple[int, int]]]:
    """Row and token of every token, group by group."""
    found = []
    for first, stop in zip(groups.starts[:-1].tolist(), groups.starts[1:].tolist(), strict=True):
        found.append(
            list(zip(groups.rows[first:stop].tolist(), groups.tokens[first:stop].tolist(), strict=True))
        )
    return found


def paired(pairs: PairedGroups) -> list[tuple[Any, Any]]:
    return list(zip(listed(pairs.student), listed(pairs.teacher), strict=True))


def tokens_of(side: dict[str, Any], example: int) -> list[tuple[int, int, int, int, bool]]:
    """Position, token, first and last character, and whether the token may count."""
    found = []
    for place in range(side["input_ids"].shape[1]):
        begin, end = side["spans"][example, place].tolist()
        real = bool(side["attention_mask"][example, place])
        labelled = "labels" not in side or int(side["labels"][example, place]) != -100
        if real and end > begin:
            found.append((place, int(side["input_ids"][example, place]), begin, end, labelled and place > 0))
    return found


def groups_by_loop(student: dict[str, Any], teacher: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Join whatever shares a character until nothing changes."""
    found = []
    for example in range(len(student["input_ids"])):
        time, t_time = student["input_ids"].shape[1], teacher["input_ids"].shape[1]
        sets: list[tuple[set[int], list[Any], list[Any]]] = []
        for which, side in enumerate((student, teacher)):
            for token in tokens_of(side, example):
                group: tuple[set[int], list[Any], list[Any]] = (set(range(token[2], token[3])), [], [])
                group[1 + which].append(token)
                for other in [one for one in sets if one[0] & group[0]]:
                    sets.remove(other)
                    group = (group[0] | other[0], other[1] + group[1], other[2] + group[2])
                sets.append(group)
        for _, own, theirs in sorted(sets, key=lambda one: min(one[0])):
            if not own or not theirs or not all(token[4] for token in own + theirs):
                continue
            found.append(
                (
                    [(example * time + place - 1, token) for place, token, *_ in sorted(own)],
                    [(example * t_time + place - 1, token) for place, token, *_ in sorted(theirs)],
                )
            )
    return found


@pytest.mark.parametrize("loss_on", ["completion", "all"])
@pytest.mark.parametrize("multiple", [1, 16])
def test_groups_share_their_characters(loss_on: Any, multiple: int) -> None:
    student, teacher = sides(loss_on=loss_on, pad_to_multiple=multiple)
    found = paired(pair_by_characters(student, teacher))
    assert found == groups_by_loop(student, teacher)
    assert any(len(own) > 1 and len(theirs) == 1 for own, theirs in found)
    assert any(len(own) == len(theirs) == 1 for own, theirs in found)
    assert any(len(theirs) > 1 for _, theirs in found)  # the bytes of one character


def test_groups_do_not_depend_on_the_batch() -> None:
    """Padding and other examples change rows alone."""
    together, alone = sides(), sides(rows=1)
    found = [
        [([token for _, token in own], [token for _, token in theirs]) for own, theirs in paired(pairs)]
        for pairs in (pair_by_characters(*together), pair_by_characters(*alone))
    ]
    assert found[0][: len(found[1])] == found[1]
    assert len(found[0]) > len(found[1]) > 0


@pytest.mark.parametrize("reading", [None, Reading(LONG)])
def test_order_pairs_the_kth_tokens_of_both_completions(reading: Reading | None) -> None:
    student, teacher = sides(reading=reading)
    expected = []
    for example in range(len(EXAMPLES)):
        own, theirs = (
            [place for place in range(side["input_ids"].shape[1]) if side["segments"][example, place] > 0]
            for side in (student, teacher)
        )
        for place, t_place in zip(own, theirs, strict=False):
            has_text = all(
                int(side["spans"][example, where, 1]) > int(side["spans"][example, where, 0])
                for side, where in ((student, place), (teacher, t_place))
            )
            if has_text:
                row = example * student["input_ids"].shape[1] + place - 1
                t_row = example * teacher["input_ids"].shape[1] + t_place - 1
                token = int(student["input_ids"][example, place])
                t_token = int(teacher["input_ids"][example, t_place])
                expected.append(([(row, token)], [(t_row, t_token)]))
    assert paired(pair_by_order(student, teacher)) == expected
    assert len(expected) > 10


@pytest.mark.parametrize("pair", [pair_by_order, pair_by_characters])
def test_without_labels_nothing_meets(pair: Any) -> None:
    student, teacher = sides()
    student["labels"] = torch.full_like(student["labels"], -100)
    pairs = pair(student, teacher)
    assert len(pairs) == 0
    assert pairs.student.starts.tolist() == [0]


@pytest.mark.parametrize("pair", [pair_by_order, pair_by_characters])
def test_a_batch_without_positions_has_no_pairs(pair: Any) -> None:
    student, teacher = ({name: x[:, :0] for name, x in side.items()} for side in sides())
    assert len(pair(student, teacher)) == 0


@pytest.mark.parametrize("pair", [pair_by_order, pair_by_characters])
def test_padding_on_the_left_is_the_same(pair: Any) -> None:
    student, teacher = sides(rows=1)
    shifted = {
        name: torch.nn.functional.pad(x, (0, 0, 3, 0) if name == "spans" else (3, 0), value=fill)
        for (name, x), fill in zip(student.items(), (0, 0, -1, 0, -100), strict=True)
    }
    plain, padded = paired(pair(student, teacher)), paired(pair(shifted, teacher))
    moved = [([(row - 3, token) for row, token in own], theirs) for own, theirs in padded]
    assert moved == plain
