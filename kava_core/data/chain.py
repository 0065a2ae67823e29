"""Generate chain arithmetic: ``7+3*2-5`` modulo m, worked from left to right. No torch here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from random import Random
from typing import TypeVar

from kava_core.data.examples import Example
from kava_core.errors import SpecError
from kava_core.specfile.sections.data import ChainData

Choice = TypeVar("Choice")


def chain_examples(data: ChainData) -> tuple[list[Example], list[Example]]:
    """Return training and validation examples: all different, and the same on every machine for one seed.

    The validation examples depend on nothing but the task, their number and the seed; a longer training
    split begins with the shorter one.

    Raises:
        SpecError: fewer different chains exist than are asked for.
    """
    check_enough_chains(data)
    seen: set[str] = set()
    validation = _first_new_chains(data, "validation", data.validation, seen)
    train = _first_new_chains(data, "train", data.train_skip + data.train, seen)[data.train_skip :]
    return train, validation


def allowed_operands(operation: str, modulus: int) -> list[int]:
    """Return the right-hand sides of an operation: 1 … m−1; for ``*`` the residues coprime to m, and 2.

    Only 2 may lose information, so that products rarely collapse to 0.
    """
    if operation in "+-":
        return list(range(1, modulus))
    return [number for number in range(1, modulus) if number == 2 or math.gcd(number, modulus) == 1]


def check_enough_chains(data: ChainData) -> None:
    """Check that there are enough different chains.

    Two groups may contain the same chain, so only the chains of the largest group are sure to differ.

    Raises:
        SpecError: fewer different chains exist than are asked for.
    """
    possible = max(_possible_chains(data, group) for group in data.groups or (data.operations,))
    train = data.train_skip + data.train
    if train + data.validation > possible:
        operations = f"groups={list(data.groups)}" if data.groups else f"operations={data.operations!r}"
        raise SpecError(
            f"data: {train} training and {data.validation} validation chains were asked for, but only "
            f"{possible} different ones exist with steps={data.steps}, modulus={data.modulus}, {operations}"
        )


def _possible_chains(data: ChainData, operations: str) -> int:
    per_step = sum(len(allowed_operands(operation, data.modulus)) for operation in set(operations))
    return int(data.modulus * per_step**data.steps)


def _first_new_chains(data: ChainData, split: str, count: int, seen: set[str]) -> list[Example]:
    """Return the first ``count`` chains of a split that are not in ``seen``, and add them to it."""
    examples: list[Example] = []
    chains = _random_chains(data, split)
    while len(examples) < count:
        example = next(chains)
        if example.prompt not in seen:
            seen.add(example.prompt)
            examples.append(example)
    return examples


def _random_chains(data: ChainData, split: str) -> Iterator[Example]:
    """Iterate over the random chains of a split, without end; some are equal."""
    random = Random(f"kava chain {data.seed} {split}")
    all_operations = "".join(data.groups or data.operations)
    operands = {operation: allowed_operands(operation, data.modulus) for operation in all_operations}
    while True:
        yield _random_chain(random, data, operands)


def _random_chain(random: Random, data: ChainData, operands: dict[str, list[int]]) -> Example:
    result = _pick_one(random, range(data.modulus))
    prompt, reasoning = str(result), ""
    operations = _pick_one(random, data.groups) if data.groups else data.operations
    for _ in range(data.steps):
        operation = _pick_one(random, operations)
        operand = _pick_one(random, operands[operation])
        result = _apply_operation(operation, result, operand) % data.modulus
        prompt += f"{operation}{operand}"
        reasoning += f" {result}"
    task = operations if data.groups else "chain"
    return Example(prompt, reasoning, str(result), task=task)


def _apply_operation(operation: str, left: int, right: int) -> int:
    return {"+": left + right, "-": left - right, "*": left * right}[operation]


def _pick_one(random: Random, options: Sequence[Choice]) -> Choice:
    # random() is the one method whose numbers Python promises to keep from version to version.
    return options[int(random.random() * len(options))]
