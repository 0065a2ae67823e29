"""Step time over the floor: what KV distillation adds to the models' own cost.

Floor = every teacher's forward pass (no LM head) + the student's forward, backward and optimizer step.
Each arm is timed in one process, alternated, as CPU or CUDA time; medians of ratios over rounds.

    python benchmarks/step.py [--rounds 30] [--size small|medium] [--device cpu|cuda]
"""

from __future__ import annotations

import argparse
import statistics

import torch
from alternated import alternate
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from kava_core.kv.pipeline import KVPipeline, parts_of
from kava_core.kv.probe import geometry_of
from kava_core.registry import Registry
from kava_core.spec.bind import bind
from kava_core.spec.model import PipelineSpec
from kava_core.train.distiller import Distiller, cross_entropy
from kava_core.train.teacher import Teacher

SIZES = {
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
}
VOCAB = 2048


def config(width: int, layers: int, heads: int, kv: int) -> dict[str, object]:
    """A Llama config; head width = width / heads."""
    return {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
    }


def make_spec(size: dict, losses: list[dict], teachers: int) -> PipelineSpec:
    """The pipeline of one arm."""
    return bind(Registry.build()).model_validate(
        {
            "name": "bench",
            "student": {"config": config(*size["student"]), "tokenizer": {"kind": "bpe"}},
            "teachers": [
                {"name": f"t{i}", "config": config(*shape), "tokenizer": {"kind": "bpe"}}
                for i, shape in enumerate(size["teachers"][:teachers])
            ],
            "losses": losses,
            "data": {"name": "chain"},
            "train": {"steps": 1},
        }
    )


def build(fields: dict, device: str) -> nn.Module:
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
    """One student and its teachers, stepped with or without the pipeline."""

    def __init__(self, spec: PipelineSpec, size: dict, device: str) -> None:
        torch.manual_seed(0)
        self.student = build(spec.student.config, device)
        models = [build(t.config, device) for t in spec.teachers]
        geometries = {t.name: geometry_of(m) for t, m in zip(spec.teachers, models, strict=True)}
        pipeline = KVPipeline(spec, teachers=geometries, student=geometry_of(self.student)).to(device)
        self.teachers = [
            Teacher(t.name, m, layers=a.sources, parts=parts_of(spec), rotary=spec.rotary)
            for t, m, a in zip(spec.teachers, models, pipeline.teachers, strict=True)
        ]
        self.distiller = Distiller(
            self.student, pipeline, self.teachers, parts=parts_of(spec), rotary=spec.rotary
        )
        self.optimizer = torch.optim.AdamW(self.distiller.parameters(), lr=1e-4)
        batch, length = size["batch"], size["time"]
        self.ours = side(batch, length, device, labels=True)
        self.theirs = {t.name: side(batch, length + length // 5, device) for t in spec.teachers}
        self.items = torch.tensor([batch * (length - 1), batch * length], dtype=torch.float32, device=device)
        self.distiller.calibrate({"student": self.ours, "teachers": self.theirs})
        self.distiller.finish_calibration()

    def floor(self) -> None:
        """Teachers' forward passes and the student's whole step."""
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
        self._update(cross_entropy(logits, here["labels"], self.items[0]))

    def step(self) -> None:
        """The same with capture, alignment and KV losses."""
        self._update(self.distiller(self.ours, self.theirs, self.items)["loss"])

    def _update(self, loss: torch.Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self.distiller.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def ratios(bench: Bench, rounds: int, device: str) -> tuple[list[float], float]:
    """Step over floor in every round; median floor in seconds."""
    seconds = alternate({"floor": bench.floor, "step": bench.step}, rounds, device, warm=3)
    both = zip(seconds["step"], seconds["floor"], strict=True)
    return [step / floor for step, floor in both], statistics.median(seconds["floor"])


ARMS = {
    "mercator K+V, 1 teacher": ([{"name": "mercator"}], 1),
    "smooth_l1 K+V, 1 teacher": ([{"name": "smooth_l1", "scale": "batch"}], 1),
    "relation V, 1 teacher": ([{"name": "relation"}], 1),
    "mercator K+V, 2 teachers": ([{"name": "mercator"}], 2),
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--size", choices=SIZES, default="medium")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {options.device}, size {options.size}, {options.rounds} rounds")
    print("| arm | step / floor (median) | quartiles | floor, ms |\n|---|---|---|---|")
    for name, (losses, teachers) in ARMS.items():
        size = SIZES[options.size]
        bench = Bench(make_spec(size, losses, teachers), size, options.device)
        found, floor = ratios(bench, options.rounds, options.device)
        low, middle, high = statistics.quantiles(found, n=4)
        print(f"| {name} | {middle:.3f} | {low:.3f}–{high:.3f} | {1000 * floor:.0f} |", flush=True)


if __name__ == "__main__":
    main()
