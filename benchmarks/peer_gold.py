"""One step of TRL's cross-tokenizer trainer, and kava's on the same texts with two tokenizers.

TRL: ``GOLDTrainer`` with the extended ULD loss (probabilities of merged tokens, sorted over the vocabulary)
and cross-entropy; off policy; no gradient checkpointing, float32. It tokenizes for the teacher in the step,
kava pads its batch in the step: both belong to what is timed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench import Bench, Size, make_spec
from datasets import Dataset
from torch import nn
from trl.experimental.gold import GOLDConfig, GOLDTrainer

from kava_core.data.chain import chain_examples
from kava_core.data.collate import Collator
from kava_core.data.examples import Example, render_example
from kava_core.data.tokenizers import train_tokenizer
from kava_core.specfile.sections.data import ChainData, Template
from kava_core.specfile.sections.models import TrainTokenizer

CHAINS = ChainData(steps=36, modulus=1000, train=256, validation=16)
TEMPLATE: Template = CHAINS.template


def make(size: Size, device: str) -> tuple[Bench, dict[str, Callable[[], object]]]:
    """The bench around both, and the steps by name."""
    examples, _ = chain_examples(CHAINS)
    with tempfile.TemporaryDirectory() as folder:
        collator = _collator(examples, Path(folder))
        items = [item for item in collator.encode(examples[: size["batch"]]) if item is not None]
        spec = make_spec(size, [{"name": "mercator"}], align={"time_warper": "char_iou"})
        bench = Bench(spec, size, device, batch=collator(items))
        trainer = _trainer(bench, collator, examples[: size["batch"]], Path(folder))

    def kava() -> None:
        bench.take(collator(items))
        bench.step()

    return bench, {"kava": kava, "TRL": _step(bench, trainer)}


def _collator(examples: list[Example], folder: Path) -> Collator:
    texts = [render_example(example, TEMPLATE).text for example in examples]
    student, teacher = (
        train_tokenizer(TrainTokenizer(kind="bpe", vocab_size=entries), texts, folder / str(entries))
        for entries in (400, 1200)
    )
    return Collator(student, {"t0": teacher}, TEMPLATE)


def _trainer(bench: Bench, collator: Collator, examples: list[Example], folder: Path) -> GOLDTrainer:
    """``GOLDTrainer`` around the bench's models."""
    texts = [render_example(example, TEMPLATE) for example in examples]
    rows = [{"prompt": one.prompt, "completion": one.text[len(one.prompt) :]} for one in texts]
    collator.teacher_tokenizers["t0"].save_pretrained(folder / "teacher")
    settings: dict[str, Any] = {
        **{"output_dir": str(folder), "report_to": "none", "per_device_train_batch_size": len(rows)},
        **{"use_cpu": bench.device == "cpu", "bf16": False, "gradient_checkpointing": False, "lmbda": 0.0},
        **{"use_uld_loss": True, "uld_crossentropy_weight": 1.0, "max_length": 2048},
    }
    return GOLDTrainer(
        model=bench.student,
        teacher_model=bench.teachers[0].model,
        args=GOLDConfig(**settings, teacher_tokenizer_name_or_path=str(folder / "teacher")),
        train_dataset=Dataset.from_list(rows),
        processing_class=collator.student_tokenizer,
    )


def _step(bench: Bench, trainer: GOLDTrainer) -> Callable[[], None]:
    """``training_step`` of the trainer's one batch, then the same update as kava's."""
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.current_gradient_accumulation_steps = 1  # as ``train`` would
    optimizer = torch.optim.AdamW(bench.student.parameters(), lr=1e-4)

    def step() -> None:
        trainer.training_step(bench.student, batch)
        nn.utils.clip_grad_norm_(bench.student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step
