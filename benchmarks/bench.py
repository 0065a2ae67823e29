"""One student and its teachers, with random weights, stepped with and without KV distillation."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from kava_core.build.pipeline import build_pipeline
from kava_core.distill.calibration import calibrate_projectors, finish_projectors
from kava_core.distill.distiller import Distiller
from kava_core.distill.student_pass import cross_entropy
from kava_core.kv.capture.geometry import model_geometry
from kava_core.models.teacher import Teacher
from kava_core.registry import Registry
from kava_core.specfile.bind import bind_spec_model
from kava_core.specfile.questions import compared_parts
from kava_core.specfile.sections.pipeline import PipelineSpec

Size = dict[str, Any]
SIZES: dict[str, Size] = {
    "small": {
        "student": (192, 4, 6, 2),
        "teachers": [(256, 8, 8, 4), (256, 6, 4, 4)],
        "batch": 8,
        "time": 96,
    },
    "medium": {
        "student": (384, 6, 6, 2),
        "teachers": [(512, 12, 8, 4), (512, 8, 8, 8)],
        "batch": 8,
        "time": 256,
    },
    "long": {
        "student": (384, 6, 6, 2),
        "teachers": [(512, 12, 8, 4), (512, 8, 8, 8)],
        "batch": 1,
        "time": 2048,
    },
}
"""Width, layers, query heads and key heads of each model; examples in a batch; the student's tokens."""
VOCAB = 2048


def config(width: int, layers: int, heads: int, kv: int) -> dict[str, Any]:
    """A Llama config; head width = width / heads."""
    return {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "max_position_embeddings": 4096,
    }


def make_spec(
    size: Size,
    losses: list[dict[str, Any]],
    *,
    teachers: int = 1,
    align: dict[str, Any] | None = None,
    **more: Any,
) -> PipelineSpec:
    """The pipeline of one arm; ``align`` for every teacher."""
    return bind_spec_model(Registry.build()).model_validate(
        {
            "name": "bench",
            "student": {"config": config(*size["student"]), "tokenizer": {"kind": "bpe"}},
            "teachers": [
                {
                    "name": f"t{i}",
                    "config": config(*shape),
                    "tokenizer": {"kind": "bpe"},
                    "align": align or {},
                }
                for i, shape in enumerate(size["teachers"][:teachers])
            ],
            "losses": losses,
            "data": {"name": "chain"},
            "train": {"steps": 1},
            **more,
        }
    )


def build(fields: dict[str, Any], device: str) -> nn.Module:
    """A model with random weights."""
    fields = dict(fields)
    made = AutoConfig.for_model(fields.pop("model_type"), **fields)
    return AutoModelForCausalLM.from_config(made, attn_implementation="sdpa").to(device)


def side(batch: int, length: int, device: str, *, labels: bool = False) -> dict[str, torch.Tensor]:
    """A batch of random ids in three segments."""
    ids = torch.randint(3, VOCAB, (batch, length), device=device)
    segments = torch.ones_like(ids)
    segments[:, : length // 4], segments[:, -length // 8 :] = 0, 2
    made = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "segments": segments,
        "spans": torch.zeros(batch, length, 2, dtype=torch.long, device=device),
    }
    return made | ({"labels": ids} if labels else {})


class Bench:
    """One student and its teachers, stepped with or without the pipeline.

    Args:
        spec: from ``make_spec``.
        size: one of ``SIZES``.
        device: of everything.
        longer: a teacher's tokens as a multiple of the student's.
        batch: a collator's, in place of random tokens.
    """

    def __init__(
        self,
        spec: PipelineSpec,
        size: Size,
        device: str,
        *,
        longer: float = 1.2,
        batch: dict[str, Any] | None = None,
    ) -> None:
        torch.manual_seed(0)
        self.device, self.longer = device, longer
        self.student = build(spec.student.config, device)
        models = [build(t.config, device) for t in spec.teachers]
        geometries = {t.name: model_geometry(m) for t, m in zip(spec.teachers, models, strict=True)}
        self.pipeline = build_pipeline(spec, teachers=geometries, student=model_geometry(self.student)).to(
            device
        )
        self.teachers = [
            Teacher(t.name, m, layers=a.sources, parts=compared_parts(spec), rotary=spec.rotary)
            for t, m, a in zip(spec.teachers, models, self.pipeline.teachers, strict=True)
        ]
        self.distiller = Distiller(
            self.student, self.pipeline, self.teachers, parts=compared_parts(spec), rotary=spec.rotary
        )
        self.optimizer = torch.optim.AdamW(self.distiller.parameters(), lr=1e-4)
        if batch is None:
            self.show(size["batch"], size["time"])
        else:
            self.take(batch)
        calibrate_projectors(self.distiller, {"student": self.ours, "teachers": self.theirs})
        finish_projectors(self.distiller.pipeline)

    def take(self, batch: dict[str, Any]) -> None:
        """Make these the tokens of every step from now on."""
        self.ours, self.theirs = batch["student"], batch["teachers"]
        labelled = (self.ours["labels"][:, 1:] >= 0).sum()
        self.items = torch.stack([labelled, self.ours["attention_mask"].sum()]).float()

    def show(self, batch: int, length: int) -> None:
        """``take`` for random tokens."""
        t_length = round(self.longer * length)
        theirs = {teacher.name: side(batch, t_length, self.device) for teacher in self.teachers}
        self.take({"student": side(batch, length, self.device, labels=True), "teachers": theirs})

    def floor(self) -> None:
        """Every teacher's forward pass without its LM head, and the student's whole step."""
        with torch.no_grad():
            for teacher in self.teachers:
                there = self.theirs[teacher.name]
                teacher.model.base_model(
                    input_ids=there["input_ids"], attention_mask=there["attention_mask"], use_cache=False
                )
        here = self.ours
        logits = self.student(
            input_ids=here["input_ids"], attention_mask=here["attention_mask"], use_cache=False
        ).logits
        self.update(cross_entropy(logits, here["labels"], self.items[0]))

    def loss(self) -> torch.Tensor:
        """kava's: cross-entropy and the KV losses."""
        return self.distiller(self.ours, self.theirs, self.items)["loss"]

    def step(self) -> None:
        """The floor with capture, alignment and KV losses."""
        self.update(self.loss())

    def update(self, loss: torch.Tensor) -> None:
        """The rest of a step."""
        loss.backward()
        nn.utils.clip_grad_norm_(self.distiller.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
