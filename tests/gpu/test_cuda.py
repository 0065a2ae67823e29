"""The same runs on a CUDA device: ``nox -s gpu``. Skipped, with the reason, where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kava_core.train.assemble import make_data, make_distiller
from kava_core.train.callbacks import read_metrics
from kava_core.train.run import run
from tests import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_ends_with_finite_losses(tmp_path: Path, precision: str) -> None:
    result = run(tiny.spec(tmp_path, train={"precision": precision}), variant="main", seed=0)
    lines = read_metrics(result.folder / "metrics.jsonl")
    terms = [line[name] for line in lines for name in ("ce", "mercator", "relation") if name in line]
    assert len(terms) == 3 * 6
    assert torch.isfinite(torch.tensor(terms)).all()


def test_loss_and_gradients_equal_the_cpus() -> None:
    spec = tiny.spec()
    data = make_data(spec)
    batch = data.plain_collator([data.train_items[index] for index in range(4)])
    items = torch.tensor([40.0, 60.0])
    found = {}
    for device in ("cpu", "cuda"):
        distiller = make_distiller(spec, data, seed=0)
        distiller.calibrate(batch)
        distiller.finish_calibration()
        distiller.to(device)
        distiller.place_teachers(torch.device(device))
        sides = [
            {k: v.to(device) for k, v in side.items()}
            for side in (batch["student"], *batch["teachers"].values())
        ]
        teachers = dict(zip(batch["teachers"], sides[1:], strict=True))
        distiller(sides[0], teachers, items.to(device))["loss"].backward()
        found[device] = {n: p.grad.cpu() for n, p in distiller.named_parameters() if p.grad is not None}
    for name, gradient in found["cpu"].items():
        torch.testing.assert_close(found["cuda"][name], gradient, rtol=1e-3, atol=1e-5, msg=name)
