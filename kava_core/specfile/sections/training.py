"""Describe the optimisation, the store, validation and online distillation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from kava_core.config import Strict
from kava_core.specfile.sections.types import Positive


class TrainSpec(Strict):
    """The optimisation."""

    steps: Positive
    """Optimizer steps."""
    batch_size: Positive = 32
    """Examples in a forward pass of one process."""
    accumulate: Positive = 1
    """Forward passes in a step; the loss is that of the whole batch, whatever this is."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate of AdamW, for the student and for trainable aligners."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate after the warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up."""
    weight_decay: float = Field(0.01, ge=0)
    """Weight decay of AdamW, for the student and its latent tokens."""
    clip: float = Field(1.0, gt=0)
    """Largest norm of the gradient."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast dtype of the student's and teachers' forward passes."""
    compile: Literal["inductor", "aot_eager"] | None = None
    """Backend of torch.compile for the student's forward pass; answers are written uncompiled."""
    stream: bool = False
    """Align a teacher's cache while it runs, one of its layers alive at a time: the same gradient with less
    memory, for long texts and large teachers. Where an aligner is trained or the student is lifted, the
    losses are formed meanwhile; then not with ``target: fused``, nor with a fuser that looks at targets."""
    max_length: Positive = 1024
    """Examples longer than this in any tokenizer are left out, and counted."""
    loss_on: Literal["completion", "all"] = "completion"
    """Tokens with cross-entropy: reasoning and answer, or the prompt as well."""
    calibration_examples: Positive = 256
    """Training examples shown to calibrated components before the first step."""
    shuffle_teacher: bool = False
    """Control: every example gets the teacher cache of another example of its batch."""
    log_every: Positive = 10
    """Steps between lines in metrics.jsonl."""
    save_every: Positive = 200
    """Steps between checkpoints."""
    keep_checkpoints: Positive = 2
    """Complete checkpoints kept."""
    workers: int = Field(0, ge=0)
    """Data loader processes."""
    trackers: tuple[Literal["tensorboard", "trackio", "wandb", "mlflow"], ...] = ()
    """Trackers beside metrics.jsonl."""


class StoreSpec(Strict):
    """The teachers' aligned caches on disk: ``kava cache`` writes them, training then runs no teacher."""

    folder: str
    """Folder of stores. Each is named by a hash of everything it depends on: weights, tokenizers, examples,
    alignment, what is compared."""
    dtype: Literal["bfloat16", "int8", "float32"] = "bfloat16"
    """How numbers are stored. ``int8``: with a float32 scale for each layer, head and position."""
    shard_mb: Positive = 512
    """Size of a file, in MiB."""


class EvaluateSpec(Strict):
    """Validation during training."""

    every: Positive = 100
    """Steps between evaluations."""
    examples: Positive = 256
    """Validation examples used."""
    batch_size: Positive = 64
    """Examples in a forward pass."""
    generate: bool = True
    """Also write answers and count exact matches."""
    max_new_tokens: Positive = 64
    """Longest written answer."""
    controls: bool = False
    """With latent tokens: also count exact matches after latent tokens that are all zero, and after those of
    another example. Answers that stay right did not need them."""

    @model_validator(mode="after")
    def _controls_write(self) -> EvaluateSpec:
        if self.controls and not self.generate:
            raise ValueError("'controls' needs 'generate: true'")
        if self.controls and min(self.batch_size, self.examples) < 2:
            raise ValueError("'controls' exchanges examples of a batch: 'batch_size' and 'examples' from 2")
        return self


class OnlineSpec(Strict):
    """Online distillation: the student writes a part of what it and its teachers read. Teachers then judge
    texts it would write, mistakes included, and not only the data's (on-policy, arXiv 2306.13649)."""

    share: float = Field(0.5, gt=0, le=1)
    """Share of every batch whose completions the student writes anew at every step. They have no
    cross-entropy (nor divergence of ``logits``): caches alone are compared there."""
    temperature: float = Field(1.0, gt=0)
    """Of the sampling."""
    max_new_tokens: Positive = 64
    """Longest completion."""
