"""Hashes, duplicates and contamination against brute force."""

import hashlib
from pathlib import Path
from random import Random

from kava_core.data.examples import Example
from kava_core.data.splits import Splits, count_contaminated, load_splits, split_hash
from kava_core.specfile.sections.data import ChainData


def asks(*prompts: str) -> list[Example]:
    return [Example(prompt, "r", "a") for prompt in prompts]


def test_the_hash_is_that_of_the_written_lines():
    examples = [Example("p", "é\n", "a"), Example('"', "🙂", "b", "math")]
    lines = (
        rb'{"answer":"a","prompt":"p","reasoning":"\u00e9\n","task":null}' b"\n"
        rb'{"answer":"b","prompt":"\"","reasoning":"\ud83d\ude42","task":"math"}' b"\n"
    )  # fmt: skip
    assert split_hash(examples) == hashlib.sha256(lines).hexdigest()
    assert split_hash(examples[::-1]) != split_hash(examples)


def test_report():
    splits = Splits(asks("How  many?", "how many?", "ｈow\nmany?", "why"), asks("WHY ", "who", "who"))
    assert splits.report() == {
        "train": {"examples": 4, "sha256": split_hash(splits.train)},
        "validation": {"examples": 3, "sha256": split_hash(splits.validation)},
        "duplicates_in_train": 2,
        "duplicates_across": 1,
        "contaminated": 0,
    }


def test_operators_are_not_white_space():
    assert Splits(asks("7+3", "7-3"), asks("7*3")).report()["duplicates_in_train"] == 0


def test_thirteen_words_in_a_row():
    words = [f"w{number}" for number in range(20)]
    train = asks("x " + " ".join(words[:13]))
    assert count_contaminated(train, asks(" ".join(words))) == 1
    assert count_contaminated(train, asks(", ".join(words[:13]).upper() + "!")) == 1
    assert count_contaminated(train, asks(" ".join(words[1:13]) + " y", " ".join(words[:12]))) == 0


def test_contamination_by_brute_force():
    random = Random(0)

    def story() -> str:
        return " ".join(random.choice("ab") for _ in range(random.randrange(8, 24)))

    train, validation = asks(*(story() for _ in range(30))), asks(*(story() for _ in range(60)))

    def shares(one: str, two: str) -> bool:
        width = 2 * 13 - 1
        return any(one[start : start + width] in two for start in range(0, len(one) - width + 1, 2))

    expected = sum(any(shares(test.prompt, example.prompt) for example in train) for test in validation)
    assert 0 < expected < 60
    assert count_contaminated(train, validation) == expected


def test_chain_splits_are_clean():
    report = load_splits(ChainData(steps=3, train=400, validation=100), root=Path()).report()
    assert (report["train"]["examples"], report["validation"]["examples"]) == (400, 100)
    assert [report[key] for key in ("duplicates_in_train", "duplicates_across", "contaminated")] == [0, 0, 0]
