"""Specs damaged at random: every failure is a SpecError in plain words, each line with a place."""

from __future__ import annotations

import copy
import random
import re
from typing import Any

import pytest

from kava_core.errors import SpecError
from kava_core.registry import Registry
from kava_core.specfile.bind import bind_spec_model
from kava_core.specfile.load import validate_document
from kava_core.specfile.reading.document import Document
from kava_core.specfile.reading.source_map import SourceLocation
from kava_core.specfile.reading.yaml_loader import parse_yaml

FULL = """
name: full
student:
  {config: {model_type: llama}, tokenizer: {kind: bpe, vocab_size: 9}, pretrain: {steps: 2}, lora: {rank: 4}}
teachers:
  - name: one
    path: somewhere
    align:
      layer_mapper: {name: ratio, sources: 2}
      head_adapter: {name: structured, init: random, seed: 1}
      time_warper: {name: segment, ratio: {reasoning: 0.5}, smoothing: {answer: 3}, segments: [answer]}
      dim_projector: {name: linear, share_kv: true}
  - {name: two, path: elsewhere, align: {head_adapter: flat}}
target: separate
fuser: {name: fixed, weights: {one: 1, two: 0.5}}
losses: [relation, {name: smooth_l1, beta: 2, layers: [0, -1], parts: [keys]}]
data: {name: hub, path: x, columns: {prompt: q}, template: {answer: "= {answer}"}}
train: {steps: 5, trackers: [wandb], learning_rate: 1e-3, shuffle_teacher: true}
evaluate: {every: 2, generate: false}
seeds: [0, 1]
variants: {a: {train.steps: 3}}
"""
ODD = [
    None,
    True,
    0,
    -1,
    1.5,
    1e400,
    10**30,
    "",
    "x",
    "chain",
    "name",
    [],
    ["x"],
    [[]],
    {},
    {"name": "x"},
    {"x": {}},
]
JARGON = re.compile(r"Input|valid |literal\[|pydantic|tuple|dict|ValueError|Value error|None|should|\{'")


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every path in a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(below for key, inner in items for below in paths(inner, (*path, key)))]


def damage(data: Any, random_: random.Random) -> None:
    """Replace, remove, rename or add something anywhere."""
    path = random_.choice(paths(data)[1:])
    holder = data
    for part in path[:-1]:
        holder = holder[part]
    kind = random_.choice(["replace", "remove", "add"])
    if kind == "remove":
        del holder[path[-1]]
    elif kind == "add" and isinstance(holder, dict):
        holder[random_.choice(["nmae", "weight", "a", str(path[-1]) + "s"])] = random_.choice(ODD)
    else:
        holder[path[-1]] = copy.deepcopy(random_.choice(ODD))


@pytest.mark.parametrize("seed", range(6))
def test_damaged_specs_fail_in_plain_words(seed: int) -> None:
    registry = Registry.build()
    model, random_ = bind_spec_model(registry), random.Random(seed)
    whole, places = parse_yaml(FULL, SourceLocation("s.yaml", 1, 1))
    validate_document(Document(whole, places), model, registry)
    failed = 0
    for _ in range(150):
        data = copy.deepcopy(whole)
        for _ in range(random_.randint(1, 3)):
            damage(data, random_)
        try:
            validate_document(Document(data, places), model, registry)
        except SpecError as error:
            failed += 1
            for line in str(error).splitlines():
                assert re.match(r"s\.yaml:\d+:\d+: \S", line), line
                assert not JARGON.search(line), line
    assert failed > 75
