"""The same runs on a CUDA device: ``nox -s gpu``. Skipped, with the reason, where there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kava_core.build.data import make_data
from kava_core.build.distiller import make_distiller
from kava_core.distill.calibration import calibrate_projectors, finish_projectors
from kava_core.runs.metrics import read_metrics
from kava_core.train.run import run
from tests.support import tiny
from tests.support.repository import ROOT

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
        calibrate_projectors(distiller, batch)
        finish_projectors(distiller.pipeline)
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


def losses(folder: Path, placement: str, precision: str = "fp32") -> list[float]:
    teachers = [one | {"placement": placement} for one in tiny.fields()["teachers"]]
    spec = tiny.spec(folder, teachers=teachers, train={"precision": precision})
    lines = read_metrics(run(spec, variant="main", seed=0).folder / "metrics.jsonl")
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("placement", ["cpu", "cuda:1"])
def test_teachers_on_a_device_of_their_own_teach_the_same(placement: str, tmp_path: Path) -> None:
    if placement == "cuda:1" and torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device here")
    assert losses(tmp_path / "there", placement) == pytest.approx(
        losses(tmp_path / "here", "replicated"), rel=1e-3
    )


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices here")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("config", ["ddp.yaml", "fsdp2.yaml"])
def test_shipped_configs_equal_one_process(config: str, precision: str, tmp_path: Path) -> None:
    """Student sharded (fsdp2.yaml), teachers sharded (both)."""
    teachers = [one | {"placement": "sharded"} for one in tiny.fields()["teachers"]]
    fields = tiny.fields(teachers=teachers, train={"batch_size": 4, "precision": precision})
    (tmp_path / "spec.yaml").write_text(json.dumps(fields | {"output": str(tmp_path / "two")}))
    root = ROOT
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2"]
    command += ["--config_file", str(root / "specs/accelerate" / config), "--main_process_port", "0"]
    command += ["-m", "kava_core", "train", str(tmp_path / "spec.yaml")]
    more = {"PYTHONPATH": str(root), "KAVA_SHAPE_CHECK": "0", "CI": "1"}
    done = subprocess.run(command, env=os.environ | more, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (tmp_path / "two").glob("tiny/main-*")
    found = [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]
    spec = tiny.spec(tmp_path / "one", train={"batch_size": 8, "precision": precision})
    lines = read_metrics(run(spec, variant="main", seed=0).folder / "metrics.jsonl")
    expected = [line["loss"] for line in lines if "loss" in line]
    assert found == pytest.approx(expected, rel=1e-3 if precision == "fp32" else 2e-2)
