"""Capturing a compiled student: one graph, and the gradients of the eager model."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kava_core.kv.capture.capture import Capture
from kava_core.protocols.axes import Cache
from tests.support import quick_python, tiny
from tests.support.tiny_models import WORKS

torch.set_num_threads(1)
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
NAMED = {case.name: case for case in WORKS}
IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
WEIGHTS = torch.randn(2, 3, 2, 9, 8, generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        yield
    torch._dynamo.reset()


def model_of(name: str, *, checkpointed: bool = False) -> nn.Module:
    model = NAMED[name].model(num_hidden_layers=3).train()
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def kv_loss(cache: Cache, capture: Capture) -> Tensor:
    """Keys, values and queries with weights, so that no two layers are alike; a match turns its target."""
    rotation = capture.rotation()
    target = WEIGHTS if rotation is None else rotation.apply(WEIGHTS)
    keys, values = (cache.keys - target).square().mean(), (cache.values - WEIGHTS).square().mean()
    return keys + values + cache.queries.pow(3).mean()


def gradients(model: nn.Module, runs: Any, ids: Tensor = IDS, **options: Any) -> dict[str, Tensor]:
    """Gradients of cross-entropy and the KV loss together, after one forward of ``runs``."""
    model.zero_grad(set_to_none=True)
    capture = Capture(model, parts=("keys", "values", "queries"), **options)
    with capture:
        loss = runs(input_ids=ids, attention_mask=MASK, labels=ids, use_cache=False).loss
    (0 * loss + kv_loss(capture.take(), capture)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def agree(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    assert all(want[f"model.layers.{i}.self_attn.k_proj.weight"].abs().max() > 0 for i in range(3))
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


EVERY = [(rotary, checkpointed) for rotary in ("strip", "keep", "match") for checkpointed in (False, True)]
OFTEN = [("strip", True)]


@pytest.mark.parametrize(
    ("rotary", "checkpointed"),
    [pytest.param(*case, marks=() if case in OFTEN else pytest.mark.release) for case in EVERY],
)
def test_gradients_are_those_of_the_eager_model(rotary: str, checkpointed: bool) -> None:
    model = model_of("Llama", checkpointed=checkpointed)
    want = gradients(model, model, rotary=rotary)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=not checkpointed)
    for ids in (IDS, IDS.flip(1), IDS):
        got = gradients(model, compiled, ids, rotary=rotary)
    agree(got, want)


def test_a_model_is_one_graph_and_stays_so() -> None:
    model = model_of("Llama")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        gradients(model, compiled)
    assert graphs() == 1
    compiled(input_ids=IDS, attention_mask=MASK, labels=IDS, use_cache=False)
    gradients(model, compiled)
    assert graphs() == 2, "one graph with capture, one without"


@pytest.mark.release
@pytest.mark.parametrize("name", ["Gemma 3 (text)", "SmolLM3", "Qwen3"])
def test_layers_of_several_kinds(name: str) -> None:
    kinds = {"Gemma 3 (text)": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
             "SmolLM3": {"no_rope_layers": [1, 0, 1]}}  # fmt: skip
    model = NAMED[name].model(num_hidden_layers=3, **kinds.get(name, {})).train()
    want = gradients(model, model)
    agree(gradients(model, torch.compile(model, backend="aot_eager")), want)


@pytest.mark.release
def test_a_compiled_teacher_gives_the_same_cache() -> None:
    model = model_of("Llama").eval()
    caches = []
    for runs in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        with torch.no_grad(), Capture(model) as capture:
            runs(input_ids=IDS, attention_mask=MASK, use_cache=False)
        caches.append(capture.take())
    torch.testing.assert_close(caches[1].keys, caches[0].keys, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(caches[1].values, caches[0].values, rtol=1e-5, atol=1e-6)


@pytest.mark.release
def test_checkpointed_layers_stay_compiled() -> None:
    """Without the compiler's own switch for side effects every layer would fall back to eager, unsaid."""
    counts = []
    for switch in (True, False):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = model_of("Llama", checkpointed=True)
        with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=switch):
            gradients(model, torch.compile(model, backend="aot_eager"))
        counts.append(sum(torch._dynamo.utils.counters["graph_break"].values()))
    assert counts[0] == 0 < counts[1]


@pytest.mark.release
def test_inductor_gives_the_same_gradients() -> None:
    model = model_of("Llama")
    want = gradients(model, model)
    try:
        got = gradients(model, torch.compile(model))
    except torch._dynamo.exc.BackendCompilerFailed as error:
        pytest.skip(f"inductor needs a C++ compiler: {str(error).splitlines()[0]}")
    agree(got, want)


@pytest.mark.release
def test_a_compiled_run_has_the_losses_of_another(tmp_path: Path) -> None:
    """Shape checking cannot be compiled, so both run in processes of their own."""
    (tmp_path / "spec.json").write_text(json.dumps(tiny.fields(output=str(tmp_path / "runs"))))
    losses = []
    for extra in ([], ["train.compile=aot_eager", "name=compiled"]):
        command = ["-m", "kava_core", "train", str(tmp_path / "spec.json"), "train.steps=2"]
        subprocess.run([quick_python.executable(), *command, *extra], check=True, capture_output=True)
        (file,) = (tmp_path / "runs").glob(f"{'compiled' if extra else 'tiny'}/main-*/metrics.jsonl")
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(losses[0]) == 2
