"""Train two steps of a spec on made-up tokens and print the bytes of resident memory at the peak."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from kava_core.build.pipeline import make_pipeline
from kava_core.costs.dry_run import unpadded_timeline
from kava_core.distill.distiller import Distiller
from kava_core.kv.capture.geometry import model_geometry
from kava_core.models.student import add_lora
from kava_core.models.teacher import Teacher
from kava_core.specfile.questions import compared_parts
from tests.support import tiny


def status(name: str) -> int:
    """A line of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def model(declared: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**declared.config)
    made = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, declared.dtype))
    if getattr(declared, "gradient_checkpointing", False):
        made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return add_lora(made, declared.lora, seed=0) if getattr(declared, "lora", None) else made


def side(batch: int, time: int, *, padded: bool) -> dict[str, torch.Tensor]:
    ours = unpadded_timeline(batch, time)
    ids = torch.ones(batch, time, dtype=torch.long)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, -3:] = 0
    fields = {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}
    return fields | {"position_ids": ours.positions, "segments": ours.segments, "spans": ours.spans}


def train(fields: dict[str, Any], time: int) -> None:
    """Two steps."""
    spec = tiny.spec(**fields)
    student = model(spec.student).train()
    models = {t.name: model(t) for t in spec.teachers}
    theirs = {name: model_geometry(one) for name, one in models.items()}
    pipeline = make_pipeline(spec, theirs, model_geometry(student), seed=0)
    how: dict[str, Any] = {"parts": compared_parts(spec), "rotary": spec.rotary}
    teachers = [Teacher(a.name, models[a.name], layers=a.sources, **how) for a in pipeline.teachers]
    distiller = Distiller(student, pipeline, teachers, **how)
    adam = torch.optim.AdamW([p for p in distiller.parameters() if p.requires_grad])
    batch = spec.train.batch_size
    ours = side(batch, time, padded=batch > 1)
    sides = {t.name: side(batch, time, padded=batch > 1) for t in spec.teachers}
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=spec.train.precision == "bf16"):
            loss = distiller(ours, sides, torch.full((2,), float(batch * time)))["loss"]
        loss.backward()
        adam.step()
        adam.zero_grad(set_to_none=False)


def small(declared: dict[str, Any]) -> dict[str, Any]:
    """The same architecture, tiny."""
    few = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
    return declared | {"config": declared["config"] | few}


def main(fields: dict[str, Any], time: int) -> None:
    """What is loaded on first use is loaded by a tiny run before."""
    torch.set_num_threads(1)
    train(
        fields | {"student": small(fields["student"]), "teachers": [small(t) for t in fields["teachers"]]}, 16
    )
    base = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    train(fields, time)
    print(status("VmHWM") - base)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), int(sys.argv[2]))
