"""Attention sinks are told by their tiny values: against loops in float64, and in real models."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kava_core.kv.capture.capture import Capture
from kava_core.kv.maths.sinks import find_sinks, sinks_of, value_lengths
from kava_core.protocols.axes import Cache
from tests.support.files.real_models import real_model
from tests.support.pipeline_helpers import WIDE, cache, timeline


def slow_sinks(values: Tensor, mask: Tensor) -> Tensor:
    """The same by loops: which positions have values below 0.4 of the median, by the geometric mean."""
    found = np.zeros(tuple(mask.shape), dtype=bool)
    batch, layers, _, time, _ = values.shape
    for b in range(batch):
        means = {}
        for t in range(time):
            if mask[b, t]:
                lengths = [float(values[b, layer, :, t].double().norm()) for layer in range(layers)]
                means[t] = math.exp(sum(math.log(length) for length in lengths) / layers)
        # torch's median of an even count is the lower one of the two in the middle.
        usual = sorted(means.values())[(len(means) - 1) // 2] if means else 0
        for t, mean in means.items():
            found[b, t] = mean < 0.4 * usual
    return torch.from_numpy(found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", [{}, {"left": 2}, {"right": 3}])
def test_they_are_those_of_loops(dtype: torch.dtype, padding: dict[str, int]) -> None:
    mask = timeline((5, 4, 3), (3, 2, 1), **padding).mask
    values = cache(WIDE, mask.shape[1], dtype=dtype).values
    factors = torch.empty(mask.shape).uniform_(0.2, 1.5, generator=torch.Generator().manual_seed(2))
    values = (values * factors[:, None, None, :, None]).to(dtype)
    sinks = find_sinks(value_lengths(values), mask)
    assert torch.equal(sinks, slow_sinks(values, mask))
    assert sinks.any()
    assert not sinks.all()


def test_padding_and_the_rest_of_the_batch_change_nothing() -> None:
    mask = timeline((5, 4, 3), (3, 2, 1)).mask
    values = cache(WIDE, 12).values
    values[0, :, :, 7] *= 0.1
    sinks = sinks_of(Cache(values=values), mask)
    assert sinks.nonzero().tolist() == [[0, 7]]
    values[1, :, :, 6:] = 1e6
    assert torch.equal(sinks_of(Cache(values=values), mask), sinks)
    assert torch.equal(sinks_of(Cache(values=values[:1]), mask[:1]), sinks[:1])


@pytest.mark.parametrize("time", [0, 1, 2])
def test_short_texts_have_none(time: int) -> None:
    mask = torch.ones(2, time, dtype=torch.bool)
    assert not sinks_of(cache(WIDE, time), mask).any()
    assert not sinks_of(Cache(keys=cache(WIDE, time).keys), mask).any()
    assert not sinks_of(cache(WIDE, time), ~mask).any()


def test_what_is_not_finite_is_no_sink_and_no_gradient_passes() -> None:
    values = cache(WIDE, 6).values.requires_grad_()
    mask = torch.ones(2, 6, dtype=torch.bool)
    assert not value_lengths(values).requires_grad
    broken = values.detach().clone()
    broken[0, 1, 0, 2] = math.nan
    broken[1, 0, 0, 3] = math.inf
    broken[1, :, :, 4] = 0
    assert find_sinks(value_lengths(broken), mask).nonzero().tolist() == [[1, 4]]


@pytest.mark.parametrize(("name", "later_sinks"), [("smollm2-135m", 0), ("gemma3-270m", 4)])
def test_real_models_have_the_sinks_that_are_documented(
    name: str, later_sinks: int, shared_data: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    path = real_model(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    lines = (shared_data / "gsm8k/test.jsonl").read_text(encoding="utf-8").splitlines()
    capture, later = Capture(model), 0
    for line in lines[:10]:
        example = json.loads(line)
        ids = tokenizer(f"{example['question']}\n{example['answer']}", return_tensors="pt").input_ids
        with torch.no_grad(), capture:
            model(ids, use_cache=False)
        [sinks] = sinks_of(capture.take(), torch.ones_like(ids, dtype=torch.bool))
        assert sinks[0]
        later += int(sinks[1:].sum())
    assert later == later_sinks
