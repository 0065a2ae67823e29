"""FSDP2 in two processes (gloo, CPU): a sharded student's KV gradient and a sharded teacher's cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kava_core.kv.capture.capture import Capture
from tests.support import quick_python
from tests.support.repository import ROOT
from tests.support.tiny_models import WORKS

pytestmark = pytest.mark.slow
torch.set_num_threads(1)
IDS = torch.randint(3, 64, (4, 9), generator=torch.Generator().manual_seed(1))
WEIGHTS = torch.randn(2, 2, 9, 8, generator=torch.Generator().manual_seed(2))
LLAMA = next(case for case in WORKS if case.name == "Llama")
PARTS = ("keys", "values", "queries")


def models(*, checkpointed: bool = False) -> tuple[nn.Module, nn.Module]:
    """A student and a wider teacher, the same in every process."""
    student = LLAMA.model().train()
    if checkpointed:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    teacher = LLAMA.model(hidden_size=48, num_hidden_layers=3).eval().requires_grad_(False)
    return student, teacher


def loss(student: nn.Module, teacher: nn.Module, ids: Tensor, of: int) -> Tensor:
    """This process's share of the KV loss of ``of`` examples. No cross-entropy reaches a parameter."""
    with torch.no_grad(), Capture(teacher, layers=(0, 2)) as theirs:
        teacher(input_ids=ids, use_cache=False)
    with Capture(student, parts=PARTS, rotary="match") as ours:
        logits = student(input_ids=ids, use_cache=False).logits
    target, cache = theirs.take(), ours.take()
    keys = (cache.keys - ours.rotation().apply(target.keys)).square().sum()
    values = ((cache.values - target.values) * WEIGHTS[None]).square().sum()
    return (keys + values + cache.queries.pow(2).sum() + 0 * logits.sum()) / of


def cache_of(teacher: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    with torch.no_grad(), Capture(teacher, parts=PARTS) as capture:
        teacher.base_model(input_ids=ids, use_cache=False)
    return dict(capture.take().items())


def worker(folder: str, checkpointed: str) -> None:
    """One of two processes: half of the batch, everything sharded."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    rank, mesh = dist.get_rank(), dist.device_mesh.init_device_mesh("cpu", (2,))
    student, teacher = models(checkpointed=checkpointed == "True")
    for model in (student, teacher):
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model.model, mesh=mesh)
        fully_shard(model, mesh=mesh)
    mine = IDS[2 * rank : 2 * rank + 2]
    loss(student, teacher, mine, of=2).backward()  # FSDP averages over the processes
    found = {name: p.grad.full_tensor() for name, p in student.named_parameters() if p.grad is not None}
    torch.save({"gradients": found, "cache": cache_of(teacher, mine)}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def torchrun(folder: Path, *arguments: str) -> list[dict[str, dict[str, Tensor]]]:
    more = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    done = subprocess.run(
        [quick_python.executable(), *launcher, str(folder), *arguments],
        env=os.environ | more,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_two_sharded_processes_equal_one(checkpointed: bool, tmp_path: Path) -> None:
    found = torchrun(tmp_path, str(checkpointed))
    student, teacher = models()
    loss(student, teacher, IDS, of=4).backward()
    want = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert want["model.layers.0.self_attn.k_proj.weight"].abs().max() > 0
    for rank, half in enumerate(found):
        assert half["gradients"].keys() == want.keys()
        for name, gradient in want.items():
            torch.testing.assert_close(half["gradients"][name], gradient, rtol=1e-5, atol=1e-6, msg=name)
        whole = cache_of(teacher, IDS[2 * rank : 2 * rank + 2])
        assert all(torch.equal(half["cache"][part], whole[part]) for part in PARTS)


if __name__ == "__main__":
    torch.set_num_threads(1)
    worker(*sys.argv[1:])
