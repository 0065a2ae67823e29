"""Chain arithmetic against Python's own arithmetic, and its promises about splits."""

import math
import os
import re
import subprocess
import sys

import pytest

from kava_core.data.chain import allowed_operands, chain_examples
from kava_core.data.splits import split_hash
from kava_core.errors import SpecError
from kava_core.specfile.sections.data import ChainData


def worked(prompt: str, modulus: int) -> list[int]:
    """Results of the chain, by brute force."""
    result, results = int(re.match(r"\d+", prompt)[0]), []
    for operation, operand in re.findall(r"([-+*])(\d+)", prompt):
        result = eval(f"({result}) {operation} {operand}") % modulus
        results.append(result)
    return results


@pytest.mark.parametrize(
    ("modulus", "steps", "operations"), [(10, 5, "+-*"), (97, 3, "*"), (2, 8, "+*"), (3, 6, "-")]
)
def test_reasoning_is_arithmetic(modulus, steps, operations):
    data = ChainData(modulus=modulus, steps=steps, operations=operations, train=8, validation=8)
    for examples in chain_examples(data):
        assert len(examples) == 8
        for example in examples:
            results = worked(example.prompt, modulus)
            assert len(results) == steps
            assert example.reasoning == "".join(f" {result}" for result in results)
            assert example.answer == str(results[-1])
            assert set(re.sub(r"\d", "", example.prompt)) <= set(operations)


@pytest.mark.parametrize("modulus", [2, 3, 9, 10, 97])
def test_operands(modulus):
    units = {a for a in range(1, modulus) if math.gcd(a, modulus) == 1}
    assert set(allowed_operands("*", modulus)) == (units | {2} if modulus > 2 else {1})
    assert allowed_operands("+", modulus) == allowed_operands("-", modulus) == list(range(1, modulus))


def test_all_chains_differ_and_all_kinds_occur():
    train, validation = chain_examples(ChainData(steps=2, train=3000, validation=1000))
    prompts = [example.prompt for example in [*train, *validation]]
    assert len(set(prompts)) == 4000
    assert {prompt[1] for prompt in prompts} == set("+-*")
    assert {prompt[0] for prompt in prompts} == set("0123456789")


def test_splits_do_not_depend_on_each_others_size():
    train, validation = chain_examples(ChainData(steps=4, train=50, validation=40))
    more, same = chain_examples(ChainData(steps=4, train=500, validation=40))
    assert same == validation
    assert more[:50] == train


def test_seeds_differ():
    one, two = (chain_examples(ChainData(train=20, validation=20, seed=seed)) for seed in (0, 1))
    assert one[0] != two[0]
    assert one[1] != two[1]


def test_the_whole_space_can_be_asked_for_and_not_one_more():
    possible = 3 * (2 + 2) ** 2
    train, validation = chain_examples(
        ChainData(modulus=3, steps=2, operations="+-", train=possible - 5, validation=5)
    )
    assert len({example.prompt for example in [*train, *validation]}) == possible
    with pytest.raises(SpecError) as caught:
        chain_examples(ChainData(modulus=3, steps=2, operations="+-+", train=possible - 4, validation=5))
    assert str(caught.value) == (
        "data: 44 training and 5 validation chains were asked for, but only 48 different ones exist with "
        "steps=2, modulus=3, operations='+-+'"
    )


def test_the_same_examples_in_another_process():
    code = (
        "from kava_core.data.chain import chain_examples\n"
        "from kava_core.data.splits import split_hash\n"
        "from kava_core.specfile.sections.data import ChainData\n"
        "import sys\n"
        "print(*map(split_hash, chain_examples(ChainData(train=30, validation=20))), 'torch' in sys.modules)"
    )
    run = [sys.executable, "-c", code]
    printed = [
        subprocess.run(
            run, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    here = map(split_hash, chain_examples(ChainData(train=30, validation=20)))
    assert printed == [" ".join(here) + " False\n"] * 2


def test_a_teachers_examples_can_be_others_than_its_students() -> None:
    data = ChainData(steps=3, train=40, validation=10)
    train, validation = chain_examples(data)
    later, same = chain_examples(data.model_copy(update={"train_skip": 40, "train": 20}))
    longer, _ = chain_examples(data.model_copy(update={"train": 60}))
    assert (later, same) == (longer[40:], validation)
    assert not {e.prompt for e in train} & {e.prompt for e in later}


def test_skipped_examples_count_as_asked_for() -> None:
    with pytest.raises(SpecError, match="2060 training and 10 validation chains were asked for"):
        chain_examples(ChainData(steps=1, modulus=5, train=60, train_skip=2000, validation=10))
