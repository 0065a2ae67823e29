"""A3: the KV loss reaches the student's k projection with the right gradient, not only a non-zero one.

The reference hooks the projections of both models and spells the alignment out with loops; it shares no
code with capture, rotary handling or the pipeline.
"""

from __future__ import annotations

import copy
import os
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kava_core.build.data import Data, make_data
from kava_core.build.distiller import make_distiller
from kava_core.data.encoding.encode import NO_LABEL
from kava_core.distill.distiller import Distiller
from tests.support import quick_python, tiny
from tests.support.repository import ROOT

SAME_WIDTH = {
    "losses": [{"name": "mse", "parts": ["keys"], "weight": 3.0}],
    "teachers": [
        {
            "name": "wide",
            "config": tiny.llama(num_hidden_layers=4, num_key_value_heads=4),
            "tokenizer": tiny.CHARS,
            "align": {"time_warper": "identity", "dim_projector": "identity", "sinks": "compare"},
        }
    ],
    "target": "fused",
}


def setup(**student: object) -> tuple[Distiller, Data, dict]:
    """A distiller and one batch without cross-entropy labels."""
    spec = tiny.spec(**copy.deepcopy(SAME_WIDTH), student=student)
    data = make_data(spec)
    distiller = make_distiller(spec, data, seed=3)
    batch = data.plain_collator([data.train_items[i] for i in range(4)])
    batch["student"]["labels"] = torch.full_like(batch["student"]["labels"], NO_LABEL)
    return distiller, data, batch


def projected_keys(model: nn.Module, side: dict[str, Tensor], dim: int = 8) -> list[Tensor]:
    """Keys before rotation, ``batch time head dim`` a layer, from hooks on the k projections."""
    seen: list[Tensor] = []
    modules = [m for name, m in model.named_modules() if name.endswith("self_attn.k_proj")]
    hooks = [m.register_forward_hook(lambda _m, _i, out: seen.append(out)) for m in modules]
    model(input_ids=side["input_ids"], attention_mask=side["attention_mask"], use_cache=False)
    for hook in hooks:
        hook.remove()
    return [out.view(*out.shape[:2], -1, dim) for out in seen]


def reference_loss(distiller: Distiller, batch: dict) -> Tensor:
    """3 · mean over layers, real tokens, heads and width of (student − mean of two teacher heads)²."""
    ours = projected_keys(distiller.student, batch["student"])
    with torch.no_grad():
        theirs = projected_keys(distiller.teachers[0].model, batch["teachers"]["wide"])
    mask = batch["student"]["attention_mask"].bool()
    total = torch.zeros(())
    for layer, source in ((0, 1), (1, 3)):
        for head in range(2):
            target = (theirs[source][:, :, 2 * head] + theirs[source][:, :, 2 * head + 1]) / 2
            for b, t in mask.nonzero().tolist():
                total = total + (ours[layer][b, t, head] - target[b, t]).square().mean() / 2
    return 3.0 * total / (2 * mask.sum())


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None and p.grad.any()
    }


def kava_gradients(distiller: Distiller, batch: dict) -> dict[str, Tensor]:
    distiller.zero_grad()
    items = torch.tensor([1.0, float(batch["student"]["attention_mask"].sum())])
    distiller.train()(batch["student"], batch["teachers"], items)["loss"].backward()
    return gradients(distiller.student)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_gradient_of_the_kv_loss_is_right(checkpointing: bool, lora: dict | None) -> None:
    distiller, _, batch = setup(gradient_checkpointing=checkpointing, lora=lora)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, p in distiller.student.named_parameters():
            if "lora_B" in name:  # zero at first, which would hide the gradient of lora_A
                nn.init.normal_(p, std=0.1)
    found = kava_gradients(distiller, batch)
    distiller.zero_grad()
    reference_loss(distiller, batch).backward()
    expected = gradients(distiller.student)
    wanted = "layers.1.self_attn.k_proj" + (".lora_A" if lora else ".weight")
    assert any(wanted in name for name in expected)
    assert found.keys() == expected.keys()
    for name in expected:
        rounding = 1e-6 * float(expected[name].abs().max())
        torch.testing.assert_close(found[name], expected[name], rtol=2e-4, atol=rounding, msg=name)


def test_reentrant_checkpointing_is_refused() -> None:
    distiller, _, batch = setup()
    distiller.student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(Exception, match="reentrant"):
        kava_gradients(distiller, batch)


def test_teachers_are_outside_the_module() -> None:
    distiller, _, batch = setup()
    kava_gradients(distiller, batch)
    teacher = distiller.teachers[0].model
    inside = {id(p) for p in distiller.parameters()}
    assert not inside & {id(p) for p in teacher.parameters()}
    assert not any("teacher" in name for name in distiller.state_dict())
    assert all(not p.requires_grad and p.grad is None for p in teacher.parameters())


WORKER = """
import os, sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tests.distill.test_distiller_gradients import setup, gradients
dist.init_process_group("gloo")
rank = dist.get_rank()
distiller, data, _ = setup(gradient_checkpointing=True)
batch = data.plain_collator([data.train_items[i] for i in range(4)])
labelled = (batch["student"]["labels"][:, 1:] != -100).sum()
items = torch.stack([labelled, batch["student"]["attention_mask"].sum()]).float()
mine = lambda side: {k: v[2 * rank : 2 * rank + 2] for k, v in side.items()}
wrapped = DistributedDataParallel(distiller.train())
out = wrapped(mine(batch["student"]), {n: mine(s) for n, s in batch["teachers"].items()}, items)
(out["loss"] * dist.get_world_size()).backward()
if rank == 0:
    torch.save(gradients(distiller), sys.argv[1])
dist.barrier()
os._exit(0)  # gloo's threads sometimes abort the interpreter's own shutdown
"""


@pytest.mark.slow
def test_two_processes_give_the_gradient_of_one(tmp_path: Path) -> None:
    distiller, data, _ = setup(gradient_checkpointing=True)
    batch = data.plain_collator([data.train_items[i] for i in range(4)])
    labelled = (batch["student"]["labels"][:, 1:] != NO_LABEL).sum()
    items = torch.stack([labelled, batch["student"]["attention_mask"].sum()]).float()
    distiller.train()(batch["student"], batch["teachers"], items)["loss"].backward()
    expected = gradients(distiller)
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    torchrun = [
        quick_python.executable(),
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(
        [*torchrun, str(script), str(tmp_path / "grads.pt")], env=environment, check=True, timeout=300
    )
    found = torch.load(tmp_path / "grads.pt", weights_only=True)
    assert found.keys() == expected.keys()
    for name in expected:
        rounding = 1e-6 * float(expected[name].abs().max())
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=rounding, msg=name)
